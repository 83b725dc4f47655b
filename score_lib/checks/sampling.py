"""Samplers and correctors on distributions whose scores are known.

Whether a number of steps is enough depends on the sampler alone, so that no network is needed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import rows, seeded
from score_lib.checks.exact import binary, gaussian, told_by_time
from score_lib.checks.finding import NOTE, OK, WRONG, Finding, graded
from score_lib.checks.process import DATA_STD
from score_lib.inverse.measurements import Mask
from score_lib.samplers.accuracy import MOST_ERROR, PUBLISHED, final_std
from score_lib.samplers.grids import visited_times
from score_lib.samplers.loop import Constraint
from score_lib.samplers.steps import Corrector, Predictor
from score_lib.sdes.process import SDE

MEAN = 0.2
# Enough for a standard error of 1 % of the deviation of (1, 2, 2) entries.
COUNT = 2048

# From a process and a shape to a sampler in the network's range.
Build = Callable[[SDE, tuple[int, ...]], Callable]


def sampler(build: Build, sde: SDE, shape: tuple[int, ...] = (1, 2, 2)) -> list[Finding]:
    """Bias and spread of samples of a Gaussian, and distance of binary data from their values.

    Args:
        build: `build(sde, (B, *D))` gives a sampler whose inverse scaler is the identity.
        shape: D of data that the process can take.
    """
    exact = told_by_time(sde)
    try:
        drawn = [_draw(build, exact, shape, kind) for kind in (gaussian(sde, MEAN), binary(sde))]
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        return [Finding("sampler", WRONG, str(error))]
    (x, evaluations), (pixels, _) = drawn
    bias, spread = (x.mean().item() - MEAN) / DATA_STD, x.std().item() / DATA_STD - 1
    error = max(abs(bias), abs(spread))
    distance = (pixels.abs() - 1).square().mean().sqrt().item()
    enough = "enough" if error < 0.06 and distance <= MOST_ERROR else "not enough"
    return [
        graded(
            "sampler, Gaussian",
            error,
            0.06,
            0.15,
            f"{evaluations} evaluations: mean off by {bias:+.1%} and spread by {spread:+.1%} of "
            f"the data's deviation; {enough}",
        ),
        graded(
            "sampler, pixels",
            distance,
            MOST_ERROR,
            0.1,
            f"binary data come out {distance:.1e} from their values; {enough}",
        ),
    ]


def _draw(build: Build, sde: SDE, shape: tuple[int, ...], score: Callable) -> tuple[Tensor, int]:
    with seeded(0):
        x, evaluations = build(sde, (COUNT, *shape))(score)
    return x, evaluations


def order(
    build: Callable[[int], Callable], sde: SDE, steps: int, shape: tuple[int, ...] = (1, 2, 2)
) -> list[Finding]:
    """Order of convergence of a deterministic sampler, from `steps`, twice and 8 times as many.

    Args:
        build: from a number of steps to a sampler `sample(score, z)` of batches (64, *D).
    """
    z = told_by_time(sde).prior_from_normal(
        torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    )
    score = gaussian(sde, MEAN)
    few, more, most = (build(n * steps)(score, z)[0] for n in (1, 2, 8))
    errors = [(x - most).square().mean().sqrt().item() for x in (few, more)]
    if errors[1] < 1e-6:
        return [Finding("order", OK, f"converged: {steps} steps are within {errors[0]:.1e}")]
    found = torch.tensor(errors[0] / errors[1]).log2().item()
    text = f"order {found:.1f}; {steps} steps are within {errors[0]:.1e} of the limit"
    return [Finding("order", OK if found > 0.7 else NOTE, text)]


def order_of_steps(
    predictor: type[Predictor],
    sde: SDE,
    steps: int,
    probability_flow: bool = False,
    shape: tuple[int, ...] = (1, 2, 2),
) -> list[Finding]:
    """The order in 1 / steps of the spread of a published predictor's samples, without sampling.

    Other predictors need not be linear, and are left out.
    """
    if predictor not in PUBLISHED:
        return []
    sde, eps, errors = told_by_time(sde), sde.sampling_eps, []
    m, s = map(float, sde.scale_and_std(torch.tensor([eps]), len(shape)))
    expected = math.hypot(m * DATA_STD, s)
    for n in (steps, 2 * steps):
        times = visited_times(sde, eps, steps=n + 1)[:-1]  # to eps, not to the data
        options = {"data_std": DATA_STD, "denoise": False}
        found = final_std(sde, predictor, times, probability_flow, len(shape), **options)
        errors.append(abs(found / expected - 1))
    text = f"spread off by {errors[0]:.1e} in {steps} steps between times"
    if min(errors) < 1e-9:
        return [Finding("order of steps", OK, f"{text}: exact")]
    found = math.log2(errors[0] / errors[1])
    return [Finding("order of steps", OK if found > 0.7 else NOTE, f"order {found:.1f}; {text}")]


def corrector(
    kind: type[Corrector],
    sde: SDE,
    snr: float,
    shape: tuple[int, ...] = (1, 2, 2),
    steps: int = 100,
) -> list[Finding]:
    """Whether corrector steps leave p_t as it is: the spread of Gaussian data after many of them.

    Args:
        snr: as configured.
        shape: D of data that the process can take.
    """
    offs = []
    for share in (0.3, 0.6, 0.9):
        t = torch.full((COUNT,), share * sde.T)
        m, s = (float(c[0]) for c in told_by_time(sde).scale_and_std(t[:1], len(shape)))
        std = ((m * DATA_STD) ** 2 + s**2) ** 0.5
        with seeded(0):
            x = std * torch.randn(COUNT, *shape)
            x, _ = kind(sde, gaussian(sde), snr, steps).update_fn(x, t)
        offs.append(x.std().item() / std - 1)
    off = sum(offs) if math.isnan(sum(offs)) else max(offs, key=abs)
    text = f"{kind.__name__}, snr {snr:g}: spread off by {off:+.1%} after {steps} steps at one time"
    return [graded("corrector", abs(off), 0.05, 0.15, text)]


def restoration(
    build: Callable[..., Callable],
    sde: SDE,
    constrain: Callable[[Mask, Tensor], Constraint],
    dimensions: int = 3,
) -> list[Finding]:
    """Samples of one pixel given its neighbour, correlated by 0.8, against the exact posterior.

    Args:
        build: `build(sde, (B, *D), constraints)` gives a sampler whose inverse scaler is the
            identity.
        constrain: from an operator and a measurement to a method of restoration.
        dimensions: of data that the process can take.
    """
    correlation, known, shape = 0.8, 0.4, (*[1] * (dimensions - 1), 2)
    covariance = DATA_STD**2 * torch.tensor([[1.0, correlation], [correlation, 1.0]])

    def score(x: Tensor, t: Tensor) -> Tensor:
        m, s = (c[:, None, None] for c in sde.scale_and_std(t, x.dim() - 1))
        spread = m**2 * covariance.to(x) + s**2 * torch.eye(2).to(x)
        return -torch.linalg.solve(spread, rows(x)[..., None]).reshape(x.shape)

    operator = Mask(shape, torch.tensor([1.0, 0.0]).reshape(shape))
    y = operator.apply(torch.full((COUNT, *shape), known))
    with seeded(0):
        sample = build(told_by_time(sde), (COUNT, *shape), [constrain(operator, y)])
        x = rows(sample(score)[0])
    std = DATA_STD * (1 - correlation**2) ** 0.5
    bias = (x[:, 1].mean().item() - correlation * known) / std
    spread = x[:, 1].std().item() / std - 1
    residual = (x[:, 0] - known).abs().max().item()
    error = max(abs(bias), abs(spread), residual)
    text = (
        f"an unknown pixel beside a known one: mean off by {bias:+.1%} and spread by {spread:+.1%} "
        f"of the posterior's deviation; the known one is off by at most {residual:.1e}"
    )
    return [graded("restoration", error, 0.1, 1.5, text)]
