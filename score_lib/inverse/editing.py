"""Editing: sampling from noisy data.  [Meng et al. 2022, SDEdit]"""

from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.inverse.measured import check_floats
from score_lib.samplers.constraints import Constraint
from score_lib.samplers.loop import Noise
from score_lib.sdes.process import SDE


class StartFrom(Constraint):
    """Sampling starts from x_t of given data instead of the prior.  [Meng et al. 2022, SDEdit]

    Args:
        data: x_0, (B, *D), in the network's range.
    """

    def __init__(self, data: Tensor):
        check_floats("the data to start from", data)
        self.data = data

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        if self.data.shape != x.shape:
            raise ValueError(
                f"sampling starts from data of shape {tuple(self.data.shape)}, but samples have "
                f"shape {tuple(x.shape)}"
            )
        mean, std = sde.marginal_prob(self.data.to(x), t)
        return mean + batch_mul(std, noise(x))
