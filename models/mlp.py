"""A residual network for vectors."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from score_lib.base.tensors import data_shape, rows
from score_lib.options import complete

from .adaptive import TokenNetwork, feed_forward
from .utils import register_model


@register_model(name="mlp", yields=True)
class MLP(TokenNetwork):
    """Residual MLP for vectors (B, D), and for other small data (B, *D), which it flattens.

    Read are, of `model`: `nf` (features), `num_res_blocks`, `dropout`, and the options of
    `TokenNetwork`.

    Raises:
        ValueError: see `TokenNetwork`.
    """

    def __init__(self, config):
        config = complete(config)
        self.shape = data_shape(config)
        super().__init__(config, math.prod(self.shape))

    def _branches(self, model) -> Sequence[nn.Module]:
        return [feed_forward(model.nf, model.dropout)]

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"the network takes (B, {', '.join(map(str, self.shape))}), as data.shape or the "
                f"size of images says, but was given shape {tuple(x.shape)}"
            )
        return rows(x)[:, None]
