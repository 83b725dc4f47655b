"""Files of the safetensors format, whose header is checked before a tensor is read.

Such a file is the length of its header, 8 bytes little-endian; the header, JSON of the dtype, shape
and place of each tensor; and the tensors, one behind the other.  It holds no code.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.devices import resolve_device
from score_lib.disk.files import atomic_write, printable
from score_lib.disk.fit import CheckpointError

LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Entry(NamedTuple):
    """A header's entry for a tensor; `start` and `end` count bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors(
    path: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file and its metadata.

    Args:
        device: where the tensors are; "auto" is a GPU where there is one.
    Returns:
        tensors by name, in the order of their places in the file; texts by name.
    Raises:
        OSError: the file cannot be read.
        CheckpointError: the file is damaged, or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    entries, metadata = read_header(path)
    where = resolve_device(device)
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(where)) as file:
            return {name: file.get_tensor(name) for name in entries}, metadata
    except SafetensorError as error:
        raise _refused(path, printable(str(error))) from error


def read_header(path: str | os.PathLike) -> tuple[dict[str, Entry], dict[str, str]]:
    """The header of a file, checked: dtypes, shapes and places of its tensors, and the metadata.

    Tensors fill the file without gaps and overlaps, so that they take no more memory than it.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: the file is damaged, or not of this format.
    """
    header, data_size = _raw_header(path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refused(path, f"its {_METADATA} is no table of texts")
    found = [(name, _entry(path, name, value)) for name, value in header.items()]
    entries = dict(sorted(found, key=lambda item: item[1][2:]))
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            fault = "overlaps another" if entry.start < position else "leaves a gap before it"
            raise _refused(path, f"its tensor {name!r} {fault}")
        position = entry.end
    if position != data_size:
        raise _refused(
            path, f"its tensors take {position} bytes, and behind the header are {data_size}"
        )
    return entries, metadata


def _raw_header(path: str | os.PathLike) -> tuple[dict, int]:
    """A file's header as it is, and the number of bytes behind it."""
    path = pathlib.Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _refused(
                path,
                f"its header of {length} bytes should end within its {size} bytes and be at most "
                f"{LONGEST_HEADER} bytes long",
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header is no JSON without double names: {error}") from error
    if not isinstance(header, dict):
        raise _refused(path, f"its header is a {type(header).__name__}, not a table")
    return header, size - 8 - length


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the name {name!r} is there twice")
        table[name] = value
    return table


def _entry(path: str | os.PathLike, name: str, value: object) -> Entry:
    """The header's entry for a tensor, whose size is that of its dtype and shape."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(path, f"its tensor {name!r} has not just a dtype, a shape and a place")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _refused(path, f"its tensor {name!r} has the unknown dtype {dtype!r}")
    # Of few sides, so that their product costs no time.
    if not (_are_counts(shape) and len(shape) <= 64):
        raise _refused(path, f"its tensor {name!r} has a shape that is no list of counts")
    if not (_are_counts(offsets) and len(offsets) == 2):
        raise _refused(path, f"its tensor {name!r} has a place other than two counts")
    start, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
        raise _refused(
            path, f"its tensor {name!r}, {dtype} {shape}, does not take {end - start} bytes"
        )
    return Entry(_DTYPES[dtype], tuple(shape), start, end)


def _are_counts(values: object) -> bool:
    """Whether values from a file are a list of integers from 0 up, of 64 bits."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _refused(path: str | os.PathLike, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as a safetensors file: {reason}")


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors; a file of that name is replaced only by a complete one.

    The same tensors and texts give the same bytes.

    Args:
        tensors: by name; on any device, contiguous or not.
        metadata: texts by name.  {"format": "pt"}, for which other readers ask, is always there.
    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    contents = memoryview(save(_apart(tensors)))
    end = 8 + int.from_bytes(contents[:8], "little")
    # The package writes metadata in an order that changes from call to call.
    texts = {"format": "pt", **(metadata or {})}
    header = {_METADATA: dict(sorted(texts.items())), **json.loads(bytes(contents[8:end]))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(contents[end:])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as the format needs them."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone(memory_format=torch.contiguous_format)
        seen.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart
