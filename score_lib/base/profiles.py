"""Power-function profiles: averages over training that are chosen after training.

[Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models*, section 3
and appendix C]  The average of weights theta over steps tau up to t,

    (gamma + 1) / t^(gamma + 1) * integral of tau^gamma theta(tau) from 0 to t,

has the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).  Profiles of other gamma and t are
approximated by sums of stored ones.
"""

import math
from typing import NamedTuple

import numpy as np

# sigma_rel of gamma = 0, the plain mean.
WIDEST = 1 / math.sqrt(12)
# Before sigma_rel, in the names of averages.
POSTHOC = "posthoc_"


class Profile(NamedTuple):
    """A profile that ends at a step.

    Attributes:
        step: t, above 0.
        gamma: the exponent, at least 0.
    """

    step: int
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a relative standard deviation.  [Karras et al. 2024, appendix C]

    Args:
        sigma_rel: standard deviation of the profile as a share of its length, above 0 and up to
            1 / sqrt(12), of a plain mean.
    Raises:
        ValueError: it is outside of these bounds.
    """
    if not 0 < sigma_rel <= WIDEST * (1 + 1e-12):
        raise ValueError(
            f"sigma_rel = {sigma_rel:g} should be above 0 and at most {WIDEST:.4f}, the standard "
            "deviation of a plain mean"
        )
    # sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, a cubic; its largest root.
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(float(roots.real.max()), 0.0)


def profile_name(sigma_rel: float) -> str:
    """Such as "posthoc_0.05"."""
    return f"{POSTHOC}{float(sigma_rel)!r}"


def inner_product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles over all steps."""
    early, late = sorted((one, other))
    product = (early.gamma + 1) * (late.gamma + 1) / (early.gamma + late.gamma + 1)
    return product * (early.step / late.step) ** late.gamma / late.step


def weights_of(stored: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The sum of stored profiles that is nearest to a wanted one, in least squares.  [appendix C]

    Unlike in the paper the weights sum to 1.  Theirs do so only with many snapshots; with few, they
    would shrink the network.

    Returns:
        a weight for each stored profile, float64, and the relative error of the sum: its distance
        from the wanted profile over the latter's norm.
    """
    scale = np.array([inner_product(p, p) for p in stored]) ** -0.5  # to profiles of norm 1
    a = np.array([[inner_product(p, q) for q in stored] for p in stored]) * np.outer(scale, scale)
    b = np.array([inner_product(p, wanted) for p in stored]) * scale
    x = _least_squares(a, b, scale)
    norm = inner_product(wanted, wanted)
    error = (norm - 2 * x @ b + x @ a @ x) / norm
    return x * scale, math.sqrt(max(error, 0.0))


def _least_squares(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x with the least x a x - 2 x b, whose products with `scale` sum to 1."""
    system = np.block([[a, scale[:, None]], [scale[None], np.zeros((1, 1))]])
    return np.linalg.lstsq(system, np.append(b, 1.0), rcond=None)[0][:-1]
