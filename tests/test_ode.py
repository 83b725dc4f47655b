"""The adaptive solver: against closed forms and against SciPy."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode

from sampling import get_adaptive_sampler
from score_lib.base.ode import integrate, integrate_nodes
from sde_lib import VPSDE


def oscillator(t, y):
    """y'' = -(1 + t) y, one a sample."""
    return torch.stack([y[:, 1], -(1 + t) * y[:, 0]], dim=1)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._opname == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_steps_read_no_number_by_itself():
    """A GPU would be waited for at each of them; whether to go on is read with what stops it."""
    counts = []
    for tolerance in (1e-2, 1e-6):
        with Reads() as reads:
            integrate(oscillator, torch.ones(2, 2), 0.0, 3.0, rtol=tolerance, atol=tolerance)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 1


@pytest.mark.parametrize(("t0", "t1"), ((0.0, 3.0), (2.0, -1.0)))
@pytest.mark.parametrize("tolerance", (1e-3, 1e-5, 1e-8))
def test_same_steps_as_scipy(t0, t1, tolerance):
    y = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def flat(t, y):
        return oscillator(
            torch.full((5,), t, dtype=torch.float64), torch.from_numpy(y).reshape(5, 2)
        ).reshape(-1)

    expected = solve_ivp(flat, (t0, t1), y.reshape(-1), rtol=tolerance, atol=tolerance)
    result, evaluations = integrate(oscillator, y, t0, t1, rtol=tolerance, atol=tolerance)
    assert evaluations == expected.nfev
    torch.testing.assert_close(
        result.reshape(-1), torch.from_numpy(expected.y[:, -1]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("slope", "t1"), ((lambda t, y: -1000 * y, 0.01), (lambda t, y: 0 * y + 3 * t**2, 100.0))
)
def test_steps_grow_no_more_than_those_of_scipy(slope, t1):
    """The first one by a hundred times its guess at most, also where that is of a fast decay, and
    later ones by ten, also where no error is seen."""
    options = {"rtol": 1e-5, "atol": 1e-5}
    expected = solve_ivp(slope, (0.0, t1), [1.0], **options)
    result, evaluations = integrate(slope, torch.ones(1, 1).double(), 0.0, t1, **options)
    assert evaluations == expected.nfev
    assert result.item() == pytest.approx(expected.y[0, -1], rel=1e-9)


def test_nodes_are_exact_for_parabolas():
    """All formulas are, also those for the values at which slopes are asked for."""
    width, calls = 0.5, []

    def slope(node, y):
        calls.append((node, y.item()))
        return torch.full_like(y, 2 + 3 * node * width - (node * width) ** 2)

    def exact(node):
        u = node * width
        return 3 + 2 * u + 3 / 2 * u**2 - u**3 / 3

    y, evaluations = integrate_nodes(slope, torch.full((1, 1), 3.0).double(), width, 6)
    assert y.item() == pytest.approx(exact(6)) and evaluations == len(calls)
    # The first slopes at nodes 1 and 2 are those at the ends of straight lines.
    lines = [(0, 3), (1, 3 + width * 2), (2, 3 + 2 * width * 3.25)]
    expected = lines + [(node, exact(node)) for node in (1, 2, 3, 4, 5, 6)]
    assert calls == [(node, pytest.approx(value)) for node, value in expected]


def test_exponential():
    y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    result, _ = integrate(lambda t, y: -y, y, 0.0, 2.0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result, y * math.exp(-2), rtol=1e-7, atol=0)


@pytest.mark.slow
def test_error_of_the_method_is_of_fifth_order():
    """Loosening the tolerance 32-fold lengthens the steps about twofold."""
    y = torch.ones(1, 2, dtype=torch.float64)
    counts = [integrate(oscillator, y, 0.0, 20.0, rtol=tol, atol=tol)[1] for tol in (32e-10, 1e-10)]
    assert counts[1] / counts[0] == pytest.approx(2, abs=0.3)


def test_samples_apart():
    """Each sample takes the steps that it takes alone, and late ones do not move finished ones."""
    rates = torch.tensor([[1.0], [40.0]], dtype=torch.float64)

    def decay(t, y):
        return -rates[: len(y)] * (y - torch.sin(t)[:, None])

    y = torch.ones(2, 1, dtype=torch.float64)
    both, evaluations = integrate(decay, y, 0.0, 3.0, per_sample=True)
    first, fewer = integrate(decay, y[:1], 0.0, 3.0)
    torch.testing.assert_close(both[:1], first, rtol=1e-12, atol=0)
    assert fewer < evaluations


@pytest.mark.parametrize("method", ("RK45", "DOP853"))
def test_other_methods_come_from_scipy(method):
    y = torch.ones(2, 3, dtype=torch.float64)
    result, evaluations = integrate(lambda t, y: -y, y, 0.0, 1.0, method=method)
    torch.testing.assert_close(result, y * math.exp(-1), rtol=1e-4, atol=0)
    assert evaluations > 6


def test_no_way_is_no_step():
    y = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(integrate(lambda t, y: -y, y, 1.0, 1.0)[0], y)


def test_failure_is_said():
    y = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="smaller than rounding"):
        integrate(lambda t, y: y / 0.0, y, 0.0, 1.0)
    with pytest.raises(FloatingPointError, match="smaller than rounding"):
        integrate(lambda t, y: y**2, y, 0.0, 2.0)  # infinite at t = 1
    with pytest.raises(ValueError, match="RK45"):
        integrate(lambda t, y: y, y, 0.0, 1.0, method="LSODA", per_sample=True)


@pytest.mark.parametrize(
    ("rtol", "atol"), ((-1e-5, 1e-5), (0.0, 0.0), (1e-5, -1e-5), (math.nan, 1e-5), (1e-5, math.inf))
)
def test_tolerances_that_mean_nothing_are_refused(rtol, atol):
    y = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="tolerances are numbers of 0 or more, not both 0"):
        integrate(lambda t, y: -y, y, 0.0, 1.0, rtol=rtol, atol=atol)
    with pytest.raises(ValueError, match="tolerances are numbers of 0 or more, not both 0"):
        get_adaptive_sampler(VPSDE(), (1, 1), lambda x: x, rtol=rtol, atol=atol)


def test_one_tolerance_may_be_0():
    y = torch.ones(1, 1, dtype=torch.float64)
    for tolerances in ({"rtol": 0.0, "atol": 1e-9}, {"rtol": 1e-9, "atol": 0.0}):
        found = integrate(lambda t, y: -y, y, 0.0, 1.0, **tolerances)[0]
        assert float(found) == pytest.approx(math.exp(-1), rel=1e-8)


def logistic(t, y0, rate):
    """y(t) of y' = rate y (1 - y)."""
    return y0 * torch.exp(rate * t) / (1 - y0 + y0 * torch.exp(rate * t))


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize(("t0", "t1"), ((0.0, 2.0), (1.0, -1.0)))
def test_gradients_of_a_nonlinear_flow(t0, t1, per_sample):
    y0 = torch.tensor([[0.1, 0.5], [0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    y1, _ = integrate(
        lambda t, y: rate * y * (1 - y), y0, t0, t1, rtol=1e-9, atol=1e-9, per_sample=per_sample
    )
    expected = logistic(t1 - t0, y0, rate)
    torch.testing.assert_close(y1, expected, rtol=1e-7, atol=0)
    towards = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    for gradient, true in zip(
        torch.autograd.grad(y1, (y0, rate), towards),
        torch.autograd.grad(expected, (y0, rate), towards),
        strict=True,
    ):
        torch.testing.assert_close(gradient, true, rtol=1e-6, atol=0)


def pulse(t):
    """A peak at t = 1/2, of area 1 to 2e-12 over [0, 1]."""
    width = 0.1
    return torch.exp(-(((t - 0.5) / width) ** 2)) / (width * math.sqrt(math.pi))


class Recorded:
    """A right-hand side that remembers its evaluations."""

    def __init__(self, fn):
        self.fn, self.times, self.slopes = fn, [], []

    def __call__(self, t, y):
        self.times.append(t.clone())
        self.slopes.append(self.fn(t, y))
        return self.slopes[-1]

    def went_back(self):
        """Whether each sample's time ran backwards, which it does when a step is rejected and when
        the first one is sought: (B,)."""
        return (torch.stack(self.times[2:]).diff(dim=0) < 0).any(dim=0)


@pytest.mark.parametrize("per_sample", (False, True))
def test_steps_count_as_constants_for_the_gradient(per_sample):
    """For a linear equation y_1 = R y_0, where R depends on the steps alone: the gradient is R to
    rounding, however coarse the steps are."""
    y0 = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([[3.0], [0.3]], dtype=torch.float64)
    fn = Recorded(lambda t, y: -rates * (1 + pulse(t)[:, None]) * y)
    y1, _ = integrate(fn, y0, 0.0, 1.0, rtol=1e-2, atol=1e-2, per_sample=per_sample)
    gradient = torch.autograd.grad(y1.sum(), y0)[0]
    torch.testing.assert_close(gradient, (y1 / y0).detach(), rtol=1e-13, atol=0)
    assert fn.went_back()[0]


@pytest.mark.parametrize("per_sample", (False, True))
def test_rejected_steps_leave_no_trace_in_the_gradient(per_sample):
    """y' = -c p(t) sqrt(y) is nan where a step goes too far, for the first sample only:
    sqrt(y_1) = sqrt(y_0) - c / 2."""
    y0 = torch.tensor([[1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(1.8, dtype=torch.float64, requires_grad=True)
    share = torch.tensor([[1.0], [1e-3]], dtype=torch.float64)
    fn = Recorded(lambda t, y: -c * share * pulse(t)[:, None] * torch.sqrt(y))
    y1, _ = integrate(fn, y0, 0.0, 1.0, rtol=1e-8, atol=1e-8, per_sample=per_sample)
    expected = (torch.sqrt(y0) - c * share / 2) ** 2
    torch.testing.assert_close(y1, expected, rtol=1e-5, atol=0)
    for gradient, true in zip(
        torch.autograd.grad(y1.sum(), (y0, c)),
        torch.autograd.grad(expected.sum(), (y0, c)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=0)
    assert torch.stack(fn.slopes).isnan().any(dim=0)[:, 0].tolist() == [True, False]


def test_gradients_change_no_number():
    y = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, evaluations = integrate(oscillator, y, 0.0, 3.0)
    result, as_many = integrate(oscillator, y.requires_grad_(), 0.0, 3.0)
    assert torch.equal(result, expected) and as_many == evaluations
    assert result.requires_grad and not expected.requires_grad
    with torch.no_grad():
        assert not integrate(oscillator, y, 0.0, 3.0)[0].requires_grad


def test_no_gradient_through_the_host():
    y = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"method 'DOP853', which runs on the host: use 'RK45'"):
        integrate(lambda t, y: -y, y, 0.0, 1.0, method="DOP853")
    with pytest.raises(ValueError, match="'RK45'"):
        integrate(lambda t, y: -rate * y, y.detach(), 0.0, 1.0, method="DOP853")
    with torch.no_grad():
        result, _ = integrate(lambda t, y: -rate * y, y, 0.0, 1.0, method="DOP853")
    torch.testing.assert_close(result, y.detach() * math.exp(-1), rtol=1e-4, atol=0)
