"""Damaged files of a work directory, and weights that are not Inception's."""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Iterator

import numpy as np

from configs.defaults import load
from score_lib.disk.files import open_folder
from score_lib.disk.logs import MetricsLog
from score_lib.metrics.inception import FidelityInception
from score_lib.runs.evaluate import check_folder

from .bad_checkpoints import saved_bytes
from .bad_zips import GIB, Entry, archive_of, deflated_zeros
from .cases import Case, Command, digest, written

DEEP = b"[" * 10**6
GOOD_LINE = b'{"step": 1, "training_loss": 0.5}\n'


def cases() -> Iterator[Case]:
    """All of them."""
    for name, data in _JSON.items():
        yield Case("config.json of an evaluation", name, _evaluated(data), _check)
        yield Case("config.json of a run", name, written("config.json", data), _open, "read")
    for name, data in _LINES.items():
        make = written("metrics.jsonl", GOOD_LINE + data)
        yield Case("metrics.jsonl", name, make, _resume, "read")
    for name, data in _weights().items():
        yield Case("Inception weights", name, written("w.pth", data), _inception)
    yield Case("Inception weights", "a program", _program, _inception)


_JSON = {
    "empty": b"",
    "cut": b'{"seed": 42, "data": {"data',
    "text": b"not JSON",
    "a list": b"[1, 2]",
    "a number": b"3",
    "no text": b"\xff\xfe\x00\x01" * 20,
    "lists in lists": DEEP,
}
_LINES = {
    "cut": b'{"step": 2, "trai',
    "text": b"not JSON\n",
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "no step": b'{"loss": 1}\n',
    "a step of text": b'{"step": "2"}\n',
    "a step of null": b'{"step": null}\n',
    "a step of nan": b'{"step": NaN}\n',
    "no text": b"\xff\xfe\x00\x01\n",
    "lists in lists": DEEP + b"\n",
    "a number of 10,000 digits": b'{"step": 1' + b"0" * 10_000 + b"}\n",
    "zeros": bytes(10**6),
}


def _evaluated(data: bytes):
    def make(folder: pathlib.Path) -> pathlib.Path:
        np.savez(folder / "ckpt_1_loss.npz", all_losses=np.zeros(3))
        (folder / "config.json").write_bytes(data)
        return folder / "config.json"

    return make


def _check(path: pathlib.Path) -> str:
    check_folder(load("vp/digits"), path.parent)
    return ""


def _open(path: pathlib.Path) -> str:
    """A damaged record of the config is replaced, as one of other options is."""
    open_folder(path.parent, load("vp/digits"))
    assert path.read_text().startswith("{")
    return ""


def _resume(path: pathlib.Path) -> str:
    """A damaged line is dropped, as one is that was cut short; the others stay."""
    with MetricsLog(path.parent, step=5) as log:
        log.write(6, training_loss=0.25)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines == [GOOD_LINE, b'{"step": 6, "training_loss": 0.25}\n'], lines
    return digest(lines)


def _weights() -> dict[str, bytes]:
    stream = deflated_zeros(GIB)
    listed = pickle.dumps({}, 2)
    bomb = Entry("a/data.pkl", listed, len(listed), 0), Entry("a/data/0", stream, GIB)
    return {
        "empty": b"",
        "text": b"not weights\n" * 100,
        "a list": saved_bytes([1, 2]),
        "other weights": saved_bytes({"conv.weight": np.float64(3)}),
        "a bomb": archive_of(*bomb),
    }


def _program(folder: pathlib.Path) -> pathlib.Path:
    (folder / "w.pth").write_bytes(saved_bytes({"a": Command(folder)}))
    return folder / "w.pth"


def _inception(path: pathlib.Path) -> str:
    FidelityInception(str(path))
    return ""
