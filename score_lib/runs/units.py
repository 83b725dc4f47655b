"""Units of log-likelihoods: bits/dim of grey levels, nats of continuous data."""

import dataclasses
from collections.abc import Callable

import numpy as np
from torch import Tensor

from score_lib.data.standardization import Standardization
from score_lib.likelihood import bits_per_dim, offsets


@dataclasses.dataclass(frozen=True)
class BitsPerDim:
    """-log2 P of a grey level for each dimension.

    Args:
        inverse_scaler: from the network's range to [0, 1]; affine.
        dimensions: of an example.
    """

    inverse_scaler: Callable[[Tensor], Tensor]
    dimensions: int
    name, title = "bpd", "bits/dim"

    def of(self, log_p: Tensor, levels: int) -> Tensor:
        """From log densities in the network's range, (B,), in nats."""
        return bits_per_dim(log_p, self.dimensions, self.inverse_scaler, levels)

    def offsets(self, levels: int) -> dict[str, np.ndarray]:
        """The terms besides -log2 p / D."""
        dequantisation, scaling = offsets(self.inverse_scaler, levels)
        return {"dequantisation": np.array(dequantisation), "scaling": np.array(scaling)}


@dataclasses.dataclass(frozen=True)
class Nats:
    """-log p of continuous data: the density of the user's own units."""

    scaler: Standardization
    name, title = "nats", "nats"

    def of(self, log_p: Tensor, levels: int = 0) -> Tensor:
        """From log densities in the network's range, (B,); there are no levels."""
        return self.scaler.log_volume - log_p

    def offsets(self, levels: int = 0) -> dict[str, np.ndarray]:
        """The term besides -log p."""
        return {"scaling": np.array(self.scaler.log_volume)}
