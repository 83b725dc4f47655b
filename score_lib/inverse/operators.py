"""Linear measurements y = A x + sigma_y n: the interface.

An operator is one class.  `apply` and `adjoint` are A and its transpose; methods that need more
call `spectral`, which weights the singular values d of A = U diag(d) V^T:

    @register_operator(name="every_other")
    class EveryOther(Separable):
        def __init__(self, shape):
            super().__init__(shape, [*[None] * (len(shape) - 1), torch.eye(shape[-1])[::2]])

Throughout, x is (B, *D) and y is (B, *M).  The constants of an operator are computed once, in
float64, and used in the dtype and on the device of its argument.
"""

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.base.tensors import check_floats, normal_noise

# Builders take the shape D first.
OPERATORS = Registry("operator")
register_operator = OPERATORS.register

Shape = Sequence[int]
Weight = Callable[[Tensor], Tensor]


class LinearOperator(abc.ABC):
    """y = A x, for x of one shape.

    Abstract are only `apply` and `adjoint`.

    Args:
        shape: D, such as (C, H, W).
        measured_shape: M; default: as D.
    Attributes:
        rcond: singular values up to rcond times the largest one count as zero, in every dtype.
            The inverse of a blur would amplify float32 rounding in smaller ones.
    """

    rcond = 1e-5

    def __init__(self, shape: Shape, measured_shape: Shape | None = None):
        self.shape = tuple(int(n) for n in shape)
        self.measured_shape = self.shape if measured_shape is None else tuple(measured_shape)

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x, (B, *M).  ValueError: x is not (B, *D)."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *D).  ValueError: y is not (B, *M)."""

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        """V w(d) V^T x, (B, *D): x with weights along the right singular vectors of A.

        Args:
            x: (B, *D).
            weight: function, entry by entry, of the nonzero singular values d, (1, R), giving
                weights (1, R) or (B, R); coefficients (B,) of the samples enter it as `s[:, None]`.
                Equal singular values may be given once.  The null space of A has weight 0.
        Raises:
            NotImplementedError: the singular values are not known.
            ValueError: the weights have another shape.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not know its singular values: define spectral(x, weight), "
            "or choose a method that needs only apply and adjoint"
        )

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, (B, *D): of all x for which |y - A x| is least, the smallest."""
        x = self.spectral(self.adjoint(y), lambda d: d**-2)
        # The rounding of A^T y was divided by d^2; that of what x leaves of y is small beside it.
        return x + self.spectral(self.adjoint(y - self.apply(x)), lambda d: d**-2)

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x, (B, *D): the component of x in the row space of A."""
        return self.spectral(x, torch.ones_like)

    def gram(self, y: Tensor) -> Tensor:
        """A A^T y, (B, *M)."""
        return self.apply(self.adjoint(y))

    def observed(self, y: Tensor) -> Tensor:
        """y (B, *M) with zeros where nothing is measured; by default every entry is."""
        return y

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """The measurement as an image, (B, *D), with `fill` where nothing is known.

        By default A^+ y, or A^T y where the singular values are not known.
        """
        has_spectrum = type(self).spectral is not LinearOperator.spectral
        return self.pinv(y) if has_spectrum else self.adjoint(y)

    def check_x(self, x: Tensor) -> Tensor:
        """x itself.  ValueError: it is not (B, *D), or not of real floating-point numbers."""
        return self._check(x, self.shape, "x")

    def check_y(self, y: Tensor) -> Tensor:
        """y itself.  ValueError: it is not (B, *M), or not of real floating-point numbers."""
        return self._check(y, self.measured_shape, "y")

    def _check(self, tensor, shape, name):
        if tensor.dim() == 0 or tuple(tensor.shape[1:]) != shape:
            expected = ", ".join(map(str, ("B", *shape)))
            raise ValueError(
                f"{type(self).__name__} takes {name} of shape ({expected}), "
                f"not {tuple(tensor.shape)}"
            )
        # A matrix that is rounded to integers would give wrong numbers.
        check_floats(f"{name} of {type(self).__name__}", tensor)
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape})"


def measure(
    operator: LinearOperator,
    x: Tensor,
    noise_std: float = 0.0,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y = A x + sigma_y n.

    Args:
        operator: A.
        x: (B, *D).
        noise_std: sigma_y; without noise none is drawn.
        noise: where standard normal noise comes from; called like `torch.randn_like`.
    Returns:
        y (B, *M); there is no noise where nothing is measured.
    Raises:
        ValueError: the standard deviation is negative, or x does not fit the operator.
    """
    if noise_std < 0:
        raise ValueError(f"the noise's standard deviation is 0 or more, not {noise_std}")
    y = operator.apply(x)
    if noise_std == 0:
        return y
    return y + noise_std * operator.observed(normal_noise(noise)(y))


def checked_weights(weight: Weight, d: Tensor, batch: int) -> Tensor:
    """weight(d) for d (1, R): (1, R) or (batch, R)."""
    weights = weight(d)
    R = d.shape[1]
    if weights.dim() != 2 or weights.shape[0] not in (1, batch) or weights.shape[1] not in (1, R):
        raise ValueError(
            f"weights of {R} singular values have shape (1, {R}) or ({batch}, {R}), not "
            f"{tuple(weights.shape)}; coefficients (B,) of the samples enter as s[:, None]"
        )
    return weights.expand(-1, R)


def sides_of(shape: Shape) -> tuple[int, ...]:
    """The lengths of the axes of D that are not channels: all but the first, or an only one."""
    return tuple(shape[1:]) or tuple(shape)
