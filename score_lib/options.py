"""Configs made complete and checked, by the table of all options.

`python -m score_lib.options > docs/options.md` writes the table as a page.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from score_lib.option_conflicts import conflicts
from score_lib.option_table import NEEDED, SECTIONS, TABLE, NoDefault, Option

_DEFAULTS = {
    section: {
        name: option.default
        for name, option in options.items()
        if not isinstance(option.default, NoDefault)
    }
    for section, _, options in SECTIONS
}


def complete(config: object) -> ConfigDict:
    """A copy of a config in which every option that it lacks has its default.

    Its own values stay, and a locked config gives a locked copy.

    Args:
        config: a ConfigDict, a dict, an argparse.Namespace or any object with attributes; whole
            sections may be missing.
    Raises:
        ValueError: a section such as `model` holds something else than options.
    """
    full = _as_dict(config, "config")
    for section, defaults in _DEFAULTS.items():
        if section:
            given = _as_dict(full.get(section, {}), f"config.{section}")
            full[section] = {**defaults, **given}
        else:
            full = {**defaults, **full}
    locked = isinstance(config, ConfigDict) and config.is_locked
    return ConfigDict(full).lock() if locked else ConfigDict(full)


def checked(config: object) -> tuple[ConfigDict, list[str]]:
    """A config, completed, whose values are right.

    Returns:
        the config, and the dotted names of its unknown options, sorted: nothing of ours reads them.
    Raises:
        ValueError: an option is misspelt, missing, of a wrong kind or out of range, or options
            exclude each other.
    """
    config = complete(config)
    flat = flatten(config)
    unknown = unknown_options(flat)
    # Options are compared with each other once each of them is right.
    for problems in (_wrong_values(flat), conflicts(flat)):
        if found := list(problems):
            raise ValueError("; ".join(found))
    return config, unknown


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all options, such as "model.nf", and their values."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unknown_options(flat: Mapping[str, object]) -> list[str]:
    """Names that are not in the table, sorted.

    Args:
        flat: options by their dotted names.
    Raises:
        ValueError: some resemble a known option so much that they must be slips.
    """
    unknown = sorted(flat.keys() - TABLE.keys())
    meant = {key: close for key in unknown if (close := _closest(key))}
    if meant:
        slips = "; ".join(f"{key!r}: did you mean {close!r}?" for key, close in meant.items())
        raise ValueError(
            f"unknown config option {slips} "
            "(An option of your own needs a name that resembles no other, or a section of its own.)"
        )
    return unknown


def _closest(key: str) -> str | None:
    """The known option that a misspelt name stands for, or None."""
    section, _, name = key.rpartition(".")
    options = {section: options for section, _, options in SECTIONS}
    if section not in options:
        # A section of the user's own is free; a misspelt one is not.
        section = _similar(section, options)
    close = _similar(name, options.get(section, ()))
    return f"{section}.{close}".lstrip(".") if close else None


def _similar(name: str, known: Mapping[str, object]) -> str | None:
    # 0.82 finds one wrong letter in six and two that are swapped, yet lets names pass that are
    # in use beside ours, such as `model.sigma_begin` (0.8 from `sigma_min`) or `optim.beta2`.
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.82)), None)


def _wrong_values(flat: Mapping[str, object]) -> Iterator[str]:
    for key, (default, check, _) in TABLE.items():
        if key in flat and not check.accepts(flat[key]):
            yield f"{key} = {flat[key]!r} should be {check.allowed}"
        elif key not in flat and default is NEEDED:
            yield f"the config has no {key}, which every experiment needs: {check.allowed}"


# --- Configs of any kind -------------------------------------------------------------------------


def _as_dict(config: object, name: str) -> dict[str, object]:
    """The options of a config or of a section of one; a new dict, whose sections are as they were.

    Raises:
        ValueError: it holds no options.
    """
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if config is None or isinstance(config, str | int | float | list | tuple):
        raise ValueError(f"{name} should be a section of options, not {config!r}")
    values = {key: getattr(config, key) for key in dir(config) if not key.startswith("_")}
    # Methods are no options; a class may be a section.
    return {key: v for key, v in values.items() if isinstance(v, type) or not callable(v)}


# --- The page of all options ---------------------------------------------------------------------

_INTRODUCTION = """# Options

Every option of a config. Set one in an experiment's file as `config.training.batch_size = 64`, or
on the command line as `--config.training.batch_size=64`.

Options with the default *needed* are set by every experiment. Those with the default *network* are
set by experiments whose network has them. Names in *allowed* may be joined by
[names of your own](extending.md).

This page is written by `python -m score_lib.options > docs/options.md`.
"""


def page() -> str:
    """The table of options in Markdown."""
    parts = [_INTRODUCTION]
    for section, title, options in SECTIONS:
        heading = f"{title}: `{section}`" if section else title
        rows = [_row(f"{section}.{name}".lstrip("."), option) for name, option in options.items()]
        header = "| option | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
        parts.append(f"## {heading}\n\n{header}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(name: str, option: Option) -> str:
    default, check, meaning = option
    shown = default.name.lower() if isinstance(default, NoDefault) else f"`{_literal(default)}`"
    return f"| `{name}` | {shown} | {check.allowed} | {meaning} |"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main() -> None:
    """Print the page."""
    argparse.ArgumentParser(description="Print the page of all options.").parse_args()
    print(page(), end="")


if __name__ == "__main__":
    main()
