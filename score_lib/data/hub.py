"""Data sets of the Hugging Face Hub: their Parquet files, downloaded once into the Hub's cache."""

import logging
import pathlib
import re

from score_lib.data.public import may_prepare
from score_lib.data.sources import DataError, MissingDataError, needed

log = logging.getLogger(__name__)

# The version that was tried.
PACKAGE = "huggingface-hub==2.4.0"
# Where the Hub keeps the files that it makes of data sets in other formats.
REVISIONS = (None, "refs/convert/parquet")


def is_hub_name(path: str) -> bool:
    """Whether a path that is not there may be a name on the Hub: OWNER/NAME or OWNER/NAME/FOLDER.

    Sets without an owner have one name alone.
    """
    part = r"[A-Za-z0-9][\w.-]*"
    is_file = path.lower().endswith((".parquet", ".arrow"))
    return bool(re.fullmatch(rf"{part}(/{part}){{0,4}}", path)) and not is_file


def downloaded(path: str) -> pathlib.Path:
    """The folder with the Parquet files of a data set, downloaded unless it is there.

    Args:
        path: see `is_hub_name`.
    Raises:
        MissingDataError: it is not there, and nothing may be downloaded now.
        DataError: it is not there and cannot be had, or has no Parquet files.
    """
    owner_and_name, folders = path.split("/")[:2], path.split("/")[2:]
    name, missing = "/".join(owner_and_name), f"data.path: there is no file or folder {path!r}"
    huggingface_hub = needed(
        "huggingface_hub",
        f"{missing}, and to look for it on the Hugging Face Hub needs the package "
        f"huggingface_hub: pip install {PACKAGE}",
    )
    if may_prepare():
        log.info("%s is looked for on the Hugging Face Hub, and downloaded unless it is here", name)
    pattern = "/".join([*folders, "*.parquet"])
    for revision in REVISIONS:
        try:
            root = huggingface_hub.snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[pattern],
                local_files_only=not may_prepare(),
            )
        except Exception as error:  # the library raises errors of many packages
            kind = DataError if may_prepare() else MissingDataError
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise kind(
                f"{missing}, and {name} of the Hugging Face Hub cannot be had: {reason}"
            ) from error
        place = pathlib.Path(root).joinpath(*folders)
        if any(place.rglob("*.parquet")):
            return place
    raise DataError(f"{path} on the Hugging Face Hub has no Parquet files")
