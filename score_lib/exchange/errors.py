"""The error of files of other libraries, and the check of the options in them."""

import json
from collections.abc import Iterable, Mapping

from score_lib.disk.files import printable
from score_lib.disk.fit import CheckpointError
from score_lib.option_kinds import Check


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


def checked_options(
    path,
    stored: Mapping[str, object],
    known: Mapping[str, tuple[object, Check]],
    others: Iterable[str],
    effect: str,
) -> dict[str, object]:
    """The known options in a file, completed by their defaults.

    Args:
        path: for messages.
        stored: the contents of the file.
        known: the default of each, and which values it takes.
        others: names of options that are left to the caller.
        effect: of unknown options, which may change it.
    Raises:
        ExchangeError: an option is unknown, or of a wrong kind.
    """
    names = {*known, *others}
    for name, value in stored.items():
        if not name.startswith("_") and name not in names and value is not None:
            raise ExchangeError(
                f"{path} has the option {name} = {shown(value)}, which is unknown here and may "
                f"change {effect}"
            )
    options = {name: stored.get(name, default) for name, (default, _) in known.items()}
    for name, (_, check) in known.items():
        if not check.accepts(options[name]):
            raise wrong_value(path, name, options[name], check.allowed)
    return options
