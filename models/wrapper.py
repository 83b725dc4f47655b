"""The base of networks that are called in another way."""

from torch import nn


class Wrapper(nn.Module):
    """Another way to call a network; mode and state dict are the network's own.

    Attributes:
        comes_last: whether no other wrapper goes around this one.
    Raises:
        ValueError: the network has such a wrapper already, or one that comes last.
    """

    comes_last = False

    def __init__(self, module: nn.Module):
        super().__init__()
        for inner in module.modules():
            if isinstance(inner, type(self)) or getattr(inner, "comes_last", False):
                raise ValueError(
                    f"the network is wrapped already: apply {type(self).__name__} once, and "
                    "Compiled or Replayed last"
                )
        self.module = module

    @property
    def training(self) -> bool:
        """Whether the network is in the mode of training."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """No-op: `train` and `eval` also set the network, which is a child."""

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)
