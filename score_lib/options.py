"""Configs made complete and checked, by the table of all options.

`python -m score_lib.options > docs/options.md` writes the table as a page.
"""

import difflib
import json
import logging
import os
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from score_lib.option_conflicts import Options, conflicts
from score_lib.option_kinds import path, plain
from score_lib.option_table import NEEDED, SECTIONS, TABLE, NoDefault


class Device(str):
    """The name of a device, which PyTorch takes; like `torch.device` with a type and an index."""

    @property
    def type(self) -> str:
        """Such as "cuda"."""
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:
        """Such as 1, of "cuda:1"; None if none was set."""
        number = self.partition(":")[2]
        return int(number) if number else None


class Config(ConfigDict):
    """A config whose option `device` reads as a device that PyTorch takes.

    It is set by a name or as a `torch.device`, and it is kept, also in JSON, as a name: "auto"
    means what a machine has when it is read.  Setting it needs no PyTorch.
    """

    def __setitem__(self, key, value):
        if key == "device":
            value = str(value.get() if isinstance(value, FieldReference) else value)
        super().__setitem__(key, value)

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return _device(value) if key == "device" else value

    @property
    def device_name(self) -> str:
        """The device as it was set, perhaps "auto"."""
        return self._fields.get("device", "auto")

    def get_type(self, key) -> type:
        """The type that flags of the command line are parsed to."""
        return str if key == "device" else super().get_type(key)

    # Copies as other types, which know no "auto".

    def iteritems(self, *args, **keywords) -> Iterator[tuple[str, object]]:
        """See `ConfigDict`."""
        for key, value in super().iteritems(*args, **keywords):
            yield key, str(self[key]) if key == "device" else value

    def to_dict(self, *args, **keywords) -> dict:
        """See `ConfigDict`."""
        options = super().to_dict(*args, **keywords)
        return options | {"device": str(self["device"])} if "device" in options else options


def _device(name: str) -> Device:
    if name != "auto":
        return Device(name)
    import torch

    return Device("cuda" if torch.cuda.is_available() else "cpu")


def complete(config: object) -> Config:
    """A copy of a config in which every option that it lacks has its default.

    Its own values stay, known names as the table spells them, which are taken in any case, and
    paths from ~ as whole ones.  A locked config gives a locked copy.

    Args:
        config: a ConfigDict, a dict, an argparse.Namespace or any object with attributes; whole
            sections may be missing.
    Raises:
        ValueError: a section such as `model` holds something else than options, or a required
            placeholder of ml_collections has no value.
    """
    full = _as_dict(config, "config")
    for section, _, _ in SECTIONS[1:]:
        full[section] = _as_dict(full.get(section, {}), f"config.{section}")
    for key, option in TABLE.items():
        section, _, name = key.rpartition(".")
        options = full[section] if section else full
        if name in options:
            options[name] = _as_known(options[name], option.check.names)
            # Shells leave the ~ of `--config.eval.stats=~/a.npz` to the program.  Places of data
            # stay as given, since runs record them; their readers know it.
            if option.check is path and section != "data" and isinstance(options[name], str):
                options[name] = os.path.expanduser(options[name])
        elif not isinstance(option.default, NoDefault):
            options[name] = option.default
    locked = isinstance(config, ConfigDict) and config.is_locked
    return Config(full).lock() if locked else Config(full)


def from_json(text: str) -> Config:
    """The complete config of a text as in a run's `config.json`.

    Its lists become tuples, as experiments set them.

    Raises:
        ValueError, TypeError, AttributeError, RecursionError: it is no JSON, or none of a config.
    """
    return complete(_tuples(json.loads(text)))


def _tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def add_missing(config: ConfigDict) -> None:
    """Give a config the options that it lacks, at their defaults, in place.

    Other than `complete`, this keeps references between options, so that options may be set
    afterwards, as on the command line.
    """
    with config.unlocked():
        for key, option in TABLE.items():
            section, _, name = key.rpartition(".")
            if section and section not in config:
                config[section] = ConfigDict()
            options = config[section] if section else config
            absent = isinstance(options, ConfigDict) and name not in options
            if absent and not isinstance(option.default, NoDefault):
                options[name] = option.default


def _as_known(value: object, names: tuple[str, ...]) -> object:
    """A name as it is known: registries take any case, but no comparison should have to."""
    if not isinstance(value, str) or value in names:
        return value
    return next((name for name in names if name.lower() == value.lower()), value)


def _as_dict(config: object, name: str) -> dict[str, object]:
    """The options of a config or of a section of one; a new dict, whose sections are as they were.

    Raises:
        ValueError: it holds no options.
    """
    if config is None or isinstance(config, str | int | float | list | tuple):
        raise ValueError(f"{name} should be a section of options, not {config!r}")
    return {key: plain(value) for key, value in _options_of(config).items()}


def _options_of(config: object) -> Mapping[str, object]:
    if isinstance(config, ConfigDict):
        if unset := list(_unset(config)):
            raise ValueError(
                f"{', '.join(unset)}: a required placeholder without a value; set it in the config "
                f"or as in --config.{unset[0]}=VALUE"
            )
        options = config.to_dict()
        return {**options, "device": config.device_name} if isinstance(config, Config) else options
    if isinstance(config, Mapping):
        return config
    values = {key: getattr(config, key) for key in dir(config) if not key.startswith("_")}
    # Methods are no options; a class may be a section.
    return {key: v for key, v in values.items() if isinstance(v, type) or not callable(v)}


def _unset(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of required placeholders that have no value."""
    for key in config:
        try:
            value = config[key]
        except RequiredValueError:
            yield prefix + key
        else:
            if isinstance(value, ConfigDict):
                yield from _unset(value, f"{prefix}{key}.")


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all options, such as "model.nf", and their values."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and prefix + key not in TABLE:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return {**flat, "device": config.device_name} if isinstance(config, Config) else flat


def checked(config: object) -> tuple[ConfigDict, list[str]]:
    """A config, completed, whose values are right.

    Returns:
        the config, and the dotted names of its unknown options, sorted: nothing of ours reads them.
    Raises:
        ValueError: an option is misspelt, missing, of a wrong kind or out of range, or options
            exclude each other.
    """
    config = complete(config)
    _read_published_slips(config)
    flat = flatten(config)
    unknown = sorted(flat.keys() - TABLE.keys())
    if slips := [f"{key!r}: did you mean {meant!r}?" for key in unknown if (meant := _meant(key))]:
        raise ValueError(
            f"unknown config option {'; '.join(slips)} "
            "(An option of your own needs a name that resembles no other, or a section of its own.)"
        )
    # Options are compared with each other once each of them is right.
    for problems in (_wrong_values(flat), conflicts(flat)):
        if found := list(problems):
            raise ValueError("; ".join(found))
    return config, unknown


def _read_published_slips(config: Config) -> None:
    """Read two misspelt options of published files, with a warning.

    `ve/ncsnv2/bedroom` has a network of discrete noise levels and `training.continuouse = False`;
    `ve/ncsn/celeba` names its process `training.loss`.
    """
    training = config.training
    for name, meant, applies in (
        ("continuouse", "continuous", training.get("continuouse") is False),
        ("loss", "sde", "sde" not in training and isinstance(training.get("loss"), str)),
    ):
        if applies:
            with config.unlocked():
                training[meant] = value = training[name]
                del training[name]
            logging.warning(
                "training.%s is read as training.%s = %r, as the published file means: rename it",
                name, meant, value,
            )  # fmt: skip


def _meant(key: str) -> str | None:
    """The known option that a misspelt name stands for, or None."""
    section, _, name = key.rpartition(".")
    options = {section: options for section, _, options in SECTIONS}
    if section not in options:
        # A section of the user's own is free; a misspelt one is not.
        section = _similar(section, options)
    if section is None:
        return None
    if close := _similar(name, options[section]):
        return f"{section}.{close}".lstrip(".")
    elsewhere = (f"{other}.{name}".lstrip(".") for other in options if name in options[other])
    return next(elsewhere, None)


def _similar(name: str, known: Options) -> str | None:
    # 0.82 finds one wrong letter in six and two that are swapped, yet lets names pass that are
    # in use beside ours, such as `model.sigma_begin` (0.8 from `sigma_min`) or `optim.beta2`.
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.82)), None)


def _wrong_values(flat: Options) -> Iterator[str]:
    for key, (default, check, _) in TABLE.items():
        value = flat.get(key)
        if key in flat and not check.accepts(value):
            given = value.to_dict() if isinstance(value, ConfigDict) else value
            yield f"{key} = {given!r} should be {check.allowed}"
        elif key not in flat and default is NEEDED:
            yield f"the config has no {key}, which every experiment needs: {check.allowed}"


# --- The page of all options ---------------------------------------------------------------------

_INTRODUCTION = """# Options

Every option of a config. Set one in an experiment's file as `config.training.batch_size = 64`, or
on the command line as `--config.training.batch_size=64`.

Options with the default *needed* are set by every experiment. Those with the default *network* are
set by experiments whose network has them. Names of your own join those in *allowed* where
[extending.md](extending.md) has a decorator for them.

This page is written by `python -m score_lib.options > docs/options.md`.
"""


def page() -> str:
    """The table of options in Markdown."""
    lines = [_INTRODUCTION]
    for section, title, options in SECTIONS:
        lines += [f"## {title}: `{section}`" if section else f"## {title}", ""]
        lines += ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for key in (f"{section}.{name}".lstrip(".") for name in options):
            default, check, meaning = TABLE[key]
            if isinstance(default, NoDefault):
                shown = default.name.lower()
            else:
                shown = f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"
            lines.append(f"| `{key}` | {shown} | {check.allowed} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
