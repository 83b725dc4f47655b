"""The authors' own files of a data set: copied on this machine, or downloaded, and verified."""

import gzip
import http.client
import itertools
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


def fetch(dataset: str, folder: pathlib.Path) -> None:
    """Put the files of a data set of `ADDRESSES` into a folder, and verify them.

    Those that are there stay; others are copied from where a package puts them, or downloaded.

    Raises:
        DataError: files are damaged or cannot be downloaded.
    """
    package, advice = PACKAGES.get(dataset, (folder, ""))
    if not has_archive(dataset, folder):
        for name, md5 in itertools.chain(*(part.md5 for part in ARCHIVES[dataset][0].splits)):
            target = folder / f"{name}.gz"
            if target.exists():
                continue
            ready, url = package / target.name, ADDRESSES[dataset] + target.name
            content = ready.read_bytes() if ready.exists() else _downloaded(url, folder, advice)
            _store(target, content, md5)
    open_archive(dataset, str(folder))


def _downloaded(url: str, folder: pathlib.Path, advice: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} cannot be downloaded ({error}): copy it and the other files of this data set "
            f"to {folder}, {advice}and repeat the command"
        ) from error


def _store(path: pathlib.Path, content: bytes, md5: str) -> None:
    """Write a packed file whose unpacked contents have a hash."""
    try:
        verify(gzip.decompress(content), md5, path.name)
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path.name} is no whole gzip file ({error}): repeat the command"
        ) from error
    with atomic_write(path) as stored:
        stored.write(content)
