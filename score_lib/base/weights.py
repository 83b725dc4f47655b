"""Names of weights in state dicts, with and without the prefixes of wrappers."""

from collections.abc import Iterable

PREFIX = "module."  # before each name in published checkpoints, from DataParallel


def without_wrapper(weights: dict, own: Iterable[str]) -> dict:
    """A state dict without what wrappers put before all names, such as "module._orig_mod.".

    Args:
        weights: a state dict; one that fits `own` in no name is returned as it is.
        own: the names that the network itself gives.
    """
    own = set(own)
    heads = {name.partition(".")[0] for name in own}
    found = weights
    while found and all(isinstance(name, str) and "." in name for name in found):
        shared = {name.partition(".")[0] for name in found}
        if len(shared) > 1 or shared <= heads:
            break
        found = {name.partition(".")[2]: value for name, value in found.items()}
    return found if own & found.keys() else weights


def as_published(weights: dict) -> dict:
    """A state dict with "module." before each name."""
    if all(name.startswith(PREFIX) for name in weights):
        return weights
    return {PREFIX + name: value for name, value in weights.items()}
