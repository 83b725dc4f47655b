"""Whether a process is consistent: its drift with its marginals, its prior with p_T, its chain."""

import math

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample, rows, seeded
from score_lib.checks.finding import NOTE, OK, WRONG, Finding, graded
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import get_score_fn, label_at
from score_lib.sdes.coefficients import asked_as, without_refusal
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE, LinearSDE

# Standard deviation of data in the network's range, roughly that of images.
DATA_STD = 0.5
# Entries of data: checks draw thousands, and sum the trace of their Jacobian.
MOST_ENTRIES = 64


def few_entries(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of as many sides that stands for data in checks: itself, if it has few entries."""
    if math.prod(shape) <= MOST_ENTRIES:
        return shape
    return (4,) if len(shape) == 1 else (*[1] * (len(shape) - 2), 2, 2)


@torch.no_grad()
def process(
    sde: SDE,
    continuous: bool = True,
    shape: tuple[int, ...] = (1, 2, 2),
    *,
    parametrization: Parametrization | str | None = None,
) -> list[Finding]:
    """Compare the methods of a process with each other.

    Args:
        continuous: whether networks are told continuous times.
        shape: D of data that its methods can take.
        parametrization: what the network's output is, see `get_score_fn`.
    """
    sde = without_refusal(as_process(sde))
    convention = _convention(sde, continuous, shape, parametrization)
    findings = [*_marginals(sde, shape), *_prior(sde, shape), _chain(sde, shape)]
    return [*findings, convention, _ends(sde, len(shape))]


def _times(sde: SDE, shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(0.05, 0.95, 19, **asked_as(sde, len(shape))) * sde.T


def _marginals(sde: SDE, shape: tuple[int, ...]) -> list[Finding]:
    """d m / dt = a m and d s^2 / dt = 2 a s^2 + g^2, by central differences."""
    t, h = _times(sde, shape), 3e-4 * sde.T
    ones = t.new_ones(len(t), *shape)
    drift, g = sde.sde(ones, t)
    g = per_sample(g, t)
    if not torch.allclose(sde.sde(2 * ones, t)[0], 2 * drift, rtol=1e-4, atol=1e-9):
        return [Finding("marginals", NOTE, "the drift is not linear in x: no closed form to check")]
    a = rows(drift)[:, 0]
    m, s = sde.scale_and_std(t, len(shape))
    (m_up, s_up), (m_down, s_down) = (sde.scale_and_std(t + d, len(shape)) for d in (h, -h))
    slope = (m_up - m_down) / (2 * h)
    mean_error = ((slope - a * m).abs() / (a.abs() * m + 1)).max().item()
    slope = (s_up**2 - s_down**2) / (2 * h)
    expected = 2 * a * s**2 + g**2
    variance_error = ((slope - expected).abs() / (expected.abs() + g**2)).max().item()
    return [
        graded("mean of x_t", mean_error, 0.01, 0.02, f"dm/dt = a m up to {mean_error:.1e}"),
        graded(
            "variance of x_t",
            variance_error,
            0.01,
            0.02,
            f"ds^2/dt = 2 a s^2 + g^2 up to {variance_error:.1e}",
        ),
        *_forms(sde, t, {"drift_rate": a, "diffusion": g, "marginal_coeffs": (m, s)}),
    ]


def _forms(sde: SDE, t: Tensor, expected: dict) -> list[Finding]:
    """Functions of time against the methods that say the same of x, where a process has both."""
    if not isinstance(sde, LinearSDE):
        return []
    m, s = expected["marginal_coeffs"]
    ratio = m[1:] / m[:-1]
    step = ratio, torch.sqrt(s[1:] ** 2 - (ratio * s[:-1]) ** 2)
    found = {name: getattr(sde, name)(t) for name in expected}
    pairs = {name: (found[name], value) for name, value in expected.items()}
    pairs["transition"] = sde.transition(t[1:], t[:-1]), step
    errors = {name: _relative_error(*pair) for name, pair in pairs.items()}
    worst = max(errors, key=errors.get)
    text = f"{', '.join(errors)}: as sde and marginal_prob, up to {errors[worst]:.1e} in {worst}"
    return [graded("functions of time", errors[worst], 0.001, 0.01, text)]


def _relative_error(found: Tensor | tuple, expected: Tensor | tuple) -> float:
    """The largest of all entries, relative to the largest expected one."""
    if isinstance(found, tuple):
        return max(map(_relative_error, found, expected))
    largest = expected.abs().max().clamp(min=1e-9)
    return ((found - expected).abs().max() / largest).nan_to_num(math.inf).item()


def _prior(sde: SDE, shape: tuple[int, ...]) -> list[Finding]:
    with seeded(0):
        z = sde.prior_sampling((4096, *shape))
        from_noise = sde.prior_from_normal(torch.randn(4096, *shape))
    m, s = sde.scale_and_std(torch.tensor([sde.T]), len(shape))
    expected = math.sqrt(float(m) ** 2 * DATA_STD**2 + float(s) ** 2)
    found = z.std().item()
    error = max(
        abs(x.std().item() / expected - 1) + x.mean().abs().item() / expected
        for x in (z, from_noise)
    )
    log_p = sde.prior_logp(z).double().mean().item() / z[0].numel()
    entropy = math.log(found) + 0.5 * math.log(2 * math.pi * math.e)
    difference = abs(log_p + entropy)
    left = f"prior std {found:.4g}, p_T of data of std {DATA_STD:g}: {expected:.4g}"
    return [
        graded("prior", error, 0.04, 0.2, f"{left}; m(T) = {float(m):.2g}"),
        graded(
            "density of the prior",
            difference,
            0.02,
            0.05,
            f"mean log density {log_p:.4f} nats/dim, minus the entropy {-entropy:.4f}",
        ),
    ]


def _chain(sde: SDE, shape: tuple[int, ...]) -> Finding:
    """The chain of N steps against Euler-Maruyama's, whose limit it shares."""
    t = _times(sde, shape)
    x, dt = t.new_ones(len(t), *shape), sde.T / sde.N
    (f, G), (drift, g) = sde.discretize(x, t), sde.sde(x, t)
    G, g = per_sample(G, t), per_sample(g, t)
    ratios = [G**2 / (g**2 * dt)]
    if drift.abs().min() > 0:
        ratios.append(rows(f / (drift * dt))[:, 0])
    off = max(
        (ratio.log().abs().max().item() if (ratio > 0).all() else math.inf) for ratio in ratios
    )
    text = (
        f"steps of the chain of N = {sde.N} are {math.exp(-off):.2f} to {math.exp(off):.2f} of dt"
    )
    return graded("chain", off, 0.2 + 20 / sde.N, 0.7 + 20 / sde.N, text)


def _convention(
    sde: SDE,
    continuous: bool,
    shape: tuple[int, ...],
    parametrization: Parametrization | str | None,
) -> Finding:
    """The label is told for each time, and the output has a finite share in the score."""
    t = _times(sde, shape).float()
    ones = t.new_ones(len(t), *shape)
    chosen = get_parametrization(parametrization)
    label = label_at(sde, t, continuous, chosen, len(shape))
    # Of x = 0, which has no other share.
    score_fn = get_score_fn(sde, lambda *_: ones, False, continuous, parametrization=chosen)
    factor = rows(score_fn(torch.zeros_like(ones), t))[:, 0]
    std = sde.scale_and_std(t, len(shape))[1]
    finite = bool(label.isfinite().all() and factor.isfinite().all() and (factor != 0).all())
    moves = label.double().diff()
    monotone = bool((moves >= 0).all() or (moves <= 0).all()) and bool((moves != 0).any())
    if not finite or label.shape != t.shape or not monotone:
        return Finding(
            "convention",
            WRONG,
            f"labels {label[0]:.4g} to {label[-1]:.4g} should rise or fall with t, and factors of "
            f"the output, {factor[0]:.3g} to {factor[-1]:.3g}, should be finite and not 0",
        )
    kinds = {
        "the noise": (factor * std, -1.0),
        "minus the noise": (factor * std, 1.0),
        "the score": (factor, 1.0),
    }
    names = (
        k for k, (value, one) in kinds.items() if torch.allclose(value, one + 0 * value, rtol=0.02)
    )
    predicted = next(names, "a multiple of the score")
    if chosen is not None:
        predicted = f"the output of {chosen!r}"
    text = f"labels {label[0]:.4g} to {label[-1]:.4g}; the network predicts {predicted}"
    return Finding("convention", OK, text)


def _ends(sde: SDE, dimensions: int) -> Finding:
    eps = torch.tensor([float(sde.sampling_eps)])
    m, s = map(float, sde.scale_and_std(eps, dimensions))
    text = f"T = {sde.T:g}; at eps = {sde.sampling_eps:g}, m = {m:.4g} and s = {s:.3g}"
    if not s > 0:
        return Finding("times", WRONG, f"{text}: without noise the score is infinite")
    return graded("times", s / m, 0.05, 0.2, text + ("" if s < 0.05 else ": samples keep noise"))
