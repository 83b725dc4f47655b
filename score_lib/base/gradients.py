"""Gradients by an input: whether there is one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


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


def check_gradient(what: str, fn: Callable, x: Tensor, t: Tensor, value: Tensor) -> None:
    """Refuse a function without a gradient by x, unless it is constant.

    Args:
        what: its name in the error.
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
            f"{what} gives no gradient, which the likelihood needs, although it changes with x: "
            "compute it in PyTorch, without torch.no_grad() and without detach()"
        )
