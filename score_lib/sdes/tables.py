"""Tables of a process, made when they are first looked up."""

from functools import cached_property

from torch import Tensor


class Table(cached_property):
    """A table of a process, (N,), which keeps those that it makes apart.

    A value that is set on a process, as published classes do in `__init__`, takes its place.
    """

    def __get__(self, process: object | None, owner: type | None = None) -> Tensor:
        if process is None:
            return self
        if self.attrname not in vars(process).get("_made", {}):
            value = self.func(process)
            # Not into the old dictionary, which copies of the process share.
            process._made = {**vars(process).get("_made", {}), self.attrname: value}
        return process._made[self.attrname]


def own_tables(process: object) -> list[str]:
    """Names of the tables whose values were set on a process."""
    return [name for name in vars(process) if _kind(process, name) is Table]


def made_values(process: object) -> list[str]:
    """Names of the attributes of a process that are made again after its number of steps changes.

    Classes of users may have tables that are cached properties.
    """
    cached = [name for name in vars(process) if _kind(process, name) is cached_property]
    return cached + [name for name in ("_moved", "_made") if name in vars(process)]


def _kind(process: object, name: str) -> type:
    return type(getattr(type(process), name, None))
