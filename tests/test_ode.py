"""The adaptive solver: against closed forms and against SciPy."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from utils.ode import integrate


def oscillator(t, y):
    """y'' = -(1 + t) y, one a sample."""
    return torch.stack([y[:, 1], -(1 + t) * y[:, 0]], dim=1)


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


def test_exponential():
    y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    result, _ = integrate(lambda t, y: -y, y, 0.0, 2.0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result, y * math.exp(-2), rtol=1e-7, atol=0)


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
    with pytest.raises(RuntimeError, match="smaller than rounding"):
        integrate(lambda t, y: y / 0.0, y, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="smaller than rounding"):
        integrate(lambda t, y: y**2, y, 0.0, 2.0)  # infinite at t = 1
    with pytest.raises(ValueError, match="RK45"):
        integrate(lambda t, y: y, y, 0.0, 1.0, method="LSODA", per_sample=True)
