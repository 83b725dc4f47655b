"""Constraints by a linear measurement y = A x_0 + sigma_y n."""

import math

from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.inverse.operators import LinearOperator
from score_lib.samplers.constraints import Constraint

# Builders take (operator, measurement, noise_std) and `bounds`, the range of the data.
RESTORATIONS = Registry("restoration method")
register_restoration = RESTORATIONS.register


class Measured(Constraint):
    """Samples agree with a linear measurement y = A x_0 + sigma_y n of x_0.

    Args:
        operator: A.
        measurement: y, (B, *M), of data in the network's range.
        noise_std: sigma_y.
    Raises:
        ValueError: the operator is not one, the measurement does not fit it or is not finite, or
            the noise is negative.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"the operator is an object such as GaussianBlur((3, 32, 32)), not {operator!r}"
            )
        if tuple(measurement.shape[1:]) != tuple(operator.measured_shape):
            raise ValueError(
                f"the measurement has shape {tuple(measurement.shape)}, but {operator!r} gives "
                f"(B, {', '.join(map(str, operator.measured_shape))})"
            )
        check_floats("the measurement", measurement)
        if not (noise_std >= 0 and math.isfinite(noise_std)):
            raise ValueError(f"the noise of a measurement is 0 or more, not {noise_std}")
        self.operator, self.noise_std = operator, noise_std
        self.measurement = operator.observed(measurement)
        if not self.measurement.isfinite().all():
            raise ValueError("the measurement holds values that are not finite numbers")


def check_floats(what: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"{what} should hold floating-point numbers in the network's range, not {x.dtype}: "
            "divide bytes by 255, and use the scaler"
        )
