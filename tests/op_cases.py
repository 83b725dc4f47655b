"""Inputs for tests of the kernels in `op/`."""

from __future__ import annotations

import ctypes
import random
import re
from types import ModuleType

import torch

CPU = torch.device("cpu")


def random_tensor(*shape: int, seed: int = 0, dtype=torch.float64, device=CPU) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def some_resamplings(count: int) -> list[tuple]:
    """Shapes, filters, factors and paddings, some of them with a kernel of their own."""
    draw, found = random.Random(0), []
    while len(found) < count:
        shape = [draw.randint(1, 3), draw.randint(1, 4), *(draw.randint(3, 9) for _ in range(2))]
        taps = draw.choice([(4, 4), (4, 4), (draw.randint(1, 6), draw.randint(1, 6))])
        up, down = draw.choice([(1, 1), (2, 1), (1, 2), (draw.randint(1, 4), draw.randint(1, 4))])
        pad = [draw.randint(-2, 5) for _ in range(4)]
        sides = (pad[2] + pad[3], pad[0] + pad[1])
        if all(n * up + s >= k for n, s, k in zip(shape[2:], sides, taps, strict=True)):
            found.append((shape, taps, up, down, pad))
    return found


def check_types(library: ModuleType) -> None:
    """ctypes does not see C's declarations, and passes what is too much as 32-bit numbers."""
    interface = library.SOURCE.read_text().partition('extern "C"')[2]
    found = re.findall(r"^(?:void|const char\*) (\w+)\(([^)]*)\) {$", interface, re.M)
    assert dict(found).keys() == library._FUNCTIONS.keys()
    types = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
    for name, parameters in found:
        expected = [
            ctypes.c_void_p if "*" in parameter else types[parameter.split()[0]]
            for parameter in parameters.split(",")
        ]
        assert library._FUNCTIONS[name] == expected, name
