"""The latent space of the probability-flow ODE.  [S21, section 4.3, appendices D.4 and D.5]

Followed from the data to T, the flow encodes an image as a latent code x_T; followed back, it
decodes the code.  Codes of data are distributed nearly as the prior, N(0, prior_std^2 I), so that
it is sensible to interpolate and to scale them:

    encode, decode = get_encoder(sde, scaler), get_decoder(sde, inverse_scaler)
    (first, second), _ = encode(model, images)  # two images
    codes = interpolate(first[None], second[None], torch.linspace(0, 1, 9))
    images, _ = decode(model, codes.flatten(0, 1))

The flow has no parameters besides the score, so that the code of an image is a function of the
distribution of the data: networks that both know it agree on it, see `code_correlation`.

Images are (B, *D) in [0, 1] and codes (B, *D) in the network's range at T.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.pairs import mean_over_pairs
from score_lib.base.tensors import batch_mul, check_floats, norms, rows
from score_lib.samplers.adaptive import get_ode_sampler
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE


class Reconstruction(NamedTuple):
    """Images encoded and decoded again."""

    images: Tensor
    """(B, *D), in [0, 1]."""
    error: Tensor
    """Root mean square difference from the original, in units of the range [0, 1], (B,)."""
    z: Tensor
    """Latent codes, (B, *D)."""
    evaluations: int
    """Of the network, in both directions."""


class Correlation(NamedTuple):
    """How far two networks agree on the latent codes of the same images; 0-d, float64."""

    same: Tensor
    """Pearson's correlation of the two codes of an image; mean over the images."""
    other: Tensor
    """The same for codes of two different images: agreement by chance."""
    same_error: Tensor
    """Standard error of `same`, from the spread over the images."""
    other_error: Tensor
    """Standard error of `other`, from the spread over the images; nan for fewer than four."""
    distance: Tensor
    """|z - z'| / |z| for the codes z and z' of an image; mean over the images."""


def get_encoder(sde: SDE, scaler: Callable, *, eps: float | None = None, **options) -> Callable:
    """Latent codes of images: the flow followed from eps to T.

    Args:
        scaler: from [0, 1] to the network's range.
        eps: time at which the images are taken to be; None is `sde.sampling_eps`.
        options: `rtol`, `atol`, `method`, `continuous`, `parametrization`, `per_sample` and
            `differentiable`, which `sampling.get_ode_sampler` documents.  Without `differentiable`
            there is no gradient.
    Returns:
        `encode(model, images) -> (codes (B, *D), evaluations)`, on the network's device.
    Raises:
        ValueError: eps is not in [0, T), or images are not floating-point numbers.
    """
    sde = as_process(sde)
    follow = _flow(sde, _first_time(sde, eps), sde.T, **options)

    def encode(model: Callable, images: Tensor) -> tuple[Tensor, int]:
        check_floats("images to encode", images)
        return follow(model, scaler(images))

    return encode


def get_decoder(
    sde: SDE, inverse_scaler: Callable, *, eps: float | None = None, **options
) -> Callable:
    """Images of latent codes: the flow followed back from T to eps.

    Args:
        inverse_scaler: from the network's range to [0, 1].
        sde, eps, options: as for `get_encoder`.
    Returns:
        `decode(model, z) -> (images (B, *D), evaluations)`, on the network's device.
    Raises:
        ValueError: eps is not in [0, T).
    """
    sde = as_process(sde)
    follow = _flow(sde, sde.T, _first_time(sde, eps), **options)

    def decode(model: Callable, z: Tensor) -> tuple[Tensor, int]:
        x, evaluations = follow(model, z)
        return inverse_scaler(x), evaluations

    return decode


def get_reconstructor(sde: SDE, scaler: Callable, inverse_scaler: Callable, **options) -> Callable:
    """Images encoded and decoded again: how exactly the flow is inverted.

    Args:
        scaler, inverse_scaler: from [0, 1] to the network's range, and back.
        sde, options: as for `get_encoder`, with eps.
    Returns:
        `reconstruct(model, images) -> Reconstruction`.
    Raises:
        ValueError: as in `get_encoder`.
    """
    encode = get_encoder(sde, scaler, **options)
    decode = get_decoder(sde, inverse_scaler, **options)

    def reconstruct(model: Callable, images: Tensor) -> Reconstruction:
        z, there = encode(model, images)
        decoded, back = decode(model, z)
        difference = rows(decoded - images.to(decoded))
        error = norms(difference) / math.sqrt(difference.shape[1])
        return Reconstruction(decoded, error, z, there + back)

    return reconstruct


def interpolate(first: Tensor, second: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """Spherical interpolation between codes, each pair along its own arc.

    For an angle theta between two codes, (sin((1 - w) theta) a + sin(w theta) b) / sin(theta).
    Independent draws from the prior are nearly orthogonal and of equal norm, and so is everything
    between them; on a straight line norms would drop by sqrt(2) half-way, to where no codes are.
    Codes that are parallel, opposite or 0 span no arc and are joined by a straight line.

    Args:
        first, second: codes, (B, *D).
        weights: how far to go, in [0, 1], (W,); exactly `first` at 0 and `second` at 1.
    Returns:
        Codes, (W, B, *D); differentiable in all three.
    Raises:
        ValueError: shapes differ, codes are not floating-point numbers, or weights are not (W,)
            numbers in [0, 1].
    """
    _check_pair(first, second)
    weights = torch.as_tensor(weights, dtype=torch.float64, device=first.device)
    inside = (weights >= 0) & (weights <= 1)
    if weights.dim() != 1 or len(weights) == 0 or not inside.all():
        raise ValueError(
            "weights of an interpolation are a list of numbers from 0 (the first code) to 1 (the "
            f"second), not {weights.tolist()}"
        )
    shares = [share.to(first.dtype) for share in _arc_shares(first, second, weights)]
    return torch.stack(
        [batch_mul(a, first) + batch_mul(b, second) for a, b in zip(*shares, strict=True)]
    )


def temper(z: Tensor, temperature: float) -> Tensor:
    """Codes at another temperature: scaled, so that draws from the prior have that many times its
    standard deviation.

    This means the same for every process whose prior is N(0, prior_std^2 I), whatever prior_std is
    (1 for VP and sub-VP, sigma_max for VE).

    Args:
        z: codes, (B, *D).
        temperature: below 1 for smoother and more typical images, 1 to change nothing, 0 for the
            prior's mean alone.
    Raises:
        ValueError: the temperature is negative or not finite, or codes are not floating-point
            numbers.
    """
    check_floats("codes", z)
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"a temperature scales codes by a number of 0 or more, not {temperature}: try 0.8"
        )
    return z * temperature


def code_correlation(first: Tensor, second: Tensor) -> Correlation:
    """Whether two networks give the same images the same codes.  [S21, appendix D.5]

    Each code is centred by its own mean over the dimensions, as Pearson's correlation has it: what
    brightness is left in the codes, which the images share, is no agreement on the images.  Nothing
    else is taken away, since codes are nearly draws from N(0, prior_std^2 I) as they are; what they
    have in common beyond that shows in the correlation between different images.  Correlations do
    not depend on either network's scale, the distance does.

    Args:
        first, second: codes of the same images by two networks, (B, *D).
    Returns:
        Correlations, nan where a code has the same value in every dimension.
    Raises:
        ValueError: shapes differ, codes are not floating-point numbers, or there are fewer than two
            images or two dimensions.
    """
    _check_pair(first, second)
    if len(first) < 2 or first[0].numel() < 2:
        raise ValueError(
            "a correlation needs at least two images of at least two dimensions, not codes of "
            f"shape {tuple(first.shape)}"
        )
    z, z_other = rows(first).double(), rows(second).double()
    pairs = _standardised(z) @ _standardised(z_other).T
    same, (other, other_error) = pairs.diagonal(), mean_over_pairs(pairs)
    same_error = same.std() / math.sqrt(len(same))
    distance = norms(z - z_other) / norms(z)
    return Correlation(same.mean(), other, same_error, other_error, distance.mean())


def _flow(sde: SDE, start_time: float, stop_time: float, **options) -> Callable:
    """`follow(model, x) -> (x at stop_time, evaluations)`: along the flow, in either direction."""
    ends = {"start_time": start_time, "eps": stop_time}
    # The shape is unused: x is always given.
    return get_ode_sampler(sde, (), lambda x: x, denoise=False, **ends, **options)


def _first_time(sde: SDE, eps: float | None) -> float:
    eps = sde.sampling_eps if eps is None else eps
    if not 0 <= eps < sde.T:
        raise ValueError(
            f"images are taken to be at a time from 0 to below T = {sde.T:g}, not at eps = {eps}; "
            f"this process suggests {sde.sampling_eps:g}"
        )
    return eps


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"codes come in pairs, but their shapes are {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    for codes in (first, second):
        check_floats("codes", codes)


def _arc_shares(first: Tensor, second: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of `first` and `second` at each point between them: (W, B) each, float64."""
    a, b = rows(first).double(), rows(second).double()
    size = norms(a) * norms(b)
    cosine = (a * b).sum(1) / torch.where(size > 0, size, 1.0)
    # Below an angle of 1e-5 arc and line agree to rounding.  The unused branch gets a right angle:
    # torch.where passes nan gradients on even from the side that is not chosen.
    bent = (size > 0) & (1 - cosine**2 > 1e-10)
    angle = torch.acos(torch.where(bent, cosine, 0.0))
    w = weights[:, None]
    return tuple(
        torch.where(bent, torch.sin(share * angle) / torch.sin(angle), share)
        for share in (1 - w, w)
    )


def _standardised(z: Tensor) -> Tensor:
    """z (B, D) less its mean over D and of norm 1."""
    centred = z - z.mean(1, keepdim=True)
    return batch_mul(1 / norms(centred), centred)
