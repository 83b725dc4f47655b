"""A transformer for sets of points.  [Lee et al. 2019, with adaptive normalisation]"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from score_lib.base.tensors import data_shape
from score_lib.options import complete

from .adaptive import TokenNetwork, feed_forward, normalised
from .attention import attention, heads_of
from .utils import register_model


class Attention(nn.Module):
    """Attention with several heads, of some tokens to others.

    Args:
        width: features of a token, W, which the number of heads divides.
        heads: how many.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, others: Tensor | None = None) -> Tensor:
        """h (B, N, W) and the others (B, M, W), by default h itself -> (B, N, W)."""
        others = h if others is None else others
        parts = self.query(h), *self.key_value(others).chunk(2, dim=-1)
        # (B, heads, N, W / heads)
        query, key, value = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in parts)
        return self.out(attention(query, key, value).transpose(1, 2).flatten(2))


class InducedAttention(nn.Module):
    """Attention by way of M learnt points, which costs N M instead of N^2.

    The learnt points attend to the tokens, and the tokens to what they have found.  [Lee et al.
    2019, equations 9 and 10]

    Args:
        width, heads: see `Attention`.
        count: learnt points, M.
        dropout: probability.
    """

    def __init__(self, width: int, heads: int, count: int, dropout: float):
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, count, width))
        self.gather, self.spread = Attention(width, heads), Attention(width, heads)
        self.mix = feed_forward(width, dropout)

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        points = self.points.expand(len(h), -1, -1)
        found = normalised(points + self.gather(points, h))
        return self.spread(h, normalised(found + self.mix(found)))


@register_model(name="set_transformer", yields=True)
class SetTransformer(TokenNetwork):
    """Transformer for sets of points (B, N, C), of any number: it is equivariant.

    Points have no positions but their entries, so that permuted points give a permuted output.

    Read are, of `model`: `nf` (features), `num_res_blocks`, `num_heads`, `num_head_channels`,
    `dropout`, `inducing_points` (see `InducedAttention`; 0: points attend to each other), and the
    options of `TokenNetwork`.

    Raises:
        ValueError: the data are no sets of points, the features cannot be split into heads, and see
            `TokenNetwork`.
    """

    def __init__(self, config):
        config = complete(config)
        shape = data_shape(config)
        if len(shape) != 2:
            raise ValueError(
                f"the network {config.model.name!r} takes sets of points, but the data's shape is "
                f"{shape}: set data.shape = (N, C), the number of points and of their entries"
            )
        self.entries = shape[1]
        super().__init__(config, self.entries)

    def _branches(self, model) -> Sequence[nn.Module]:
        width, count = model.nf, model.inducing_points
        heads = heads_of(width, model.num_heads, model.num_head_channels or -1)
        attend = (
            InducedAttention(width, heads, count, model.dropout)
            if count
            else Attention(width, heads)
        )
        return [attend, feed_forward(width, model.dropout)]

    def _tokens(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.entries:
            raise ValueError(
                f"the network takes points (B, N, {self.entries}), as data.shape says, but was "
                f"given shape {tuple(x.shape)}"
            )
        return x
