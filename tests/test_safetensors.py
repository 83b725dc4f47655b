"""Files of the safetensors format: read as they were written, refused where they are hostile."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open

from score_lib.disk import safetensors_files
from score_lib.disk.fit import CheckpointError
from score_lib.disk.safetensors_files import read_header, read_safetensors, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def a_file(path, header, data=24, *, length=None):
    """A file with some header, a dict or text, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(length + text + bytes(data))
    return path


def changed(**properties):
    return {"a": ENTRY | properties}


HOSTILE = {
    "empty": (b"", 0),
    "no JSON": (b"{", 24),
    "no text": (b"\xff\xfe\x00", 24),
    "deep": (b"[" * 200_000, 24),
    "a list": ([], 24),
    "a number": (b"1" * 5000, 24),
    "double names": (b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), 24),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": ENTRY}, 24),
    "metadata that is a list": ({"__metadata__": [], "a": ENTRY}, 24),
    "no dtype": ({"a": {"shape": [2, 3], "data_offsets": [0, 24]}}, 24),
    "more properties": (changed(code="print()"), 24),
    "an entry that is a list": ({"a": [1]}, 24),
    "unknown dtype": (changed(dtype="F31"), 24),
    "a dtype that is a list": (changed(dtype=["F32"]), 24),
    "negative shape": (changed(shape=[-2, -3]), 24),
    "fractional shape": (changed(shape=[2.0, 3]), 24),
    "a truth value in the shape": (changed(shape=[True, 6]), 24),
    "a shape that is too large": (changed(shape=[2, 4]), 24),
    "a shape that overflows": (changed(shape=[2**62, 2**62, 4]), 24),
    "a shape of very many sides": (changed(shape=[2**62] * 5000), 24),
    "a shape beyond 64 bits": (changed(shape=[2**64, 0], data_offsets=[0, 0]), 0),
    "a nan": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', 24),
    "three offsets": (changed(data_offsets=[0, 12, 24]), 24),
    "offsets backwards": (changed(data_offsets=[24, 0]), 24),
    "offsets beyond the file": (changed(data_offsets=[2**40, 2**40 + 24]), 24),
    "cut off": (changed(), 23),
    "something behind": (changed(), 25),
    "a gap": (changed(data_offsets=[8, 32]), 32),
    "overlapping": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 36]}}, 36),
    "the same place": ({"a": ENTRY, "b": ENTRY}, 24),
    "1 EB": (changed(shape=[2**58], data_offsets=[0, 2**60]), 24),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_before_a_tensor_is_read(case, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        read_header(a_file(tmp_path / "a.safetensors", *HOSTILE[case]))


def test_header_lengths(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    for length in (2**64 - 1, 2**63, 10_000):
        with pytest.raises(CheckpointError, match="should end within its"):
            read_safetensors(a_file(path, changed(), length=length))
    path.write_bytes(b"\0" * 7)
    with pytest.raises(CheckpointError, match="its 7 bytes"):
        read_safetensors(path)
    size = len(json.dumps(changed()))
    for longest, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(safetensors_files, "LONGEST_HEADER", longest)
        if fits:
            read_header(a_file(path, changed()))
        else:
            with pytest.raises(CheckpointError, match=f"at most {longest} bytes"):
                read_header(a_file(path, changed()))


def test_tensors_and_metadata_come_back(tmp_path):
    path, whole = tmp_path / "new" / "a.safetensors", torch.randn(4, 6)
    tensors = {
        "transposed": whole.mT,
        "part": whole[1:3],
        "again": whole,
        "once more": whole,
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        **{str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)},
        "double": torch.randn(3, dtype=torch.float64),
    }
    write_safetensors(path, tensors, {"license": "none"})
    found, metadata = read_safetensors(path)
    assert metadata == {"format": "pt", "license": "none"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert read_header(path)[0][name].shape == tensor.shape
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_contents_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.zeros(2, dtype=torch.float16)}
    texts = {str(k): "ä" * k for k in range(8)}
    written = []
    for order in (1, -1) * 3:
        write_safetensors(tmp_path / "a", tensors, dict(list(texts.items())[::order]))
        written.append((tmp_path / "a").read_bytes())
    assert len({*written}) == 1 and int.from_bytes(written[0][:8], "little") % 8 == 0
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **texts}
        assert torch.equal(file.get_tensor("b"), tensors["b"])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "a.safetensors")
