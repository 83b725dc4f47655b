"""The cost of a network, found without computing anything: on PyTorch's meta device."""

import collections
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.adm_layers import AttentionBlock
from models.conditioning import UNCONDITIONAL, Condition
from models.layerspp import AttnBlockpp


class Cost(NamedTuple):
    """The cost of a network for one image."""

    parameters: int
    operations: int
    """Floating-point operations of a forward pass."""
    activations: int
    """Bytes that a forward pass keeps for its backward pass."""
    attention: dict[str, int]
    """Blocks of attention by the shape of their feature maps, such as "16x16"."""


def cost(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    label: Tensor,
    condition: Condition = UNCONDITIONAL,
) -> Cost:
    """The cost of the network that `build` makes, for images (C, H, W) and a label (1,).

    Args:
        condition: of one image.
    """
    with torch.device("meta"):
        model = build()
    x = torch.empty(1, *shape, device="meta")
    label = torch.empty_like(label, device="meta")
    condition = {kind: value.to("meta") for kind, value in condition.items()}
    found: dict[str, int] = collections.Counter()

    def seen(module: nn.Module, given: tuple) -> None:
        if isinstance(module, AttnBlockpp | AttentionBlock):
            found["x".join(map(str, given[0].shape[2:]))] += 1

    handles = [module.register_forward_pre_hook(seen) for module in model.modules()]
    kept: dict[int, torch.UntypedStorage] = {}
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, label, **condition)
    for handle in handles:
        handle.remove()
    # The counter knows plain products, but not all fused kernels of attention.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x, label, **condition)
    parameters = sum(p.numel() for p in model.parameters())
    activations = sum(storage.nbytes() for storage in kept.values())
    return Cost(parameters, counter.get_total_flops(), activations, dict(found))
