"""Weights in state dicts: names with and without the prefixes of wrappers, and digests."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from score_lib.base.distributed import unwrapped
from score_lib.base.tensors import bytes_of

PREFIX = "module."  # before each name in published checkpoints, from DataParallel


def without_wrapper(weights: dict, own: Iterable[str]) -> dict:
    """A state dict without the prefix of wrappers, such as "module._orig_mod.", in all names.

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


def parts_to_hash(weights: Mapping[str, Tensor]) -> Iterator[bytes | np.ndarray]:
    """The names and values of a state dict, as a hash takes them."""
    for name, value in weights.items():
        yield name.encode()
        yield bytes_of(value)


def weights_digest(model: nn.Module) -> str:
    """A short hash of a network's present weights, the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts_to_hash(unwrapped(model).state_dict()):
        digest.update(part)
    return digest.hexdigest()
