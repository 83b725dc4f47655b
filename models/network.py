"""The base class of all networks."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from score_lib.base.weights import without_wrapper

from .conditioning import Takes


class Network(nn.Module):
    """A network that also loads the state dicts of its wrappers.

    Attributes:
        has_idle_parameters: whether some parameters, which published checkpoints hold, have no
            effect and no gradient.
        takes: the conditions that it is called with, see `models.conditioning`.
        uses_sigmas: whether its labels are numbers of the noise levels in its table `sigmas`, so
            that weights trained with another table mean something else.
        checkpoint_activations: keep only the input of each block for gradients, and recompute the
            rest; in training or, if `checkpoints_evaluation`, always.
    """

    has_idle_parameters = False
    uses_sigmas = False
    checkpoint_activations = checkpoints_evaluation = False
    takes = Takes()

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """See `torch.nn.Module`; a prefix of all names, such as "module.", is dropped.

        With `strict=False`, a state dict that fits in no name is logged as a warning.
        """
        own = self.state_dict().keys()
        if isinstance(state_dict, dict):
            state_dict = without_wrapper(state_dict, own)
        if not strict and own.isdisjoint(state_dict):
            logging.warning(
                "nothing was loaded: none of the %d names of this state dict, such as %r, is one "
                "of the network's, such as %r",
                len(state_dict), next(iter(state_dict), ""), next(iter(own)),
            )  # fmt: skip
        return super().load_state_dict(state_dict, strict, assign)

    def _run(self, block: nn.Module, temb: Tensor | None, *features: Tensor) -> Tensor:
        """block(h, temb) for features h (B, C_i, *S), concatenated along the channels."""

        def run(block, temb, *features):
            return block(features[0] if len(features) == 1 else torch.cat(features, dim=1), temb)

        if not self._recomputes():
            return run(block, temb, *features)
        weights = dict(block.named_parameters())

        def run_as_then(temb, *features):
            return run(_as_then(block, weights), temb, *features)

        return checkpoint(run_as_then, temb, *features, use_reentrant=False)

    def _recomputes(self) -> bool:
        """Whether gradients will be taken, with activations computed a second time."""
        asked = self.checkpoint_activations and (self.training or self.checkpoints_evaluation)
        if not asked or not torch.is_grad_enabled():
            return False
        # Transforms of `torch.func` cannot recompute.
        return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def _as_then(block: nn.Module, weights: Mapping[str, Tensor]) -> Callable:
    """The block with its earlier weights: `torch.func.functional_call` puts them into a network for
    its forward pass alone, and a recomputation comes later.  Shards of others are their own."""
    for name, now in block.named_parameters():
        then = weights.get(name, now)
        if then is not now and type(then) in (Tensor, nn.Parameter):
            return lambda *inputs: functional_call(block, weights, inputs)
    return block
