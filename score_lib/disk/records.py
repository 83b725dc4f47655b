"""Files of `torch.save`, verified while they are loaded, without running code they may hold.

Such a file is a zip file of uncompressed records, and PyTorch does not verify their CRC-32.
Published files from before PyTorch 1.6 have another layout, without records and checksums.
"""

import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

# PyTorch aligns tensors to this many bytes; only then can they be used where they are in the file.
_ALIGNMENT = 64
_THREADS = min(4, os.cpu_count() or 1)
_ZIP, _END, _ZIP64_LOCATOR = b"PK\3\4", b"PK\5\6", b"PK\6\7"
# First bytes of files that people take for those of `torch.save`.
_KINDS = {
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture (.png)",
    b"\xff\xd8\xff": "a picture (.jpg)",
    b"\x1f\x8b": "packed by gzip",
    b"version https://git-lfs": "a pointer of Git LFS to the file, which has yet to be downloaded",
}
_SPACES = b"\t\n\f\r"


class _Record(NamedTuple):
    name: str
    start: int
    size: int
    crc: int


def load_verified(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    mapped: bool = False,
    tensors: bool = True,
) -> Any:
    """`torch.load(weights_only=True)`, with the CRC-32 of every record verified meanwhile.

    Args:
        mapped: let tensors on the CPU be views of the file on disk, for a caller that copies them
            at once.
        tensors: verify them, too; a caller that uses plain values alone need not wait for that.
    Raises:
        OSError: the file cannot be read.
        Exception: damaged files make PyTorch raise errors of nearly any type.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        if contents[: len(_ZIP)] != _ZIP:  # PyTorch, too, distinguishes the layouts by this
            _refuse_buffers(contents, 0, len(contents))
            return _load(path, device, mapped=False)
        records = _records(path, contents)
        pickles = [record for record in records if record.name.lower().endswith(".pkl")]
        _verify(contents, pickles)
        for record in pickles:
            _refuse_buffers(contents, record.start, record.start + record.size)
        others = [record for record in records if record not in pickles]
        mapped = mapped and all(record.start % _ALIGNMENT == 0 for record in others)
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = [others[k::_THREADS] for k in range(_THREADS if tensors else 0)]
            verified = [pool.submit(_verify, contents, part) for part in parts]
            loaded = _load(path, device, mapped)
            for part in verified:
                part.result()
        return loaded


def foreign_kind(path: str | os.PathLike) -> str:
    """The kind of a file that `torch.save` did not write, such as "text"; "" if it is unknown."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "empty"
    if start.startswith(_ZIP):
        return _foreign_archive(path)
    for mark, kind in _KINDS.items():
        if start.startswith(mark):
            return kind
    return "text" if all(byte >= 32 or byte in _SPACES for byte in start) else ""


def _foreign_archive(path: str | os.PathLike) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged files make readers raise errors of nearly any type
        return ""
    if all(name.endswith(".npy") for name in names):
        return "an archive of NumPy's arrays (.npz)"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a program of TorchScript"
    return "" if any(name.endswith("/data.pkl") for name in names) else "a .zip of other files"


def _load(path: str | os.PathLike, device: torch.device | str, mapped: bool) -> Any:
    with torch.serialization.safe_globals(_numpy_scalars()):
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if "weights_only" not in str(error):
                raise
            # PyTorch advises to load the file in a way that runs any code in it.
            reason = str(error.__context__ or error).splitlines()[0].split(". ")[0]
            raise pickle.UnpicklingError(reason) from None


def _records(path: str | os.PathLike, contents: mmap.mmap) -> list[_Record]:
    """Where the records are, and their checksums."""
    if not zipfile.is_zipfile(path):
        raise ValueError("its list of records is missing: it is cut off")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if not _is_unambiguous(contents, members):
        raise ValueError("its list of records is not where PyTorch writes it")
    if sum(member.file_size for member in members) > len(contents):
        raise ValueError("its records claim more bytes than there are")
    return [_record(contents, member) for member in members]


def _is_unambiguous(contents: mmap.mmap, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether PyTorch's reader of zip files is bound to find the same list as Python's."""
    end = len(contents) - 22
    locator = contents[max(end - 20, 0) : end]
    is_zip64 = locator.startswith(_ZIP64_LOCATOR)
    return (
        contents[end : end + 4] == _END
        and min((member.header_offset for member in members), default=0) == 0
        and not (is_zip64 and int.from_bytes(locator[8:16], "little") != end - 76)
    )


def _record(contents: mmap.mmap, member: zipfile.ZipInfo) -> _Record:
    mark, name, extra = struct.unpack_from("<4s22xHH", contents, member.header_offset)
    if mark != _ZIP:
        raise ValueError(f"the record {member.filename} is missing")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {member.filename} is compressed")
    start = member.header_offset + 30 + name + extra
    return _Record(member.filename, start, member.file_size, member.CRC)


def _verify(contents: mmap.mmap, records: Sequence[_Record]) -> None:
    with memoryview(contents) as whole:
        for name, start, size, crc in records:
            if zlib.crc32(whole[start : start + size]) != crc:
                raise ValueError(f"the record {name} does not have its checksum")


def _refuse_buffers(contents: mmap.mmap, start: int, end: int) -> None:
    """Refuse the one call that `weights_only=True` allows and that takes any amount of memory."""
    if contents.find(b"\nbytearray\n", start, end) >= 0:
        raise ValueError("it holds a bytearray")


def _numpy_scalars() -> list:
    """The parts of a NumPy scalar in a file, under their names in old and new NumPy."""
    return [
        (_numpy_scalar, "numpy.core.multiarray.scalar"),
        (_numpy_scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
    ]


def _numpy_scalar(dtype: np.dtype, data: bytes = b"") -> np.generic:
    """A NumPy number, and nothing else: other types can take any amount of memory."""
    if dtype.kind not in "biufc" or len(data) != dtype.itemsize:
        raise ValueError(f"a NumPy scalar of {dtype} and {len(data)} bytes is not a number")
    return np.frombuffer(data, dtype)[0]
