"""Conditions on samples.  [S21, section 5]"""

from collections.abc import Callable, Sequence

from torch import Tensor

from score_lib.sdes.process import SDE


class Constraint:
    """A condition on samples: three hooks, each a no-op unless a subclass overrides it."""

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Callable) -> Tensor:
        """x at the first time.

        Args:
            sde: the forward process.
            x: a draw from the prior, or the given start, (B, *D).
            t: the first time, (B,).
            noise: source of standard normal noise, called like `torch.randn_like`.
        Returns:
            x, (B, *D).
        """
        return x

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        """A score function of (x, t), such as score_fn with a gradient added."""
        return score_fn

    def wrap(self, sde: SDE, step: Callable, noise: Callable) -> Callable:
        """A step (x, t, s) -> (x, x_mean) that changes the result of another step.

        The condition is imposed at time t, as in the published samplers.
        """
        return step


def without_wraps(constraints: Sequence[Constraint]) -> None:
    """Refuse constraints that need a predictor-corrector sampler.

    Raises:
        ValueError: names the first.
    """
    for constraint in constraints:
        if type(constraint).wrap is not Constraint.wrap:
            raise ValueError(
                f"{type(constraint).__name__} changes the steps of a predictor-corrector sampler, "
                "and this sampler has none: use sampling.method = 'pc', or a constraint that "
                "guides the score"
            )
