"""Image operations with kernels of their own: filtered resampling, and a fused activation.

Each is one function, computed nowhere else in the project, by functions of PyTorch or, on a GPU
with OP_BACKEND=cuda, by a CUDA kernel; see `dispatch`.
"""

from .fused_act import FusedLeakyReLU, fused_leaky_relu
from .upfirdn2d import upfirdn2d
