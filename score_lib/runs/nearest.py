"""Shipped experiments by their names, and the one that a config is nearest to."""

import functools
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from score_lib.options import flatten
from score_lib.runs.history import trained_config


def named_config(name: str) -> ConfigDict:
    """The config of a shipped experiment, such as "vp/digits", or of a run's `config.json`.

    Raises:
        OSError: there is no such file.
        ValueError: there is no such experiment, or the file is damaged.
    """
    from configs import defaults

    if name.endswith(".json"):
        contents = pathlib.Path(name).read_text(encoding="utf-8", errors="replace")
        return trained_config(name, {"config": contents})
    if name not in defaults.experiments():
        raise ValueError(
            f"{name!r} is no experiment: give its name, such as 'adm/imagenet64_classifier', or a "
            "config.json"
        )
    return defaults.load(name)


class Nearest(NamedTuple):
    """An experiment by name, and the options that differ: name, value, the experiment's value."""

    name: str
    differences: list[tuple[str, object, object]]

    def text(self, most: int) -> str:
        """In one line, with at most so many differences."""
        shown = ", ".join(f"{k} = {a!r} (not {b!r})" for k, a, b in self.differences[:most])
        rest = len(self.differences) - most
        more = f" and {rest} more" if rest > 0 else ""
        return f"{self.name}, but {shown}{more}" if shown else f"{self.name}, as shipped"


def nearest_experiment(config) -> Nearest:
    """The experiment from which the fewest options of a complete config differ, but the device."""
    ours = flatten(config)
    found = []
    for name, theirs in _experiments().items():
        keys = [key for key in ours if key != "device" and ours[key] != theirs.get(key)]
        found.append(Nearest(name, [(key, ours[key], theirs.get(key)) for key in keys]))
    return min(found, key=lambda nearest: len(nearest.differences))


@functools.cache
def _experiments() -> dict[str, dict[str, object]]:
    """The options of all experiments, by name."""
    from configs import defaults

    return {name: flatten(defaults.load(name)) for name in defaults.experiments()}
