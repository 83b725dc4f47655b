"""Of two methods that say the same in two forms, the one that is defined nearest counts.

A subclass may override either of them.  `derive` then gives it the other one.
"""

import functools
from collections.abc import Callable
from typing import Any


def place(cls: type, *names: str) -> int:
    """Place, in the order of inheritance, of the nearest class that defines one of the names.

    0 is the class itself.  Methods that `derive` has put into a class are not defined there.
    """
    order = cls.__mro__
    found = (i for i, base in enumerate(order) if any(_defines(base, name) for name in names))
    return next(found, len(order))


def _defines(cls: type, name: str) -> bool:
    return name in vars(cls) and getattr(vars(cls)[name], "derived_in", None) is not cls


def derive(cls: type, name: str, formula: Callable, *sources: str) -> None:
    """Give a class a method by a formula, if one of its sources is defined nearer.

    Args:
        formula: a function like the method, which may ask its `self` for the sources.
    """
    if place(cls, *sources) >= place(cls, name):
        return

    def method(self, *given, **named):
        return formula(AsIn(self, cls), *given, **named)

    functools.update_wrapper(method, formula, updated=())
    method.__name__, method.__qualname__ = name, f"{cls.__qualname__}.{name}"
    method.derived_in = cls
    setattr(cls, name, method)


class AsIn:
    """A view of an object in which methods are those of one of its classes, and of the bases of it.

    An override further down calls the method that it overrides, by `super()`: if that asked the
    whole object, it would come back to the override.  Attributes of the object itself stay.
    """

    def __init__(self, whole: object, cls: type):
        self._whole, self._cls = whole, cls

    def __getattr__(self, name: str) -> Any:
        order = type(self._whole).__mro__
        nearer = order[: order.index(self._cls)] if self._cls in order else ()
        if not nearer or name in vars(self._whole):
            return getattr(self._whole, name)
        return getattr(super(nearer[-1], self._whole), name)

    def __repr__(self) -> str:
        return repr(self._whole)
