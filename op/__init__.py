"""Image operations that are worth a kernel of their own.

One function per operation, and no other place in the project computes it: whatever runs behind the
name, the networks do not change.  On a CPU that is PyTorch; on a GPU, what `dispatch` chooses.
"""

from .fused_act import FusedLeakyReLU, fused_leaky_relu
from .upfirdn2d import upfirdn2d

__all__ = ["FusedLeakyReLU", "fused_leaky_relu", "upfirdn2d"]
