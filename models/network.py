"""The base class of all networks."""

import logging
from collections.abc import Mapping

from torch import nn

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
    """

    has_idle_parameters = False
    uses_sigmas = False
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
