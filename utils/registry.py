"""Registries turn the names in a config into classes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator


class Registry:
    """Names and what they stand for; one per kind of thing (`"predictor"`, `"model"`, ...)."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, type] = {}

    def register(self, cls: type | None = None, *, name: str | None = None) -> Callable:
        """Class decorator, with or without a name; the class's own name is the default.

        Raises:
            ValueError: the name is taken by another class.
        """

        def add(cls):
            key = name or cls.__name__
            known = self._entries.get(key)
            if known is not None and _identity(known) != _identity(cls):
                raise ValueError(f"{self.kind} {key!r} is already registered as {known!r}")
            self._entries[key] = cls
            return cls

        return add if cls is None else add(cls)

    def get(self, name: str) -> type:
        """The class registered under a name.

        Raises:
            ValueError: no such name; the message lists the known ones and the closest.
        """
        if name not in self._entries:
            close = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self)
            raise ValueError(f"unknown {self.kind} {name!r}: known are {known}{hint}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def _identity(cls: type) -> tuple[str, str]:
    # A module that is loaded twice (a notebook reloads it) registers the same class again.
    return cls.__module__, cls.__qualname__
