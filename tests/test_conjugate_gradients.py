"""Conjugate gradients against a direct solver."""

import pytest
import torch
from operator_cases import OPERATORS, WAITS, Operations, dense, rand, some_pairs

from score_lib.inverse.restoration import solve


def systems(dtype=torch.float64):
    """Symmetric positive definite matrices (4, 6, 6), and a function that applies them."""
    root = rand(4, 6, 6, dtype=dtype)
    S = root @ root.mT + torch.eye(6, dtype=dtype)
    return S, lambda u: torch.einsum("bij,bj->bi", S, u.flatten(1)).reshape(u.shape)


@pytest.mark.parametrize("shape", ((6,), (2, 3), (1, 6, 1)), ids=str)
@pytest.mark.parametrize("iterations", (6, 9, 100))
def test_conjugate_gradients_solve_in_as_many_steps_as_dimensions(shape, iterations):
    S, apply = systems()
    b = rand(4, *shape, seed=2)
    u = solve(apply, b, iterations)
    assert u.shape == b.shape
    expected = torch.linalg.solve(S, b.flatten(1))
    torch.testing.assert_close(u.flatten(1), expected, rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_take_a_step_for_each_distinct_eigenvalue():
    d = torch.tensor([1.0, 1.0, 7.0, 7.0, 7.0], dtype=torch.float64)
    b = rand(3, 5)
    torch.testing.assert_close(solve(lambda u: d * u, b, 2), b / d)
    assert (solve(lambda u: d * u, b, 1) - b / d).abs().max() > 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_solved_sample_stays_while_others_go_on(dtype):
    """Among them one whose right side is zero, and one that a single step solves."""
    S, _ = systems(dtype=dtype)
    S[1] = 3 * torch.eye(6, dtype=dtype)
    b = rand(4, 6, seed=2, dtype=dtype)
    b[0] = 0
    u = solve(lambda u: torch.einsum("bij,bj->bi", S, u), b, 200)
    assert (u[0] == 0).all()
    assert torch.equal(u[1], solve(lambda u: 3 * u, b[1:2], 1)[0])
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    expected = torch.linalg.solve(S.double(), b.double()).to(dtype)
    torch.testing.assert_close(u, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_singular_systems_have_their_least_solution_in_any_number_of_steps(dtype):
    root = rand(4, 6, 2, dtype=dtype)
    b = torch.einsum("bij,bj->bi", root, rand(4, 2, seed=2, dtype=dtype))
    inverse = torch.linalg.pinv(root.double())
    expected = torch.einsum("bki,bkj,bj->bi", inverse, inverse, b.double())
    floor = 8 * torch.finfo(dtype).eps * b.norm(dim=1)

    def apply(u):
        return torch.einsum("bik,bjk,bj->bi", root, root, u)

    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    for iterations in (2, 20, 200):
        u = solve(apply, b, iterations, floor=floor).double()
        torch.testing.assert_close(u, expected, rtol=tolerance, atol=tolerance)


def test_tolerance_is_relative_to_each_right_side():
    S, apply = systems()
    b = rand(4, 6, seed=2) * torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)[:, None]
    u = solve(apply, b, 50, tolerance=0.1)
    residual = (b - apply(u)).norm(dim=1) / b.norm(dim=1)
    assert (residual <= 0.1).all() and (residual > 1e-6).all()
    for k in range(4):
        alone = solve(lambda u, k=k: u @ S[k], b[k : k + 1], 50, tolerance=0.1)
        torch.testing.assert_close(u[k : k + 1], alone)


def test_conjugate_gradients_never_wait_for_the_device():
    calls = []

    def apply(u):
        calls.append(u.shape)
        return 2 * u

    b = rand(3, 4)
    with Operations() as operations:
        solve(apply, b, 7)
    assert len(calls) == 7
    assert not WAITS & set(operations.names)


def test_gradients_of_a_solution():
    """Among them those of a sample that was solved from the start: nothing is divided by zero."""
    S, apply = systems()
    b, c = rand(4, 6, seed=2), rand(4, 6, seed=3)
    b[0] = 0
    b.requires_grad_()
    (gradient,) = torch.autograd.grad((c * solve(apply, b, 20)).sum(), b)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[1:], torch.linalg.solve(S, c)[1:], rtol=1e-6, atol=1e-6)


@OPERATORS
def test_conjugate_gradients_on_the_system_of_a_noisy_measurement(make):
    """(sigma_y^2 I + A A^T) u = r."""
    operator = make((2, 8, 6))
    _, r = some_pairs(operator)
    matrix = dense(operator)
    S = 0.3**2 * torch.eye(len(matrix), dtype=torch.float64) + matrix @ matrix.T
    u = solve(lambda u: 0.3**2 * u + operator.gram(u), r, 3 * len(matrix))
    expected = torch.linalg.solve(S, r.flatten(1), left=False)
    torch.testing.assert_close(u.flatten(1), expected, rtol=1e-6, atol=1e-6)
