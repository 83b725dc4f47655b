"""Gradients by an input: where they are recorded, and whether there is one."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


@contextlib.contextmanager
def recording(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Gradients are recorded, also inside of `torch.no_grad` and `torch.inference_mode`.

    Gives the inputs, or copies of those that were made in `torch.inference_mode`, which a backward
    pass cannot use.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield tuple(x.clone() if x.is_inference() else x for x in inputs)


def _reaches(value: Tensor, x: Tensor) -> bool:
    """Whether a backward pass from `value` comes to x."""
    if not (value.requires_grad and x.requires_grad):
        return False
    wanted = get_gradient_edge(x).node
    left, seen = [get_gradient_edge(value).node], set()
    while left:
        node = left.pop()
        if node is wanted:
            return True
        if node not in seen:
            seen.add(node)
            left.extend(before for before, _ in node.next_functions if before is not None)
    return False


def check_gradient(name: str, fn: Callable, x: Tensor, t: Tensor, value: Tensor) -> None:
    """Refuse a function without a gradient by x, unless it is constant.

    Args:
        name: of the function, for the error.
        fn: function of (x, t); called again only if it gave no gradient.
        value: fn(x, t), where gradients are enabled.
    Raises:
        ValueError: no gradient comes to x, but elsewhere the value is another.
    """
    if _reaches(value, x):
        return
    with torch.no_grad():
        elsewhere = fn(x + 0.1, t)
    if not torch.equal(elsewhere, value):
        raise ValueError(
            f"{name} gives no gradient, which the likelihood needs, although it changes with x: "
            "compute it in PyTorch, without torch.no_grad() and without detach()"
        )
