"""Registries: from a name in a config to an object.

An entry is a builder and the options that feed its keywords:

    @register_predictor(name="mine", options={"order": "sampling.my_order"})
    class Mine(Predictor): ...

`build(name, config, ...)` then reads `config.sampling.my_order` into `order`.
"""

import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A registered class or function, and how a config builds from it."""

    value: Any
    build: Callable
    options: Mapping[str, str]
    yields: bool


class Registry:
    """Named classes or functions of one kind, such as "predictor" or "model".

    Args:
        kind: of an entry, for messages.
        options: keyword of the builder -> dotted name of the option that feeds it, for entries
            that name none of their own.
    Attributes:
        fed_by: dotted names of the options that feed any entry of any registry.
    """

    fed_by: set[str] = set()

    def __init__(self, kind: str, options: Mapping[str, str] | None = None):
        self.kind, self.options = kind, options or {}
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        cls: Any = None,
        *,
        name: str | None = None,
        options: Mapping[str, str] | None = None,
        build: Callable | None = None,
        yields: bool = False,
    ) -> Any:
        """Decorator, with or without arguments.

        Args:
            cls: a class or a function.
            name: default: its own name.
            options: see `Registry`.
            build: called to build from a config; default: the class or function itself.
            yields: whether the entry makes way for another of its name, which published code does
                not have, so that projects may use it for their own.
        Raises:
            ValueError: the name is taken by something else, perhaps in another case.
        """

        def add(value):
            key = name or value.__name__
            self._make_way(key, value)
            known = self._entries.get(key)
            if known is not None and _identity(known.value) != _identity(value):
                raise ValueError(f"{self.kind} {key!r} is already registered as {known.value!r}")
            if same := [k for k in self._entries if k != key and k.lower() == key.lower()]:
                raise ValueError(
                    f"{self.kind} {key!r} differs only in case from {same[0]!r}, and names are "
                    "taken in any case: choose another one"
                )
            feeds = self.options if options is None else options
            self._entries[key] = Entry(value, build or value, feeds, yields)
            self.fed_by.update(feeds.values())
            return value

        return add if cls is None else add(cls)

    def _make_way(self, name: str, value: Any) -> None:
        """Remove an entry of the name that yields to others than itself."""
        for key, known in list(self._entries.items()):
            same_name = known.yields and key.lower() == name.lower()
            if same_name and _identity(known.value) != _identity(value):
                logging.warning("%s %r is now %r, not %r", self.kind, key, value, known.value)
                del self._entries[key]

    def get(self, name: str) -> Any:
        """The class or function of a name, as written or, failing that, in any case.

        Raises:
            ValueError: no such name; the message lists the known ones and the closest.
        """
        return self._entry(name).value

    def feeds(self, name: str) -> Mapping[str, str]:
        """Keyword of the builder -> dotted name of the option that feeds it.

        Raises:
            ValueError: no such name.
        """
        return self._entry(name).options

    def build(self, name: str, config, *args, **keywords) -> Any:
        """An object as a config describes it.

        Args:
            config: complete, see `score_lib.options.complete`.
            args, keywords: of the builder; keywords take precedence over options.
        Raises:
            ValueError: no such name, or the config lacks an option.
        """
        entry = self._entry(name)
        given = {key: self._read(config, option, name) for key, option in entry.options.items()}
        return entry.build(*args, **{**given, **keywords})

    def _entry(self, name: str) -> Entry:
        if name in self._entries:
            return self._entries[name]
        found = [key for key in self._entries if key.lower() == str(name).lower()]
        if len(found) != 1:
            close = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self)
            raise ValueError(f"unknown {self.kind} {name!r}: known are {known}{hint}")
        return self._entries[found[0]]

    def _read(self, config, option: str, name: str) -> Any:
        try:
            return functools.reduce(getattr, option.split("."), config)
        except AttributeError as error:
            raise ValueError(
                f"{self.kind} {name!r} needs the option config.{option}, which is missing"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def _identity(value: Any) -> tuple[str, str]:
    # A module that is loaded twice (a notebook reloads it) registers the same class again.
    return value.__module__, value.__qualname__
