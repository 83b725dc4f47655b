"""Measurements of data in other units than the network's: A of x = s x' + m as one of x'."""

from torch import Tensor

from score_lib.base.tensors import Constants
from score_lib.inverse.measurements import Mask
from score_lib.inverse.operators import LinearOperator, Weight, checked_weights


class Rescaled(LinearOperator):
    """x' -> A (s x'), where A measures x = s x'.

    Args:
        operator: A.
        scale: s, above 0, of a shape that broadcasts to D.
    """

    def __init__(self, operator: LinearOperator, scale: Tensor):
        super().__init__(operator.shape, operator.measured_shape)
        self.operator, self.rcond = operator, operator.rcond
        self.scale = scale.expand(operator.shape)
        self._scale = Constants(self.scale[None])

    def apply(self, x: Tensor) -> Tensor:
        (scale,) = self._scale.like(x)
        return self.operator.apply(scale * self.check_x(x))

    def adjoint(self, y: Tensor) -> Tensor:
        (scale,) = self._scale.like(y)
        return scale * self.operator.adjoint(y)

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        if self._has_own_units():
            raise NotImplementedError(
                f"the singular values of {self.operator!r} are not known for data whose entries "
                "have units of their own: choose a method that needs only the measurement, such "
                "as pigdm, or data.standardize='all'"
            )
        first = self.scale.flatten()[0]
        return self.operator.spectral(x, lambda d: weight(d * first.to(d)))

    def pinv(self, y: Tensor) -> Tensor:
        if self._has_own_units():
            return super().pinv(y)
        # Not by way of A^T y, whose rounding would be divided by d^2.
        return self.operator.pinv(y) / self.scale.flatten()[0].to(y)

    def observed(self, y: Tensor) -> Tensor:
        return self.operator.observed(y)

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        # Not A^+ of this operator: it may need singular values, and a blur shows y itself.
        shown = self.operator.picture(y, fill)
        (scale,) = self._scale.like(shown)
        return shown / scale

    def in_own_units(self, y: Tensor) -> Tensor:
        """From A (s x') + n to A x' + n / s, (B, *M).

        Raises:
            ValueError: an entry of y may mix entries of x, and these have units of their own.
        """
        if self._has_own_units():
            raise ValueError(
                f"the noise of a measurement by {self.operator!r} has no unit where the data's "
                "entries have units of their own: set control.noise_std = 0, or train with "
                "data.standardize = 'all'"
            )
        return y / self.scale.flatten()[0].to(y)

    def _has_own_units(self) -> bool:
        return bool((self.scale != self.scale.flatten()[0]).any())


class RescaledMask(Rescaled):
    """The same of a mask, whose singular values are the units of the known entries."""

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        (scale,) = self._scale.like(x)
        weights = checked_weights(weight, scale.reshape(1, -1), len(x))
        return self.operator.apply(x * weights.reshape(-1, *self.shape))

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        return self.operator.picture(self.in_own_units(y), fill)

    def in_own_units(self, y: Tensor) -> Tensor:
        (scale,) = self._scale.like(y)
        return y / scale


def rescaled(operator: LinearOperator, scale: Tensor) -> Rescaled:
    """The operator on data in units of `scale`."""
    kind = RescaledMask if isinstance(operator, Mask) else Rescaled
    return kind(operator, scale)
