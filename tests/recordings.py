"""The recorded figures of `tests/data`."""

from __future__ import annotations

import functools
import json
import pathlib

import numpy as np
import torch

DATA = pathlib.Path(__file__).parent / "data"


def load_json(name: str) -> dict:
    """A table."""
    return json.loads((DATA / name).read_text())


@functools.cache
def load_tensors(name: str) -> dict[str, torch.Tensor]:
    """The arrays of an .npz, by name."""
    with np.load(DATA / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}
