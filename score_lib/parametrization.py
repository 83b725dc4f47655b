"""The meaning of a network's output, besides the convention that each process was published with.

A parametrisation says how the score is made of a network F, for noisy data x = m x_0 + s z:

    score(x, t) = skip(t) x + out(t) F(scale(t) x, label(t))

Its coefficients are functions of m(t) and s(t) only, so that one class suits every process whose
mean is m(t) x_0, as it is wherever the drift is linear.  With y = x / m and sigma = s / m, that is
y = x_0 + sigma z, as Karras et al. 2022 write it.  For a network of discrete noise levels, m and s
are those of the level that it is told.
"""

import abc
import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.sdes.process import SDE

_PARAMETRIZATIONS = Registry("model.parametrization")


class Coefficients(NamedTuple):
    """Those of score = skip x + out F(scale x, label), each (B,)."""

    skip: Tensor
    out: Tensor
    scale: Tensor


class Parametrization(abc.ABC):
    """The meaning of a network's output, input and label at the times of a process."""

    @abc.abstractmethod
    def coefficients(self, m: Tensor, s: Tensor) -> Coefficients:
        """skip, out and scale, each (B,), where x_t = m x_0 + s z, with m and s (B,)."""

    def label(self, sde: SDE, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
        """The label (B,) that the network gets for time t (B,); the process's own by default.

        For discrete noise levels, the process's own label is their index.
        """
        return sde.noise_label(t, True)

    def at(
        self, sde: SDE, t: Tensor, dimensions: int, continuous: bool = True
    ) -> tuple[Coefficients, Tensor]:
        """Coefficients and label at time t (B,), for x (B, *D) with D of so many dimensions.

        Args:
            continuous: whether the network was trained on all times, or at discrete levels.
        Raises:
            NotImplementedError: the process has no discrete noise levels.
        """
        if continuous:
            m, s = sde.scale_and_std(t, dimensions)
            return self.coefficients(m, s), self.label(sde, t, m, s)
        m, s = (value.to(t) for value in sde.level_coeffs(t))
        return self.coefficients(m, s), self._told(sde, sde.noise_label(t, False), t, m, s)

    def at_level(
        self, sde: SDE, index: Tensor, m: Tensor, s: Tensor
    ) -> tuple[Coefficients, Tensor]:
        """Coefficients and label at noise indices (B,), int64, where x is m x_0 + s z."""
        t = sde.level_time(index.to(s))
        return self.coefficients(m, s), self._told(sde, index, t, m, s)

    def _told(self, sde: SDE, index: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
        """The label for a process whose own one is a noise index."""
        discrete = copy.copy(sde)
        vars(discrete)["noise_label"] = lambda t, continuous: index
        return self.label(discrete, t, m, s)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def register_parametrization(name: str, options: Mapping[str, str] | None = None) -> Callable:
    """Class decorator: `model.parametrization = name` then selects it.

    Args:
        options: keywords of the class -> dotted names of the options that feed them.
    """
    return _PARAMETRIZATIONS.register(name=name, options=options)


@register_parametrization("score")
class Score(Parametrization):
    """F = score."""

    def coefficients(self, m, s):
        return Coefficients(torch.zeros_like(s), torch.ones_like(s), torch.ones_like(s))


@register_parametrization("noise")
class Noise(Parametrization):
    """F = z, the noise.  [Ho et al. 2020]"""

    def coefficients(self, m, s):
        return Coefficients(torch.zeros_like(s), -1 / s, torch.ones_like(s))


@register_parametrization("x0")
class Denoised(Parametrization):
    """F = E[x_0 | x_t], the denoised x."""

    def coefficients(self, m, s):
        return Coefficients(-(s**-2), m / s**2, torch.ones_like(s))


@register_parametrization("v")
class Velocity(Parametrization):
    """F = v = (m z - s x_0) / r of x / r, with r^2 = m^2 + s^2.  [Salimans and Ho 2022]

    x / r is the noisy x of a variance-preserving process at the same sigma.
    """

    def coefficients(self, m, s):
        r = torch.hypot(m, s)
        return Coefficients(-(r**-2), -m / (r * s), 1 / r)


@register_parametrization("edm", {"sigma_data": "model.sigma_data"})
class EDM(Parametrization):
    """Input and target of F have unit variance, and F is least amplified.  [Karras et al. 2022]

    Their table 1, in which the denoised x is c_skip y + c_out F(c_in y, c_noise), here for x and
    the score.

    Args:
        sigma_data: standard deviation of the data, in the network's range.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not sigma_data > 0:
            raise ValueError(f"the data's standard deviation is above 0, not {sigma_data}")
        self.sigma_data = sigma_data

    def coefficients(self, m, s):
        spread = self.sigma_data * m
        std = torch.hypot(spread, s)
        return Coefficients(-(std**-2), spread / (s * std), 1 / std)

    def label(self, sde, t, m, s):
        """c_noise = log(sigma) / 4."""
        return torch.log(s / m) / 4


def get_parametrization(which: Parametrization | str | None) -> Parametrization | None:
    """A parametrisation by its name or as it is; None for "" and None, the process's own.

    Raises:
        ValueError: an unknown name.
    """
    if which is None or which == "":
        return None
    return which if isinstance(which, Parametrization) else _PARAMETRIZATIONS.get(which)()


def parametrization_of(config) -> Parametrization | None:
    """The configured parametrisation; None for the process's own.

    Args:
        config: complete, see `score_lib.options.complete`.
    Raises:
        ValueError: an unknown name.
    """
    which = config.model.parametrization
    return _PARAMETRIZATIONS.build(which, config) if which else None
