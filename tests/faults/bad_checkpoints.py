"""Checkpoints: damaged, that hold programs, claim sizes, or are of the wrong types inside."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch

from models.ema import ExponentialMovingAverage
from score_lib.disk.checkpoints import restore_checkpoint, save_checkpoint

from .bad_zips import GIB, Entry, archive_of, deflated_zeros, zipped
from .cases import Case, Command, digest, flips_and_cuts, written

WIDTH = 4


def cases() -> Iterator[Case]:
    """All cases."""

    def good(folder: pathlib.Path) -> pathlib.Path:
        save_checkpoint(folder / "c.pth", {**state(), "position": 48, "config": "{}"})
        return folder / "c.pth"

    yield from flips_and_cuts("checkpoint", good, restore, 25, 10, "refused or same")
    for name, make in _PROGRAMS.items():
        yield Case("checkpoint: programs", name, make, restore)
    for name, data in _files().items():
        yield Case("checkpoint: foreign files", name, written("c.pth", data), restore)
    for name, make in _SIZES.items():
        yield Case("checkpoint: sizes that lie", name, make, restore)
    for name, change in _CHANGES.items():
        yield Case("checkpoint: wrong contents", name, _changed(change), restore)


def state(seed: int = 0) -> dict:
    """A small training state, after one step."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer.step()
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    return {"model": model, "ema": ema, "optimizer": optimizer, "step": 3}


def restore(path: pathlib.Path) -> str:
    """Load a checkpoint into a fresh state, which must stay unchanged if that fails."""
    fresh = {**state(seed=1), "position": 0}
    before = _summary(fresh)
    try:
        restored = restore_checkpoint(path, fresh, "cpu", must_exist=True)
    except BaseException:
        assert _summary(fresh) == before, "a part of the state was changed"
        raise
    restored["optimizer"].step()
    return _summary(restored)


def _summary(state: dict) -> str:
    optimizer = state["optimizer"].state_dict()
    moments = [value for kept in optimizer["state"].values() for value in kept.values()]
    average = state["ema"].state_dict()
    weights = state["model"].state_dict().values()
    settings = optimizer["param_groups"], average["decay"], average["num_updates"]
    return digest(
        *moments, *average["shadow_params"], *weights, settings, state["step"], state["position"]
    )


def contents() -> dict:
    """The contents of a checkpoint of `state`."""
    parts = {
        key: getattr(value, "state_dict", lambda v=value: v)() for key, value in state().items()
    }
    return copy.deepcopy(parts)


# --- Programs -------------------------------------------------------------------------------------


def _plain(protocol: int) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        parts = {**contents(), "model": Command(folder)}
        (folder / "c.pth").write_bytes(pickle.dumps(parts, protocol))
        return folder / "c.pth"

    return make


def _torch(place: str, legacy: bool) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        parts = contents()
        if place == "deep":
            parts["optimizer"]["param_groups"][0]["lr"] = Command(folder)
        else:
            parts[place] = Command(folder)
        torch.save(parts, folder / "c.pth", _use_new_zipfile_serialization=not legacy)
        return folder / "c.pth"

    return make


def _tarred(folder: pathlib.Path) -> pathlib.Path:
    """The layout of PyTorch before 0.1.10, with a name that leads out of the folder."""
    with tarfile.open(folder / "c.pth", "w") as file:
        for name in ("storages", "tensors", "pickle", "../escape"):
            data = pickle.dumps(Command(folder))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return folder / "c.pth"


def _scripted(folder: pathlib.Path) -> pathlib.Path:
    function = torch.jit.trace(torch.sin, torch.zeros(3))
    torch.jit.save(function, str(folder / "c.pth"))
    return folder / "c.pth"


def _global(line: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    """A pickle that fetches a function by name and calls it with one text."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        text = str(folder / "canary").encode()
        program = b"\x80\2c" + line + b"(X" + struct.pack("<I", len(text)) + text + b"tR."
        _repack(folder / "c.pth", lambda name, data: program if name.endswith("data.pkl") else data)
        return folder / "c.pth"

    return make


_PROGRAMS = {
    **{f"pickle of protocol {k}": _plain(k) for k in range(6)},
    **{f"zip, as {place}": _torch(place, False) for place in ("model", "step", "other", "deep")},
    **{f"legacy, as {place}": _torch(place, True) for place in ("model", "step", "deep")},
    "tar": _tarred,
    "TorchScript": _scripted,
    "os.mkdir": _global(b"os\nmkdir\n"),
    "builtins.exec": _global(b"builtins\nexec\n"),
    "builtins.getattr": _global(b"builtins\ngetattr\n"),
    "torch.load": _global(b"torch.serialization\nload\n"),
    "torch.hub.load": _global(b"torch.hub\nload\n"),
    "np.load": _global(b"numpy\nload\n"),
}


def _files() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"not a checkpoint\n" * 100,
        "zeros": bytes(10_000),
        "zip of nothing": zipped({}),
        "zip of text": zipped({"a.txt": b"text"}, zipfile.ZIP_STORED),
        "safetensors": struct.pack("<Q", 2**60) + b'{"a": 1}',
        "only the mark of a zip": b"PK\3\4",
        "only the mark of a pickle": b"\x80\2",
        "lists in lists": b"\x80\2" + b"(" * 10**6 + b"l" * 10**6 + b".",
        "a text that is too long": b"\x80\4\x8d" + struct.pack("<Q", 2**60) + b"a.",
        "a number that is too long": b"\x80\2\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
        "bytes before its first record": b"PK\3\4" + bytes(60) + saved_bytes(contents()),
        "bytes behind its last record": saved_bytes(contents()) + bytes(30),
        "a list": saved_bytes([1, 2]),
        "a tensor": saved_bytes(torch.zeros(3)),
        "weights alone": saved_bytes(contents()["model"]),
        "another layout": saved_bytes({"state_dict": {}, "epoch": 3}),
    }


def saved_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _changed(change: Callable[[dict], None]) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        parts = contents()
        change(parts)
        torch.save(parts, folder / "c.pth")
        return folder / "c.pth"

    return make


# --- Sizes ----------------------------------------------------------------------------------------


def _repack(path: pathlib.Path, change, method: int = zipfile.ZIP_STORED) -> pathlib.Path:
    """A checkpoint whose records were changed: `change(name, data) -> data`."""
    with zipfile.ZipFile(io.BytesIO(saved_bytes(contents()))) as file:
        records = {name: change(name, file.read(name)) for name in file.namelist()}
    path.write_bytes(zipped(records, method))
    return path


def _compressed(folder: pathlib.Path) -> pathlib.Path:
    return _repack(folder / "c.pth", lambda name, data: data, zipfile.ZIP_DEFLATED)


def _bomb(folder: pathlib.Path) -> pathlib.Path:
    stream, program = deflated_zeros(GIB), pickle.dumps({}, 2)
    parts = (
        Entry("archive/data.pkl", program, len(program), 0),
        Entry("archive/data/0", stream, GIB),
    )
    (folder / "c.pth").write_bytes(archive_of(*parts))
    return folder / "c.pth"


def _shared(folder: pathlib.Path) -> pathlib.Path:
    """A thousand records that are the same megabyte."""
    zeros = bytes(1 << 20)
    entry = Entry("archive/data.pkl", zeros, len(zeros), 0)
    (folder / "c.pth").write_bytes(archive_of(entry, copies=1000, suffix=""))
    return folder / "c.pth"


def _longer(folder: pathlib.Path) -> pathlib.Path:
    """Storages that claim 2^33 numbers each."""

    def change(name: str, data: bytes) -> bytes:
        claim = b"\x8a\x05" + (2**33).to_bytes(5, "little")
        return data.replace(b"K\x10t", claim + b"t") if name.endswith("data.pkl") else data

    return _repack(folder / "c.pth", change)


def _legacy(numel: int) -> Callable[[pathlib.Path], pathlib.Path]:
    """The older format, in which a size precedes each storage."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        file = io.BytesIO()
        torch.save(contents(), file, _use_new_zipfile_serialization=False)
        size = (numel.bit_length() + 8) // 8
        claim = b"\x8a" + bytes([size]) + numel.to_bytes(size, "little", signed=True)
        (folder / "c.pth").write_bytes(file.getvalue().replace(b"K\x10N", claim + b"N"))
        return folder / "c.pth"

    return make


_SIXTEEN = torch.storage.TypedStorage(
    wrap_storage=torch.zeros(16).untyped_storage(), dtype=torch.float32, _internal=True
)


class Viewed:
    """A tensor with any size, strides and offset, on a storage of 16 numbers."""

    def __init__(self, size: tuple, stride: tuple, offset: int = 0):
        self.arguments = _SIXTEEN, offset, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Kind:
    """A NumPy type, made by a call: its own pickle is refused anyway."""

    def __init__(self, kind: str):
        self.kind = kind

    def __reduce__(self):
        return np.dtype, (self.kind,)


class OfNumPy:
    """A NumPy scalar of any type, which is all zeros."""

    def __init__(self, kind: str):
        self.kind = kind

    def __reduce__(self):
        return np._core.multiarray.scalar, (Kind(self.kind),)


class Zeros:
    """Zero bytes, made by a call."""

    def __reduce__(self):
        return bytearray, (8 * GIB,)


def _with_first_weight(value: object) -> Callable[[pathlib.Path], pathlib.Path]:
    def change(parts: dict) -> None:
        parts["model"]["0.weight"] = value

    return _changed(change)


_SIZES = {
    "compressed records": _compressed,
    "a record that unpacks to 1 GB": _bomb,
    "one megabyte under 1000 names": _shared,
    "storages of 32 GB": _longer,
    "legacy storages of 32 GB": _legacy(2**33),
    "legacy storages of 2^63 bytes": _legacy(2**61),
    "legacy storages below 0": _legacy(-16),
    "10^12 numbers in one": _with_first_weight(Viewed((10**6, 10**6), (0, 0))),
    "strides beyond the end": _with_first_weight(Viewed((WIDTH, WIDTH), (100, 1))),
    "an offset beyond the end": _with_first_weight(Viewed((WIDTH, WIDTH), (4, 1), 10**9)),
    "an offset before the start": _with_first_weight(Viewed((WIDTH, WIDTH), (4, 1), -5)),
    "strides below 0": _with_first_weight(Viewed((WIDTH, WIDTH), (-4, 1))),
    "a size below 0": _with_first_weight(Viewed((-WIDTH, WIDTH), (4, 1))),
    "NumPy scalar of 2 GB": _with_first_weight(OfNumPy("V2000000000")),
    "NumPy text of 2 GB": _with_first_weight(OfNumPy("U500000000")),
    "8 GB of bytes": _with_first_weight(Zeros()),
}


# --- Contents -------------------------------------------------------------------------------------


def _quietly(make: Callable, *arguments) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds that PyTorch calls unfinished or out of date
        return make(*arguments)


def _put(value: object, *keys) -> Callable[[dict], None]:
    """A change: this value in that place."""

    def change(parts: dict) -> None:
        for key in keys[:-1]:
            parts = parts[key]
        parts[keys[-1]] = value

    return change


def _removed(*keys) -> Callable[[dict], None]:
    def change(parts: dict) -> None:
        for key in keys[:-1]:
            parts = parts[key]
        del parts[keys[-1]]

    return change


_SQUARE = torch.ones(WIDTH, WIDTH)
_MOMENT = "optimizer", "state", 0, "exp_avg"
_GROUP = "optimizer", "param_groups", 0
_CHANGES = {
    **{
        f"{key} that is {name}": _put(value, key)
        for key in ("model", "ema", "optimizer", "step")
        for name, value in {"None": None, "a list": [1], "text": "3x", "nan": float("nan")}.items()
    },
    **{f"no {key}": _removed(key) for key in ("model", "ema", "optimizer", "step")},
    "step -1": _put(-1, "step"),
    "step 2^70": _put(2**70, "step"),
    "step 1.5": _put(1.5, "step"),
    "step of many": _put(torch.arange(3), "step"),
    "position -1": _put(-1, "position"),
    "position of text": _put("48", "position"),
    "config that is a list": _put([1], "config"),
    "keys that are numbers": _put({0: _SQUARE, 1: _SQUARE}, "model"),
    "a key with control characters": _put(_SQUARE, "model", "a\n\x1b[2Jb"),
    "weights of whole numbers": _put(_SQUARE.long(), "model", "0.weight"),
    "complex weights": _put(_SQUARE.to(torch.complex64), "model", "0.weight"),
    "sparse weights": _put(_SQUARE.to_sparse(), "model", "0.weight"),
    "compressed sparse weights": _put(_quietly(_SQUARE.to_sparse_csr), "model", "0.weight"),
    "quantised weights": _put(
        _quietly(torch.quantize_per_tensor, _SQUARE, 0.1, 0, torch.qint8), "model", "0.weight"
    ),
    "weights without values": _put(_SQUARE.to("meta"), "model", "0.weight"),
    "weights that are text": _put("abc", "model", "0.weight"),
    "weights that are a list": _put([[1.0]], "model", "0.weight"),
    "averages None": _put(None, "ema", "shadow_params"),
    "averages that are text": _put("abcd", "ema", "shadow_params"),
    "averages that are one tensor": _put(_SQUARE, "ema", "shadow_params"),
    "averages of nothing": _put([None] * 4, "ema", "shadow_params"),
    "averages of whole numbers": _put(_SQUARE.long(), "ema", "shadow_params", 0),
    "averages without values": _put(_SQUARE.to("meta"), "ema", "shadow_params", 0),
    "sparse averages": _put(_SQUARE.to_sparse(), "ema", "shadow_params", 0),
    "a decay of nan": _put(float("nan"), "ema", "decay"),
    "a decay of 2": _put(2.0, "ema", "decay"),
    "a decay of text": _put("0.9", "ema", "decay"),
    "updates of text": _put("1", "ema", "num_updates"),
    "updates of nan": _put(float("nan"), "ema", "num_updates"),
    "-5 updates": _put(-5, "ema", "num_updates"),
    "groups None": _put(None, "optimizer", "param_groups"),
    "groups of text": _put(["a"], "optimizer", "param_groups"),
    "a group of text": _put("0123", *_GROUP, "params"),
    "parameters twice": _put([0, 0, 1, 2], *_GROUP, "params"),
    "parameters by names": _put(list("abcd"), *_GROUP, "params"),
    "a learning rate of text": _put("fast", *_GROUP, "lr"),
    "a learning rate of nan": _put(float("nan"), *_GROUP, "lr"),
    "one beta": _put((0.9,), *_GROUP, "betas"),
    "betas None": _put(None, *_GROUP, "betas"),
    "no state": _removed("optimizer", "state"),
    "a state of text": _put("abc", "optimizer", "state"),
    "a state of no parameter": _put({99: {}}, "optimizer", "state"),
    "a moment of another shape": _put(torch.ones(2, 3), *_MOMENT),
    "a moment of 10^12": _put(torch.zeros(1).expand(10**6, 10**6), *_MOMENT),
    "a moment of text": _put("abc", *_MOMENT),
    "a moment without values": _put(_SQUARE.to("meta"), *_MOMENT),
    "a sparse moment": _put(_SQUARE.to_sparse(), *_MOMENT),
    "a moment None": _put(None, *_MOMENT),
    "a moment missing": _removed(*_MOMENT),
    "a count of steps of text": _put("3", "optimizer", "state", 0, "step"),
}
