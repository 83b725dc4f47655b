"""What the value of an option may be: its kind, and a range or choices."""

from __future__ import annotations

import numbers as kinds
from collections.abc import Callable
from typing import NamedTuple


class Check(NamedTuple):
    """Which values an option takes.

    Attributes:
        allowed: the values in words, such as "a whole number, at least 1".
        accepts: whether a value is one of them.
        names: the names that this project knows, of an option that users may add names to.
    """

    allowed: str
    accepts: Callable[[object], bool]
    names: tuple[str, ...] = ()


def _is_whole(value: object) -> bool:
    return isinstance(value, kinds.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, kinds.Real) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


flag = Check("True or False", lambda value: isinstance(value, bool))
whole = Check("a whole number", _is_whole)
number = Check("a number", _is_number)
text = Check("a text", lambda value: isinstance(value, str))
numbers = Check("several numbers, such as (1, 2)", _are_numbers)
# A torch.device has a text, and this module needs no torch.
device = Check("'auto', 'cpu', 'cuda' or 'cuda:1'", lambda value: bool(str(value)))
side = Check(
    "a whole number, at least 1, or two of them",
    lambda value: (
        all(_is_whole(n) and n >= 1 for n in value) and len(value) == 2
        if isinstance(value, list | tuple)
        else _is_whole(value) and value >= 1
    ),
)


def at_least(bound: float) -> Check:
    """Values from a bound up; as of all bounds, a whole one asks for whole numbers."""
    return _within(bound, f", at least {bound:g}", lambda value: value >= bound)


def above(bound: float) -> Check:
    """Values larger than a bound."""
    return _within(bound, f" above {bound:g}", lambda value: value > bound)


def between(low: float, high: float) -> Check:
    """Values from one bound to another, both of them included."""
    return _within(low, f" from {low:g} to {high:g}", lambda value: low <= value <= high)


def from_to_below(low: float, high: float) -> Check:
    """Values from one bound to another, which is not included."""
    return _within(low, f" from {low:g} to below {high:g}", lambda value: low <= value < high)


def counts(least: int = 1) -> Check:
    """One whole number or more, each from a bound up."""
    return Check(
        f"one or more whole numbers, at least {least}, such as (1, 2)",
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) > 0
            and all(_is_whole(entry) and entry >= least for entry in value)
        ),
    )


def one_of(*choices: str) -> Check:
    """These texts and no others."""
    return Check(_listed(choices), lambda value: isinstance(value, str) and value in choices)


def name(known: str, empty: bool = False) -> Check:
    """A name that is looked up where it is used, for users may add to the known ones.

    Args:
        known: names, with spaces between them.
        empty: whether "" has a meaning, too.
    """
    names = tuple(known.split())
    return Check(f"a name: {_listed(('',) * empty + names)}", text.accepts, names)


def _within(bound: float, words: str, holds: Callable[[float], bool]) -> Check:
    kind = whole if isinstance(bound, int) else number
    return Check(f"{kind.allowed}{words}", lambda value: kind.accepts(value) and holds(value))


def _listed(choices: tuple[str, ...]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last
