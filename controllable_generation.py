"""Conditional samples from an unconditional model.  [S21, section 5 and appendix I]

A constraint wraps an update (x, t) -> (x, x_mean): after every predictor and corrector step, the
part of x that is known is replaced by a sample of it at that time.  `sampling.run_updates` is the
one loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.utils import get_score_fn
from sampling import (
    Corrector,
    Noise,
    Predictor,
    Update,
    corrector_update,
    draw_prior,
    predictor_update,
    run_updates,
)
from sde_lib import SDE
from utils.tensors import batch_mul


class KnownPart:
    """What is known of a sample x_0: its orthogonal projection onto a subspace.

    Args:
        value: the known part, (B, *D), in the network's range.
    """

    def __init__(self, value: Tensor):
        self.value = self.project(value)

    def project(self, x: Tensor) -> Tensor:
        """The part of x (B, *D) in the subspace."""
        raise NotImplementedError

    def spread(self, z: Tensor) -> Tensor:
        """Standard normal noise in the subspace, made of such noise in the whole space."""
        return self.project(z)

    def start(self, prior: Tensor) -> Tensor:
        """x_T, (B, *D): the known part, and a draw from the prior for the rest."""
        return self.replace(prior, self.value)

    def replace(self, x: Tensor, known: Tensor) -> Tensor:
        """x with another known part; both (B, *D)."""
        return x - self.project(x) + known


class KnownPixels(KnownPart):
    """Some entries are known: inpainting.

    Args:
        value: (B, *D); what it holds where the mask is 0 is not looked at.
        mask: 1 where known and 0 elsewhere; of a shape that broadcasts to that of value.
    """

    def __init__(self, value: Tensor, mask: Tensor):
        try:
            self.mask = (mask != 0).expand_as(value)
        except RuntimeError as error:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, which does not fit images of shape "
                f"{tuple(value.shape)}"
            ) from error
        if not torch.logical_or(mask == 0, mask == 1).all():
            raise ValueError("a mask holds 1 for what is known and 0 for what is not")
        super().__init__(value)

    def project(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, torch.zeros_like(x))

    def replace(self, x: Tensor, known: Tensor) -> Tensor:
        # Chosen, not added up: what is unknown cannot leak through rounding.
        return torch.where(self.mask, known, x)


class KnownGray(KnownPart):
    """The mean over channels is known: colorization.

    Args:
        value: gray images (B, C, *D) with equal channels.
    """

    def project(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)

    def spread(self, z: Tensor) -> Tensor:
        # Along the unit vector (1, ..., 1) / sqrt(C), by the noise of the first channel.
        return (z[:, :1] / math.sqrt(z.shape[1])).expand_as(z)

    def start(self, prior: Tensor) -> Tensor:
        # As in the published sampler: without noise in the first channel, and with the channels
        # last in memory, which is the order in which noise like x is drawn.
        prior = torch.cat([torch.zeros_like(prior[:, :1]), prior[:, 1:]], dim=1)
        return (prior + self.value).movedim(1, -1).contiguous().movedim(-1, 1)


def keep_known(update: Update, sde: SDE, known: KnownPart, noise: Noise | None = None) -> Update:
    """An update after which the known part of x is that of a sample of x_t given x_0.

    Its mean has the known part's mean.
    """
    draw = noise or torch.randn_like

    def constrained(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, x_mean = update(x, t)
        mean, std = sde.marginal_prob(known.value, t)
        noisy = mean + batch_mul(std, known.spread(draw(x)))
        return known.replace(x, noisy), known.replace(x_mean, mean)

    return constrained


def get_pc_inpainter(
    sde: SDE,
    predictor: type[Predictor] | None,
    corrector: type[Corrector] | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
) -> Callable:
    """Fill in what a mask leaves open.  [S21, appendix I.2]

    Args:
        sde: the forward process; its N is the number of steps.
        predictor, corrector: classes, or None.
        inverse_scaler: from the network's range to [0, 1].
        snr, n_steps: signal-to-noise ratio and number of the corrector's steps.
        probability_flow: let the predictor follow the probability flow.
        continuous: whether the network was trained on all times.
        denoise: return the last update's mean, without its noise.
        eps: time at which sampling stops.
    Returns:
        `inpainter(model, data, mask, *, noise=None, progress=False) -> images (B, *D)`; data is in
        the network's range, and mask is 1 where it is known.
    """
    sample = _constrained_sampler(
        sde,
        predictor,
        corrector,
        inverse_scaler,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        eps,
    )

    def inpainter(model, data, mask, *, noise=None, progress=False):
        return sample(model, KnownPixels(data, mask.to(data.device)), noise, progress)

    return inpainter


def get_pc_colorizer(
    sde: SDE,
    predictor: type[Predictor] | None,
    corrector: type[Corrector] | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
) -> Callable:
    """Colour gray images.  [S21, appendix I.3]

    Args:
        sde, ..., eps: see `get_pc_inpainter`.
    Returns:
        `colorizer(model, gray_scale_img, *, noise=None, progress=False) -> images (B, C, *D)`; the
        gray images have equal channels, in the network's range.
    """
    sample = _constrained_sampler(
        sde,
        predictor,
        corrector,
        inverse_scaler,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        eps,
    )

    def colorizer(model, gray_scale_img, *, noise=None, progress=False):
        return sample(model, KnownGray(gray_scale_img), noise, progress)

    return colorizer


def _constrained_sampler(
    sde,
    predictor,
    corrector,
    inverse_scaler,
    snr,
    n_steps,
    probability_flow,
    continuous,
    denoise,
    eps,
) -> Callable:
    """`sample(model, known, noise, progress)`: predictor-corrector sampling of what is open."""

    @torch.no_grad()
    def sample(model, known: KnownPart, noise: Noise | None, progress: bool) -> Tensor:
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        updates = (
            corrector_update(sde, score_fn, corrector, snr, n_steps, noise),
            predictor_update(sde, score_fn, predictor, probability_flow, noise),
        )
        device = known.value.device
        x = known.start(draw_prior(sde, known.value.shape, device, noise))
        timesteps = torch.linspace(sde.T, eps, sde.N, device=device)
        constrained = [keep_known(update, sde, known, noise) for update in updates]
        x, x_mean = run_updates(x, timesteps, constrained, progress)
        return inverse_scaler(x_mean if denoise else x)

    return sample
