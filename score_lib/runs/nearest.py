"""The shipped experiment that a config is nearest to."""

from typing import NamedTuple

from score_lib.options import flatten


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
    from configs import defaults

    ours = flatten(config)
    found = []
    for name in defaults.experiments():
        theirs = flatten(defaults.load(name))
        keys = [key for key in ours if key != "device" and ours[key] != theirs.get(key)]
        found.append(Nearest(name, [(key, ours[key], theirs.get(key)) for key in keys]))
    return min(found, key=lambda nearest: len(nearest.differences))
