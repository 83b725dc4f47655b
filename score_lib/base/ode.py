"""Integration of ordinary differential equations on the device of the state.

`integrate` is adaptive: Dormand and Prince's embedded pair of orders 5 and 4, with the step control
of Hairer, Norsett and Wanner (*Solving Ordinary Differential Equations I*, section II.4) and the
constants of SciPy's RK45, so that results and function evaluations can be compared with it.  Its
solution can be differentiated; the gradient is that of the steps that were taken, and how long they
are counts as given.

`integrate_nodes` takes a given number of equal steps with one evaluation each.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import check_floats

# Butcher tableau: nodes, stage weights, the fifth-order solution's weights (which are also the
# last stage's: the first evaluation of a step is the last of the one before), and the difference
# between the two solutions.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

# Adams' methods (section III.1 there), by how many slopes are known: their weights, the latest
# first, that predict the next value; weights that correct it, once its slope is known and comes
# first.
_PREDICT = {3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
_CORRECT = {
    3: (9 / 24, 19 / 24, -5 / 24, 1 / 24),
    4: (251 / 720, 646 / 720, -264 / 720, 106 / 720, -19 / 720),
}

_SAFETY, _SHRINK_MOST, _GROW_MOST = 0.9, 0.2, 10.0
_EXPONENT = -1 / 5


def integrate(
    fn: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    t0: float,
    t1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    per_sample: bool = False,
) -> tuple[Tensor, int]:
    """Solve dy/dt = fn(t, y) from t0 to t1, forwards or backwards.

    The host reads the device once a step, whether to go on, and more for a gradient; everything
    else stays there.

    Where y or what fn returns carries a gradient, so does the solution (RK45 only): accepted steps
    keep what their backward pass needs, and what fn computed in a rejected one is let go.

    Args:
        fn: function of t (B,) and y (B, *D), in the dtype of y, giving dy/dt (B, *D).
        y: state at t0, (B, *D); its dtype is that of the integration.
        t0, t1: start and end of time.
        rtol, atol: tolerances: a step's error is kept below atol + rtol |y|, in the root mean
            square over the batch.
        method: "RK45", or another method of `scipy.integrate.solve_ivp`, which runs on the host.
        per_sample: control each sample's step by its own error alone, so that the result does not
            depend on who else is in the batch.  RK45 only.
    Returns:
        y at t1, (B, *D), and the number of evaluations of fn.
    Raises:
        ValueError: an unknown method, per_sample or a gradient with one other than RK45, y is not
            of real floating-point numbers, or as in `check_tolerances`.
        FloatingPointError: the step became smaller than rounding (fn is stiff or not finite).
    """
    check_floats("the state of an ODE", y)
    check_tolerances(rtol, atol)
    if not y.numel():  # nothing moves, and no error of a step can be measured
        return y, 0
    if method == "RK45":
        return _RK45(fn, y, t1, rtol, atol, per_sample).run(t0)
    if per_sample:
        raise ValueError(f"per-sample error control needs method 'RK45', not {method!r}")
    return _integrate_on_host(fn, y, t0, t1, rtol, atol, method)


def check_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that no step can keep, and those whose sign would be lost.

    Raises:
        ValueError: one of them is negative or not finite, or both are 0.
    """
    if not (min(rtol, atol) >= 0 and 0 < rtol + atol < math.inf):
        raise ValueError(
            f"tolerances are numbers of 0 or more, not both 0: not rtol = {rtol} and atol = {atol}"
        )


def integrate_nodes(
    fn: Callable[[int, Tensor], Tensor], y: Tensor, width: float, steps: int
) -> tuple[Tensor, int]:
    """Solve dy/du = fn from node 0 to node `steps`, which are `width` apart.

    Predicts with Adams and Bashforth's formula of order 4 and corrects with Adams and Moulton's of
    order 5; a slope at the corrected value is not taken.  Node 3, before which there is one slope
    less, is reached by the formulas below these.

    Args:
        fn: function of the number of a node and y (B, *D), giving dy/du (B, *D) there.
        y: state at node 0, (B, *D).
        steps: at least 3.
    Returns:
        y at the last node, and the number of evaluations of fn.
    Raises:
        ValueError: fewer than 3 steps.
    """
    if steps < 3:
        raise ValueError(f"this solver takes at least 3 steps, not {steps}")
    y, slopes = _first_two(fn, y, width)
    for node in range(3, steps + 1):
        known = len(slopes)
        slopes = [fn(node, y + width * _weighted(_PREDICT[known], slopes)), *slopes]
        y = y + width * _weighted(_CORRECT[known], slopes)
        slopes = slopes[:4]
    return y, steps + 3


def _first_two(fn, y, width) -> tuple[Tensor, list[Tensor]]:
    """y at node 2, and the slopes at nodes 2, 1 and 0.

    A parabola through the three slopes, integrated; twice, from slopes of the second order first.
    """
    first = fn(0, y)
    one = fn(1, y + width * first)
    two = fn(2, y + 2 * width * one)
    at_two = y + width / 3 * (first + 4 * one + two)
    one = fn(1, y + width / 12 * (5 * first + 8 * one - two))
    two = fn(2, at_two)
    return y + width / 3 * (first + 4 * one + two), [two, one, first]


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


class _RK45:
    """One integration.  Steps are controlled in G groups: the whole batch, or every sample.

    Inside, the state is (G, n), and time, step size and error are (G,).
    """

    def __init__(self, fn, y, t1, rtol, atol, per_sample):
        self.fn, self.shape, self.t1, self.rtol, self.atol = fn, y.shape, t1, rtol, atol
        self.y = y.reshape(y.shape[0] if per_sample else 1, -1)
        self.nfev = 0
        like = {"dtype": y.dtype, "device": y.device}
        self.a = [torch.tensor(row, **like) for row in _A]
        self.e = torch.tensor(_E, **like)

    def run(self, t0: float) -> tuple[Tensor, int]:
        y, t = self.y, self.y.new_full((len(self.y),), t0)
        # All times are counted along the direction of integration.
        sign = 1.0 if self.t1 >= t0 else -1.0
        slope = self._evaluate(t, y)
        h = self._first_step(t, y.detach(), slope.detach(), sign).detach()
        rejected = torch.zeros_like(t, dtype=torch.bool)
        left = sign * (self.t1 - t)
        while True:
            h = torch.minimum(h, left)
            rounding = 10 * (torch.nextafter(t, torch.full_like(t, torch.inf)) - t)
            stuck = ~(h >= rounding) & (left > 0)  # also by a step that is no number
            goes_on, some_stuck = torch.stack([(left > 0).any(), stuck.any()]).tolist()
            if not goes_on:
                return y.reshape(self.shape), self.nfev
            if some_stuck:
                raise FloatingPointError(
                    f"the ODE cannot be integrated beyond t = {t.min():.3g} to {t.max():.3g}: the "
                    "step has become smaller than rounding; is the score finite there, and the "
                    "tolerance above rounding?"
                )
            y_new, slope_new, error = self._step(t, y, slope, sign * h)
            accepted = (error < 1) & (left > 0)
            if y_new.requires_grad and bool((~accepted & (left > 0)).any()):
                y_new, slope_new = self._retake(t, y, slope, sign * h, accepted)
            t = torch.where(accepted, torch.where(h == left, self.t1, t + sign * h), t)
            y = torch.where(accepted[:, None], y_new, y)
            slope = torch.where(accepted[:, None], slope_new, slope)
            h = h * self._factor(error, accepted, rejected)
            rejected = ~accepted
            left = sign * (self.t1 - t)

    def _evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfev += 1
        slope = self.fn(t.expand(self.shape[0]), y.reshape(self.shape))
        return slope.to(y.dtype).reshape(y.shape)

    def _step(self, t, y, slope, h):
        """The fifth-order step, the slope at its end, and its error relative to tolerance."""
        stages = torch.empty(len(_C), *y.shape, dtype=y.dtype, device=y.device)
        stages[0] = slope
        for i in range(1, len(_C)):
            y_new = y + h[:, None] * torch.tensordot(self.a[i], stages[:i], dims=1)
            stages[i] = self._evaluate(t + _C[i] * h, y_new)
        return y_new, stages[-1], self._error(y, y_new, stages, h)

    @torch.no_grad()
    def _error(self, y, y_new, stages, h):
        error = h[:, None] * torch.tensordot(self.e, stages, dims=1)
        scale = self.atol + self.rtol * torch.maximum(y.abs(), y_new.abs())
        # nan counts as an infinite error.
        return torch.nan_to_num(_rms(error / scale), nan=torch.inf)

    def _retake(self, t, y, slope, h, accepted):
        """The step again with size 0 in the groups that rejected it, and the slope at its end.

        Choosing accepted results alone is not enough for a gradient: it counts what a rejected step
        computed 0 times, which is nan where that overflowed.
        """
        if not accepted.any():
            return y, slope
        return self._step(t, y, slope, torch.where(accepted, h, 0.0))[:2]

    def _first_step(self, t, y, slope, sign):
        """A step at which an explicit Euler step would change little."""
        scale = self.atol + self.rtol * y.abs()
        size, speed = _rms(y / scale), _rms(slope / scale)
        small = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(small, 1e-6, 0.01 * size / speed).clamp(max=sign * float(self.t1 - t[0]))
        ahead = self._evaluate(t + sign * h, y + sign * h[:, None] * slope)
        bend = torch.maximum(speed, _rms((ahead - slope) / scale) / h)
        longer = torch.where(bend <= 1e-15, (h * 1e-3).clamp(min=1e-6), (0.01 / bend) ** 0.2)
        return torch.minimum(100 * h, longer)

    @staticmethod
    def _factor(error, accepted, rejected_before):
        """Size of the next step relative to this one; no growth right after a rejection."""
        factor = _SAFETY * error**_EXPONENT
        growth = factor.clamp(max=_GROW_MOST)
        growth = torch.where(rejected_before, growth.clamp(max=1.0), growth)
        return torch.where(accepted, growth, factor.clamp(_SHRINK_MOST, 1.0))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=1).sqrt()


def _integrate_on_host(fn, y, t0, t1, rtol, atol, method):
    from scipy import integrate as scipy_integrate

    def to_host(x: Tensor):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"a gradient cannot pass through method {method!r}, which runs on the host: use "
                "'RK45', or torch.no_grad() if none is wanted"
            )
        return x.reshape(-1).double().cpu().numpy()

    def slope(t, flat):
        state = torch.from_numpy(flat).reshape(y.shape).to(y)
        return to_host(fn(y.new_full((y.shape[0],), t), state))

    start = to_host(y)
    solution = scipy_integrate.solve_ivp(
        slope, (t0, t1), start, rtol=rtol, atol=atol, method=method, t_eval=(t1,)
    )
    if not solution.success:
        raise FloatingPointError(f"the ODE solver {method} failed: {solution.message}")
    return torch.from_numpy(solution.y[:, -1]).reshape(y.shape).to(y), solution.nfev
