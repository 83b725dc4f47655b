"""Exponential moving averages of a network's trainable parameters."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


class ExponentialMovingAverage:
    """theta' <- d theta' + (1 - d) theta after every optimisation step.  [S21, appendix G]

    The average is a bare list in the order in which the trainable parameters were created: that
    order is part of the checkpoint format.  Of half precision it is in float32: rounding would
    swallow its small steps.

    Args:
        parameters: the network's parameters; those without gradients are skipped.
        decay: d, in [0, 1]; 0 keeps the latest parameters.
        use_num_updates: warm the decay up as min(d, (1 + n) / (10 + n)) after n updates.
        schedule: gives the decay of the n-th update, n from 1, in place of that; `decay` is then
            its limit.
    Raises:
        ValueError: the decay is outside [0, 1].
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        decay: float,
        use_num_updates: bool = True,
        *,
        schedule: Callable[[int], float] | None = None,
    ):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"the decay of the moving average must be in [0, 1], not {decay}")
        self.decay, self.schedule = decay, schedule
        self.num_updates = 0 if use_num_updates else None
        self.shadow_params = _copies(parameters)
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def update(self, parameters: Iterable[Parameter]) -> None:
        """Move the average towards the parameters, after an optimisation step."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = self._decay_of(self.num_updates)
        # An average may have another precision than the parameters.
        pairs = zip(self._match(parameters), self.shadow_params, strict=True)
        current = [p if p.dtype == average.dtype else p.to(average) for p, average in pairs]
        torch._foreach_lerp_(self.shadow_params, current, 1.0 - decay)

    def _decay_of(self, update: int) -> float:
        if self.schedule is not None:
            return self.schedule(update)
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Parameter]) -> None:
        """Overwrite the parameters with the average."""
        torch._foreach_copy_(self._match(parameters), self.shadow_params)

    def store(self, parameters: Iterable[Parameter]) -> None:
        """Keep a copy of the parameters, for every `restore` after a `copy_to`."""
        self.collected_params = [p.detach().clone() for p in _trainable(parameters)]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Parameter]) -> None:
        """Bring back the parameters that the last `store` kept.

        Raises:
            RuntimeError: nothing was stored.
        """
        if not self.collected_params:
            raise RuntimeError("there is nothing to restore: call store() first")
        torch._foreach_copy_(self._match(parameters), self.collected_params)

    @contextlib.contextmanager
    def applied(self, parameters: Iterable[Parameter]) -> Iterator[None]:
        """Context in which the parameters are the average; contexts may be nested."""
        parameters = _trainable(parameters)
        own = [p.detach().clone() for p in parameters]
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict:
        """The part of a checkpoint: decay, num_updates, shadow_params."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a saved average, on the devices and in the dtypes of the present one.

        Raises:
            ValueError: the number or the shapes of the averaged parameters differ.
        """
        loaded = state_dict["shadow_params"]
        if len(loaded) != len(self.shadow_params):
            raise ValueError(
                f"the checkpoint averages {len(loaded)} parameters, the network has "
                f"{len(self.shadow_params)} trainable ones"
            )
        for i, (new, old) in enumerate(zip(loaded, self.shadow_params, strict=True)):
            if new.shape != old.shape:
                raise ValueError(
                    f"averaged parameter {i} has shape {tuple(new.shape)} in the checkpoint "
                    f"and {tuple(old.shape)} in the network"
                )
        self.decay = float(state_dict["decay"])
        updates = state_dict["num_updates"]
        self.num_updates = None if updates is None else int(updates)
        self.shadow_params = [
            new.detach().to(old, copy=True)
            for new, old in zip(loaded, self.shadow_params, strict=True)
        ]

    def _match(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        trainable = _trainable(parameters)
        if len(trainable) != len(self.shadow_params):
            raise ValueError(
                f"{len(trainable)} trainable parameters were given to an average of "
                f"{len(self.shadow_params)}"
            )
        return trainable


@contextlib.contextmanager
def averaged(ema, parameters: Iterable[Parameter]) -> Iterator[None]:
    """Context in which the parameters are the average.

    Args:
        ema: an `ExponentialMovingAverage`, or a user's own class with the published methods, of
            which `store`, `copy_to` and `restore` are called.
        parameters: the network's.
    """
    parameters = list(parameters)
    if hasattr(ema, "applied"):
        with ema.applied(parameters):
            yield
        return
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


class Averages:
    """Averages of one network beside its main one.

    Args:
        named: the averages, by name.

    Attributes:
        fresh: names of those that no checkpoint has been loaded into.
    """

    def __init__(self, named: Mapping[str, ExponentialMovingAverage]):
        self.named, self.fresh = dict(named), set(named)

    def update(self, parameters: Iterable[Parameter]) -> None:
        """Move each average towards the parameters, after an optimisation step."""
        parameters = list(parameters)
        for average in self.named.values():
            average.update(parameters)

    def state_dict(self) -> dict[str, dict]:
        """The part of a checkpoint: the state of each average."""
        return {name: average.state_dict() for name, average in self.named.items()}

    def load_state_dict(self, state_dict: Mapping[str, dict]) -> None:
        """Load the averages that were saved; the others stay as they are.

        Raises:
            ValueError: the averaged parameters differ.
        """
        for name in self.named.keys() & state_dict.keys():
            self.named[name].load_state_dict(state_dict[name])
        self.fresh = self.named.keys() - state_dict.keys()

    def restart(self, parameters: Iterable[Parameter]) -> None:
        """Begin the fresh averages at the parameters."""
        parameters = list(parameters)
        for name in self.fresh:
            self.named[name].num_updates = 0
            self.named[name].shadow_params = _copies(parameters)


def _trainable(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [p for p in parameters if p.requires_grad]


def _copies(parameters: Iterable[Parameter]) -> list[Tensor]:
    """The trainable parameters as an average begins with them."""
    return [
        p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for p in _trainable(parameters)
    ]
