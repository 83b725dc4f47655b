"""Decays of moving averages that change while training."""

from typing import NamedTuple


class HalfLife(NamedTuple):
    """Decays of an average whose weights halve every so many images.  [Karras et al. 2022]

    Attributes:
        images: the half-life, in images.
        rampup: the half-life is at most this share of the images seen before; 0: no such bound.
        batch_size: images of a step.
        more: images seen by then, beyond those of so many steps; steps may have been larger before.
    """

    images: float
    rampup: float
    batch_size: int
    more: int = 0

    @property
    def decay(self) -> float:
        """The decay after the ramp-up."""
        return 0.5 ** (self.batch_size / self.images)

    def __call__(self, update: int) -> float:
        """Decay of an update, numbered from 1."""
        if not self.rampup:
            return self.decay
        # As published, images of the present step do not count: the first decay is 0.
        seen = (update - 1) * self.batch_size + self.more
        images = min(self.images, self.rampup * seen)
        return 0.5 ** (self.batch_size / images) if images else 0.0


class PowerDecay(NamedTuple):
    """Decays that give an average a power-function profile.  [Karras et al. 2024, section 3.1]

    After t updates the weight of update i is (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1).
    """

    gamma: float

    def __call__(self, update: int) -> float:
        """Decay of an update, numbered from 1."""
        return (1 - 1 / update) ** (self.gamma + 1)
