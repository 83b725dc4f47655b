"""Operations with kernels of their own: filtered resampling, a fused activation, SiLU of group
normalisation, a rescaled sum, a convolution of repeated pixels.

Each is one function, computed by functions of PyTorch or, as OP_BACKEND asks, by a kernel: the
first two on a GPU, the others on a CPU; see `dispatch`.
"""

from .fused_act import FusedLeakyReLU, fused_leaky_relu
from .group_norm_silu import group_norm_silu
from .repeated_conv import repeated_conv
from .rescaled_sum import rescaled_sum
from .upfirdn2d import upfirdn2d
