"""Networks of tokens, in which the noise level acts by adaptive normalisation.

A token is a vector: all of a datum, or a point of a set.  Every branch of a residual sum normalises
the tokens, and the embedded noise level scales and shifts them, and gates the result (adaLN-Zero,
[Peebles & Xie 2023]).  The output can be linear in the input at every noise level, as the score of
a Gaussian is.
"""

import abc
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adm_layers import zeroed
from .conditioning import Condition, ConditionLayers, Takes, taken_by
from .layers import check_fixed, check_labels, dense, divided_by_sigma, in_full_precision
from .layerspp import fourier_projection, level_features
from .network import Network
from .utils import get_sigmas


class LevelEmbedding(nn.Module):
    """The noise level and conditions as one vector, of length E = 4 nf.

    Args:
        model: the section of a complete config; read are `nf`, `embedding_type`, `fourier_scale`
            and `fourier_log`.
        takes: the conditions, without an image.
    """

    def __init__(self, model, takes: Takes):
        super().__init__()
        self.nf, self.dim, self.log = model.nf, 4 * model.nf, model.fourier_log
        self.fourier = fourier_projection(model.embedding_type, model)
        features = model.nf if self.fourier is None else 2 * model.nf
        first, second = dense(features, self.dim), dense(self.dim, self.dim)
        self.layers = nn.Sequential(first, nn.SiLU(), second)
        self.conditions = ConditionLayers(takes, self.dim, model.nf)

    def forward(self, labels: Tensor, dtype: torch.dtype, condition: Condition) -> Tensor:
        """labels (B,) and the condition -> (B, E) in a dtype."""
        temb = level_features(labels, self.fourier, self.nf, self.log).to(dtype)
        return self.conditions.embed(in_full_precision(self.layers, temb), condition)


class Stem(nn.Module):
    """The first layer: an affine map of a token and, if asked for, of its Fourier features.

    Args:
        in_dim: entries of a token, C.
        width: features of a token, W.
        fourier_scale: standard deviation of the frequencies, which are drawn once, kept in the
            state dict and not trained; 0: no such features.  [Tancik et al. 2020]
    """

    def __init__(self, in_dim: int, width: int, fourier_scale: float):
        super().__init__()
        self.has_fourier = fourier_scale > 0
        if self.has_fourier:
            self.register_buffer("frequencies", fourier_scale * torch.randn(in_dim, width))
        # With a bias drawn at random, features that are normalised still tell how long x is.
        self.affine = nn.Linear(in_dim + 2 * width * self.has_fourier, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, W)."""
        if self.has_fourier:
            angles = 2 * math.pi * (x @ self.frequencies)
            x = torch.cat([x, torch.sin(angles), torch.cos(angles)], dim=-1)
        return self.affine(x)


def normalised(h: Tensor) -> Tensor:
    """Tokens (B, N, W), each with mean 0 and variance 1."""
    return in_full_precision(lambda h: F.layer_norm(h, h.shape[-1:]), h)


class Adaptive(nn.Module):
    """A residual branch: h + gate branch(scaled and shifted h), all three told the noise level.

    It starts as the identity.

    Args:
        branch: from tokens (B, N, W) to as many.
        width: features of a token, W.
        temb_dim: length of the embedded noise level, E.
    """

    def __init__(self, branch: nn.Module, width: int, temb_dim: int):
        super().__init__()
        self.branch = branch
        self.of_level = zeroed(nn.Linear(temb_dim, 3 * width))

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        """h (B, N, W), temb (B, E) -> (B, N, W)."""
        shift, scale, gate = self.of_level(F.silu(temb))[:, None].chunk(3, dim=-1)
        return h + gate * self.branch(normalised(h) * (1 + scale) + shift)


class Head(nn.Module):
    """The last layer, 0 at the start.  The noise level scales and shifts its input."""

    def __init__(self, width: int, out_dim: int, temb_dim: int):
        super().__init__()
        self.of_level = zeroed(nn.Linear(temb_dim, 2 * width))
        self.affine = zeroed(nn.Linear(width, out_dim))

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        """h (B, N, W), temb (B, E) -> (B, N, C)."""
        shift, scale = self.of_level(F.silu(temb))[:, None].chunk(2, dim=-1)
        return self.affine(h * (1 + scale) + shift)


def feed_forward(width: int, dropout: float) -> nn.Sequential:
    """Two layers on each token, the hidden one four times as wide."""
    hidden = 4 * width
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return nn.Sequential(first, nn.SiLU(), nn.Dropout(dropout), second)


class TokenNetwork(Network, abc.ABC):
    """x_t and its noise level -> a field of the shape of x_t.  Subclasses make the tokens.

    Data are taken as they are, whatever `data.centered` says.

    Read are, of `model`, the options of `LevelEmbedding`, `input_fourier_scale`, `scale_by_sigma`
    and `checkpoint_activations` (which acts in training).

    Args:
        config: complete, see `score_lib.options.complete`.
        token_dim: entries of a token.
    Raises:
        ValueError: the config asks for something that these networks lack.
    """

    def __init__(self, config, token_dim: int):
        super().__init__()
        model = config.model
        check_fixed(model, {"conditional": True, "nonlinearity": "swish"})
        self.takes = taken_by(config)
        if self.takes.image:
            raise ValueError(
                f"training.condition = {config.training.condition!r} has an image, which the "
                f"network {model.name!r} cannot be told: choose classes or features"
            )
        self.embedding = LevelEmbedding(model, self.takes)
        self.stem = Stem(token_dim, model.nf, model.input_fourier_scale)
        branches = (b for _ in range(model.num_res_blocks) for b in self._branches(model))
        temb_dim = self.embedding.dim
        self.blocks = nn.ModuleList(Adaptive(b, model.nf, temb_dim) for b in branches)
        self.head = Head(model.nf, token_dim, temb_dim)
        self.checkpoint_activations = model.checkpoint_activations
        self.scale_by_sigma = model.scale_by_sigma
        # With Fourier features, labels are sigma itself.
        by_index = self.scale_by_sigma and self.embedding.fourier is None
        sigmas = torch.tensor(get_sigmas(config)) if by_index else None
        self.register_buffer("sigmas", sigmas, persistent=False)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        classes: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The network's output; the process turns it into a score.

        Args:
            x: data in the network's range, (B, *D).
            labels: (B,), see `UNet.forward`.
            classes: (B,), int64.
            features: (B, K).
        Returns:
            (B, *D), in the dtype of x.
        Raises:
            ValueError: other shapes, or other conditions than `takes`.
        """
        tokens = self._tokens(x)
        check_labels(x, labels)
        condition = self.takes.checked({"classes": classes, "features": features}, x)
        temb = self.embedding(labels, x.dtype, condition)
        h = in_full_precision(self.stem, tokens)
        for block in self.blocks:
            h = self._run(block, temb, h)
        h = in_full_precision(lambda h: self.head(h, temb.to(h.dtype)), h)
        h = h.reshape(x.shape).to(x.dtype)
        return divided_by_sigma(h, labels, self.sigmas) if self.scale_by_sigma else h

    @abc.abstractmethod
    def _branches(self, model) -> Sequence[nn.Module]:
        """The branches of a block, for the section `model` of a config; see `Adaptive`."""

    @abc.abstractmethod
    def _tokens(self, x: Tensor) -> Tensor:
        """x (B, *D) as tokens (B, N, C).

        Raises:
            ValueError: the network does not take such data.
        """
