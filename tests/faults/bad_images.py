"""Image files and folders: damaged, of impossible sizes, disguised, or links to somewhere else."""

from __future__ import annotations

import io
import os
import pathlib
import socket
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .cases import SIDE, Case, flips_and_cuts, images, read_images, read_mask, written

HUGE = 60_000


def cases() -> Iterator[Case]:
    """All of them."""
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        picture = written(f"x.{suffix}", encoded(suffix))
        # Formats without a checksum over the pixels, or whose decoder passes over it.
        yield from flips_and_cuts(
            f"image .{suffix}", picture, read_images, 5, 3, "refused or valid", "refused or valid"
        )
    mask = written("mask.png", encoded("png", np.zeros((SIDE, SIDE), np.uint8)))
    yield from flips_and_cuts("mask .png", mask, read_mask, 4, 2, *["refused or valid"] * 2)
    for name, data in _bombs().items():
        yield Case("image bombs", name, written(name, data), read_images)
    for name, data in _oddities().items():
        yield Case("images of odd make", name, written(name, data), read_images)
    for name, make in _FOLDERS.items():
        yield Case("folders and links", name, make, read_images)
    for name, make in _ALLOWED.items():
        yield Case("folders and links", name, make, read_images, "read")


def encoded(suffix: str, pixels: np.ndarray | None = None, **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    picture = Image.fromarray(images(1, 24)[0] if pixels is None else pixels)
    names = {"jpg": "jpeg", "tif": "tiff"}
    picture.save(file, names.get(suffix, suffix), **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *others: bytes, data: bytes = b"", bits: int = 8) -> bytes:
    """A gray PNG file that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), *others, chunk(b"IDAT", data or zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    patched = bytearray(data)
    for place, value in changes:
        patched[place : place + len(value)] = value
    return bytes(patched)


def _bombs() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(HUGE), 9)
    big, gif = struct.pack("<H", 65_535), encoded("gif")
    frame = gif.index(b",")
    jpg = encoded("jpg")
    size = jpg.index(b"\xff\xc0") + 5
    text = zlib.compress(bytes(200_000_000), 1)
    return {
        "claims_60000.png": png(HUGE, HUGE, data=zeros),
        "claims_all.png": png(2**31 - 1, 2**31 - 1, data=zeros),
        "above_the_limit.png": png(9_600, 9_600, data=zlib.compress(bytes(9_600 * 9_601), 9)),
        "text.png": png(0, 0, chunk(b"zTXt", b"a\0\0" + text)),
        "texts.png": png(HUGE, 1, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 99),
        "profile.png": png(HUGE, HUGE, chunk(b"iCCP", b"a\0\0" + text)),
        "claims.gif": _patched(gif, (6, big * 2), (frame + 5, big * 2)),
        "claims.jpg": _patched(jpg, (size, struct.pack(">HH", 65_500, 65_500))),
        "claims.bmp": _patched(encoded("bmp"), (18, struct.pack("<ii", 10**6, 10**6))),
        "claims.webp": _webp(16_383, 16_383),
        "claims.tif": tiff({256: HUGE, 257: HUGE, 258: 8, 259: 1, 262: 1, 273: 8, 279: 100}),
        "strips.tif": tiff({256: HUGE, 257: HUGE, 258: 8, 259: 8, 262: 1, 273: 8, 279: 2**32 - 1}),
    }


def _webp(width: int, height: int) -> bytes:
    """An extended WebP file that claims the size of its canvas."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inner = encoded("webp", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(tags: dict[int, int], following: int = 0) -> bytes:
    """A TIFF file of these tags, each one number, and where it says that the next page is."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)


def _oddities() -> dict[str, bytes]:
    floats = io.BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE), np.float32)).save(floats, "tiff")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 scale\n%%EOF\n"
    plain = {256: SIDE, 257: SIDE, 258: 8, 259: 1, 262: 1, 273: 8, 279: SIDE**2}
    return {
        "empty.png": b"",
        "zeros.png": bytes(1000),
        "text.png": b"not an image\n" * 100,
        "newline\n\x1b[31mred.png": b"not an image",
        "size_zero.png": png(0, 0),
        "no_data.png": b"\x89PNG\r\n\x1a\n" + png(SIDE, SIDE)[8:33] + chunk(b"IEND", b""),
        "no_header.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"x") + chunk(b"IEND", b""),
        "short_data.png": png(SIDE, SIDE, data=zlib.compress(b"x")),
        "wrong_checksum.png": _patched(png(SIDE, SIDE), (29, b"abcd")),
        "bits_of_3.png": png(SIDE, SIDE, bits=3),
        "postscript.png": script,
        "floats.tif": floats.getvalue(),
        "pages_in_a_circle.tif": tiff({**plain, 258: 3}, following=8),
        "bits_of_77.tif": tiff({**plain, 258: 77}),
        "method_99.tif": tiff({**plain, 259: 99}),
        "no_tags.tif": tiff({}),
        "plain.pgm.png": b"P5 8 8 255\n" + bytes(64),
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
        "only_the_start.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "only_the_start.gif": b"GIF89a",
        "only_the_start.jpg": b"\xff\xd8\xff",
    }


def _outside(folder: pathlib.Path) -> pathlib.Path:
    """A picture beside the folder, not in it."""
    path = folder.parent / "outside.png"
    if not path.exists():
        path.write_bytes(encoded("png"))
    return path


def _linked(target) -> object:
    def make(folder: pathlib.Path) -> pathlib.Path:
        inside = folder / "data"
        inside.mkdir()
        (inside / "x.png").symlink_to(target(folder))
        return inside

    return make


def _special(add) -> object:
    def make(folder: pathlib.Path) -> pathlib.Path:
        inside = folder / "data"
        inside.mkdir()
        add(inside / "x.png")
        return inside

    return make


def _socket(path: pathlib.Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the paths of sockets have to be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


def _sparse(path: pathlib.Path) -> None:
    path.touch()
    os.truncate(path, 50 << 30)


def _deep(folder: pathlib.Path) -> pathlib.Path:
    at = os.open(folder, os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("a", dir_fd=at)
        inner = os.open("a", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    return folder


_FOLDERS = {
    "link to a picture outside": _linked(_outside),
    "link up and down again": _linked(lambda f: pathlib.Path("..") / ".." / _outside(f).name),
    "link to /dev/zero": _linked(lambda _: "/dev/zero"),
    "link to nothing": _linked(lambda _: "none.png"),
    "link to itself": _linked(lambda _: "x.png"),
    "link to a folder": _linked(lambda folder: folder.parent),
    "pipe": _special(os.mkfifo),
    "socket": _special(_socket),
    "folder of that name": _special(os.mkdir),
    "50 GB of nothing": _special(_sparse),
    "nothing": lambda folder: folder,
    "folders in folders": _deep,
    "pipe itself": lambda folder: (os.mkfifo(folder / "x.png"), folder / "x.png")[1],
    "pipe for an array": lambda folder: (os.mkfifo(folder / "x.npz"), folder / "x.npz")[1],
    "/dev/zero itself": lambda folder: pathlib.Path("/dev/zero"),
}


def _link_inside(folder: pathlib.Path) -> pathlib.Path:
    (folder / "a.png").write_bytes(encoded("png"))
    (folder / "b.png").symlink_to("a.png")
    return folder


def _named_link(folder: pathlib.Path) -> pathlib.Path:
    (folder / "x.png").symlink_to(_outside(folder))
    return folder / "x.png"


_ALLOWED = {"link within the folder": _link_inside, "link that the user names": _named_link}
