"""What every layer may use: tensor helpers, registries, seeds, files, checkpoints, an ODE solver.

Nothing here knows about processes, networks, data or configs beyond plain values.
"""

from utils.checkpoints import restore_checkpoint, save_checkpoint
from utils.files import atomic_write
from utils.registry import Registry
from utils.tensors import SampleNoise, batch_mul, derive_seed, image_shape

__all__ = [
    "Registry",
    "SampleNoise",
    "atomic_write",
    "batch_mul",
    "derive_seed",
    "image_shape",
    "restore_checkpoint",
    "save_checkpoint",
]
