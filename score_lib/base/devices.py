"""Which device a config, or a network, is on."""

from collections.abc import Callable

import torch
from torch import nn

from score_lib.base.distributed import local_rank, local_world


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that a name stands for; "auto" is a GPU where there is one, else the CPU.

    The GPU of "auto" and "cuda" is this process's: the first, or one per process under torchrun.

    Raises:
        ValueError: the GPU does not exist, torchrun started more processes than there are GPUs, or
            the name means nothing.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if own := chosen.type == "cuda" and chosen.index is None and local_rank() > 0:
            chosen = torch.device("cuda", local_rank())
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}: try 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    if chosen.type == "cpu":
        return torch.device("cpu")  # files do not know a CPU of a number
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        if own and count:
            raise ValueError(
                f"torchrun started {local_world()} processes on a machine of {count} GPUs: choose "
                "--nproc_per_node accordingly, or --config.device=cpu"
            )
        raise ValueError(
            f"device {str(device)!r} does not exist: this machine shows {count} CUDA devices. Try "
            "'auto' or 'cpu'"
        )
    if chosen.type != "cuda":
        _check_computes(chosen)
    return chosen


def _check_computes(device: torch.device) -> None:
    """Refuse a kind of device that this machine or this PyTorch does not have, or that lacks
    float64, as Apple's: noise levels, ODEs and likelihoods are computed in it.

    Raises:
        ValueError: it cannot hold a number.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # by the kind of device
        raise ValueError(
            f"device {str(device)!r} cannot compute here: try 'auto', 'cpu' or 'cuda' ({error})"
        ) from error


def device_of(model: Callable) -> torch.device:
    """The device of a network's parameters; for a bare function, that of "auto"."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return resolve_device("auto") if parameter is None else parameter.device
