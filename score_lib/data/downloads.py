"""The authors' own files of a data set: found on this machine, or downloaded and verified."""

import gzip
import http.client
import pathlib
import urllib.request

from score_lib.data.archives import ADDRESSES, ARCHIVES, has_archive, open_archive, verify
from score_lib.data.sources import DataError
from score_lib.disk.files import atomic_write

SECONDS = 30  # to wait for an answer
# Folders where packages of an operating system put data sets, and how to get these packages.
PACKAGES = {
    "FASHION_MNIST": (
        pathlib.Path("/usr/share/datasets/fashion-mnist"),
        "or, on Debian, type `apt install dataset-fashion-mnist`, ",
    )
}


def files_of(dataset: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder with the verified files of a data set of `ADDRESSES`.

    They are downloaded if they are neither in `folder` nor where a package puts them.

    Raises:
        DataError: files are damaged or cannot be downloaded.
    """
    package, advice = PACKAGES.get(dataset, (None, ""))
    place = next((p for p in (folder, package) if p and has_archive(dataset, p)), None)
    if place is None:
        place = folder
        for split in ARCHIVES[dataset][0].splits:
            for file, md5 in split.md5:
                _download(ADDRESSES[dataset] + file + ".gz", folder / f"{file}.gz", md5, advice)
    open_archive(dataset, str(place))
    return place


def _download(url: str, path: pathlib.Path, md5: str, advice: str) -> None:
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} cannot be downloaded ({error}): copy it and the other files of this data set "
            f"to {path.parent}, {advice}and repeat the command"
        ) from error
    try:
        verify(gzip.decompress(content), md5, url)
    except (OSError, EOFError) as error:
        raise DataError(f"{url} is no whole gzip file ({error}): repeat the command") from error
    with atomic_write(path) as stored:
        stored.write(content)
