"""The error of files of other libraries."""

import json
from collections.abc import Iterable

from score_lib.disk.files import printable
from score_lib.disk.fit import CheckpointError


class ExchangeError(CheckpointError):
    """A model of another library cannot be read, or one of ours not be written for it.

    The message is one sentence that says why.
    """


def shown(value: object) -> str:
    """A value of a JSON file, as it is there, for a message; a long one is cut."""
    return printable(json.dumps(value), 80)


def wrong_value(path, name: str, value: object, allowed: str) -> ExchangeError:
    """The error for an option in a file that is not one of the allowed values."""
    return ExchangeError(f"{path} has {name} = {shown(value)}, which should be {allowed}")


def wrong_class(path, kind: object, known: Iterable[str]) -> ExchangeError:
    """The error for a file that describes something else than the known classes."""
    return ExchangeError(
        f"{path} describes a {shown(kind)}, and only {', '.join(known)} can be read"
    )
