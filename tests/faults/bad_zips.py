"""Zip files: damaged, that unpack to more than memory holds, or have odd names."""

from __future__ import annotations

import bz2
import io
import lzma
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator

from .bad_images import encoded
from .cases import Case, flips_and_cuts, read_images, written

GIB = 1 << 30


def cases() -> Iterator[Case]:
    """All of them."""
    good = written("x.zip", zipped({"a.png": encoded("png"), "b/c.png": encoded("png")}))
    yield from flips_and_cuts("zip", good, read_images, 12, 5, "refused or same")
    for name, data in _bombs().items():
        yield Case("zip bombs", name, written("x.zip", data), read_images)
    yield Case("zip bombs", "lzma that claims to be less", _lzma, read_images)
    # Within the limit for one picture; read twice before it is found not to be one.
    whole = archive_of(Entry("x.png", deflated_zeros(GIB // 4), GIB // 4))
    yield Case("zip bombs", "256 MB", written("x.zip", whole), read_images, mebibytes=600)
    for name, data in _odd().items():
        yield Case("zips of odd make", name, written("x.zip", data), read_images)
    for name, data in _paths().items():
        make = written("x.zip", data)
        yield Case("zip names that lead away", name, make, read_images, "refused or valid")


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


class Entry:
    """A member of a zip file that may claim anything of itself.

    Args:
        name: of the file.
        data: as packed.
        size: unpacked size in its header, in bytes.
        method: 8 is deflate.
        flags: 1 is encrypted.
        checksum: CRC-32 of the unpacked bytes.
    """

    def __init__(self, name: str, data: bytes, size: int, method=8, flags=0, checksum=0):
        self.name, self.data = name.encode(), data
        self.fields = struct.pack(
            "<HHHHHIII", 20, flags, method, 0, 33, checksum, len(data), min(size, 2**32 - 2)
        )

    def local(self) -> bytes:
        """Local header and data."""
        return (
            b"PK\3\4" + self.fields + struct.pack("<HH", len(self.name), 0) + self.name + self.data
        )

    def central(self, place: int) -> bytes:
        """Its line in the list of contents; the data are said to be at that place."""
        rest = struct.pack("<HHHHHII", len(self.name), 0, 0, 0, 0, 0, place)
        return b"PK\1\2" + struct.pack("<H", 20) + self.fields + rest + self.name


def archive_of(*entries: Entry, copies: int = 0, suffix: str = ".png") -> bytes:
    """A zip file of members, and of many more names for the data of the first."""
    body, listed = bytearray(), bytearray()
    for entry in entries:
        listed += entry.central(len(body))
        body += entry.local()
    for number in range(copies):
        twin = Entry(f"{number:06}{suffix}", b"", 0)
        twin.fields = entries[0].fields
        listed += twin.central(0)
    count = (len(entries) + copies) & 0xFFFF
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(listed), len(body), 0)
    return bytes(body + listed + b"PK\5\6" + end)


def deflated_zeros(size: int) -> bytes:
    """A deflate stream of so many zero bytes (a multiple of 16 MiB), made in no time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 24) + packer.flush()


def _bombs() -> dict[str, bytes]:
    stream = deflated_zeros(GIB)
    squeezed = bz2.compress(bytes(9 << 20)) * 100
    start = "x.png"
    return {
        "claims to be small": archive_of(Entry(start, stream, 1_000)),
        "claims half its size": archive_of(Entry(start, stream, 1 << 26)),
        "claims its real size": archive_of(Entry(start, stream, GIB)),
        "claims more than there is": archive_of(Entry(start, stream[:1000], 400 << 20)),
        "bzip2 that claims to be small": archive_of(Entry(start, squeezed, 1_000, method=12)),
        "one stretch under many names": archive_of(Entry(start, stream, GIB), copies=5_000),
        "zips in zips": zipped({"a.zip": zipped({"b.zip": archive_of(Entry("c", stream, GIB))})}),
    }


def _lzma(folder: pathlib.Path) -> pathlib.Path:
    """400 MB that claim to be less, packed by a method whose reader goes by the packed size."""
    dense = lzma.compress(bytes(400 << 20), lzma.FORMAT_ALONE, preset=0)
    packed = struct.pack("<BBH", 9, 4, 5) + dense[:5] + dense[13:]
    path = folder / "x.zip"
    path.write_bytes(archive_of(Entry("x.png", packed, GIB // 16, method=14)))
    return path


def _odd() -> dict[str, bytes]:
    picture = encoded("png")
    link = zipfile.ZipInfo("x.png")
    link.external_attr, link.create_system = 0o120777 << 16, 3
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as file:
        file.writestr(link, "/etc/passwd")
    good = zipped({"x.png": picture})
    end = good.index(b"PK\5\6")
    return {
        "encrypted": archive_of(Entry("x.png", picture, len(picture), 0, 1, zlib.crc32(picture))),
        "method 99": archive_of(Entry("x.png", picture, len(picture), 99)),
        "wrong checksum": archive_of(Entry("x.png", picture, len(picture), 0, 0, 1)),
        "a link inside": linked.getvalue(),
        "control characters in a name": zipped({"a\n\x1b[2Jb\r.png": b"nothing"}),
        "no name": archive_of(Entry("", picture, len(picture), 0)),
        "a name of 60,000": zipped({"a" * 60_000 + ".png": b"nothing"}),
        "100,000 names": archive_of(Entry("x", b"", 0), copies=100_000, suffix=".txt"),
        "a folder that is a picture": zipped({"x.png/": b""}),
        "no files": zipped({}),
        "no file": b"",
        "text": b"not a zip file\n" * 100,
        "only the mark": b"PK\3\4",
        "only the end": b"PK\5\6" + bytes(18),
        "list beyond the end": good[: end + 12] + struct.pack("<IIH", 2**31, 2**31, 0),
        "list of 4 GB": good[: end + 12] + struct.pack("<IIH", 2**32 - 2, 0, 0),
        "list before the start": good[: end + 12] + struct.pack("<IIH", 5, 2**31, 0),
        "version 99": good.replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\x63"),
    }


def _paths() -> dict[str, bytes]:
    picture = encoded("png")
    names = ("/tmp/escape.png", "../../escape.png", "a/../../../escape.png", "C:\\escape.png")
    return {name: zipped({name: picture}) for name in names}
