"""A digest of the pixels of a set of images, to tell whether two sets are the same."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_BYTES = 16


def hash_sum(images: Tensor | np.ndarray) -> int:
    """Sum of the hashes of images (B, H, W, C) uint8.

    A sum, unlike a hash of all, does not depend on how images are ordered, put in batches, or
    shared among processes.
    """
    rows = torch.as_tensor(images).contiguous().cpu().numpy()
    shape = repr(rows.shape[1:]).encode()
    hashes = (hashlib.blake2b(row, digest_size=_BYTES, key=shape).digest() for row in rows)
    return sum(int.from_bytes(value, "big") for value in hashes)


def pixel_digest(sums: Iterable[int]) -> str:
    """The digest of a set of images from the `hash_sum` of its parts."""
    return f"{sum(sums) % 256**_BYTES:0{2 * _BYTES}x}"
