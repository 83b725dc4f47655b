"""A network for dry runs."""

import torch
from torch import Tensor, nn


class Zeros(nn.Module):
    """A network whose output is always 0, with learned variances if asked for."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: Tensor, labels: Tensor, *, variances: bool = False, **condition: Tensor
    ) -> Tensor:
        return self.weight * (torch.cat([x, x], dim=1) if variances else x)
