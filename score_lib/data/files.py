"""Folders and zip files: the names in them, and their contents."""

import functools
import logging
import os
import pathlib
import stat
import sys
import zipfile
from collections.abc import Collection

from score_lib.data.index import known_listing
from score_lib.data.names import Names
from score_lib.data.sources import DataError, PerProcess
from score_lib.disk.arrays import open_member
from score_lib.disk.files import printable

log = logging.getLogger(__name__)

# Limit on the file of one example, above the size of any image within MAX_PIXELS.
MAX_BYTES = 1 << 29
# Links that are not followed.
BROKEN, TO_FOLDER = "a broken link", "a link to a folder, which is not followed"
OUTSIDE, IN_ZIP = "a link that leads out of the folder", "a link, which is not followed in a zip"


class Folder:
    """Names of the files below a folder, sorted, of the folders there, and the files' contents.

    Links to folders are not followed, nor are links to files outside the folder.

    Raises:
        DataError: it cannot be listed, or names in it are not read as they are elsewhere.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        listing = known_listing(path)
        self.names, self.folders, self._links = listing.names, listing.folders, listing.links
        _require_same_everywhere(path, self.names)

    def bad_links(self) -> dict[str, str]:
        """The names that are links which cannot be followed, and the kind of each."""
        return {name: kind for name in self._links if (kind := self.bad_link(name))}

    def bad_link(self, name: str) -> str:
        """The kind of link that a name is, if it cannot be followed; otherwise ""."""
        file = os.path.join(self.path, name)
        if not os.path.islink(file):
            return ""
        if not os.path.exists(file):
            return BROKEN
        if os.path.isdir(file):
            return TO_FOLDER
        inside = pathlib.Path(file).resolve().is_relative_to(self.path.resolve())
        return "" if inside else OUTSIDE

    def read(self, name: str) -> bytes:
        """The contents of a file; OSError or ValueError where there are none."""
        if reason := self.bad_link(name):
            raise OSError(f"it is {reason}")
        return self._contents(self.path / name)

    def _contents(self, file: pathlib.Path) -> bytes:
        if not file.is_file():  # reading a pipe or device may never end
            raise OSError("it is not a regular file")
        check_size(file.stat().st_size)
        return file.read_bytes()


def _require_same_everywhere(path: pathlib.Path, names: Names) -> None:
    """Refuse names that a locale without UTF-8 lets Python read as others: the order of examples,
    the names of classes and the choice of points follow from them."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and (names.text > 127).any():
        first = next(name for name in names if not name.isascii())
        raise DataError(
            f"{path} holds names such as {printable(first)}, which this machine reads as "
            f"{encoding}, and others as UTF-8: set the environment variable PYTHONUTF8=1"
        )


class OneFile(Folder):
    """A single file as a folder with one name.  It may be a link to anywhere."""

    def __init__(self, path: pathlib.Path):
        self.path, self.names = path.parent, Names.of([path.name])

    def bad_link(self, name: str) -> str:
        return ""


class Zip:
    """Names of the files in a zip file, and their contents, read without unpacking it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._zip = PerProcess(functools.partial(zipfile.ZipFile, path))
        try:
            names = {name for name in self._zip().namelist() if name[-1:] != "/"}
        except Exception as error:  # damaged files make it raise errors of nearly any type
            raise DataError(f"{path} is not a readable zip file: {error}") from error
        if wrong := min((name for name in names if "\\" in name), default=""):
            raise DataError(
                f"{path} holds {wrong!r}, whose folders are separated by backslashes: unpack "
                "it, as with unzip, and set data.path to the folder"
            )
        self.names = Names.of(sorted(names))

    def bad_links(self) -> dict[str, str]:
        """See `Folder`."""
        return {name: kind for name in self.names if (kind := self.bad_link(name))}

    def bad_link(self, name: str) -> str:
        """See `Folder`."""
        return IN_ZIP if stat.S_ISLNK(self._zip().getinfo(name).external_attr >> 16) else ""

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        member = self._zip().getinfo(name)
        check_size(member.file_size)
        with open_member(self._zip(), member) as file:
            return file.read(member.file_size)


def refuse_broken(path: str | os.PathLike) -> None:
    """Refuse a link to nothing: a part of the data would be lost; raises `DataError`."""
    if not os.path.exists(path):
        raise DataError(f"{path} is {BROKEN}: mend or remove it")


def check_size(size: int) -> None:
    """Refuse an encoded image that is too large; raises OSError."""
    if size > MAX_BYTES:
        raise OSError(f"{size} bytes are too many for one file")


def hidden(name: str) -> bool:
    """Whether a name, or a folder that it is in, is not meant to be seen."""
    of_systems = ("__MACOSX", "lost+found")
    return any(part in of_systems or (part[:1] == "." and part != ".") for part in name.split("/"))


def report(files: Folder | Zip, names: Collection[str], why: str) -> None:
    """Log how many files are left out, with the first names."""
    if names:
        shown = ", ".join(map(printable, sorted(names)[:20])) + (", ..." if len(names) > 20 else "")
        log.warning("%s: %d left out because they %s: %s", files.path, len(names), why, shown)
