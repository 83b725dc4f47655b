"""Building networks by name, and turning a network into a score.

The network and the process are peers that do not know each other: the process says what the
network is told (`noise_label`) and what its output means (`to_score`); this module puts the two
together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from utils.distributed import local_rank, unwrapped
from utils.registry import Registry

_MODELS = Registry("model")
register_model = _MODELS.register

# Where the networks of this project are defined; imported when one is first asked for.
_MODULES = ("ddpm", "ncsnpp", "ncsnv2", "wideresnet")


def get_model(name: str) -> type[nn.Module]:
    """The network class registered under a name.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    for module in _MODULES:
        importlib.import_module(f"models.{module}")
    return _MODELS.get(name)


def get_sigmas(config) -> np.ndarray:
    """Noise levels of SMLD, from sigma_max down to sigma_min in geometric steps.

    Returns:
        (num_scales,), float64.
    """
    model = config.model
    return np.exp(np.linspace(np.log(model.sigma_max), np.log(model.sigma_min), model.num_scales))


def get_ddpm_params(config) -> dict[str, np.ndarray | float | int]:
    """The noise schedule of DDPM: beta_i from beta_min / N to beta_max / N, and what follows.

    Returns:
        betas, alphas, alphas_cumprod, sqrt_alphas_cumprod, sqrt_1m_alphas_cumprod: float64
        (num_scales,); beta_min, beta_max: of the continuous process; num_diffusion_timesteps.
    """
    steps = config.model.num_scales
    betas = np.linspace(config.model.beta_min / steps, config.model.beta_max / steps, steps)
    alphas_cumprod = np.cumprod(1.0 - betas)
    return {
        "betas": betas,
        "alphas": 1.0 - betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_1m_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "beta_min": config.model.beta_min,
        "beta_max": config.model.beta_max,
        "num_diffusion_timesteps": steps,
    }


def create_model(config, device: torch.device | str | None = None) -> nn.Module:
    """The configured network, on a device (default: as `config.device` says).

    Raises:
        ValueError: the name is unknown, or the network refuses an option of the config.
    """
    model = get_model(config.model.name)(config)
    return model.to(resolve_device(config.get("device", "auto") if device is None else device))


def resolve_device(device: torch.device | str) -> torch.device:
    """The device a config names; "auto" is a GPU where there is one, else the CPU.

    The GPU of "auto" and "cuda" is this process's: the first, or with several processes each its
    own.

    Raises:
        ValueError: a GPU is asked for that is not there, or the name means nothing.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None and local_rank():
            chosen = torch.device("cuda", local_rank())
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}: try 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but this machine shows "
            f"{torch.cuda.device_count()} CUDA devices: try 'auto' or 'cpu'"
        )
    return chosen


def device_of(model: Callable) -> torch.device:
    """Where a network's parameters live; for a bare function, what "auto" would choose."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return resolve_device("auto") if parameter is None else parameter.device


def get_model_fn(model: Callable, train: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """`model_fn(x, labels)`: the network in training or evaluation mode.

    Args:
        model: a network, or any function of (x, labels).
        train: whether dropout is on.
    """

    def model_fn(x: Tensor, labels: Tensor) -> Tensor:
        # Setting the mode walks all submodules: only when it changes.  A wrapper's own mode may be
        # out of date, where somebody else set the network's.
        if isinstance(model, nn.Module) and unwrapped(model).training != train:
            model.train(train)
        return model(x, labels)

    return model_fn


def get_score_fn(sde, model: Callable, train: bool = False, continuous: bool = False) -> Callable:
    """`score_fn(x, t)`: the score of p_t that a network estimates for a process.

    Args:
        sde: the process; it says how time becomes a label and output becomes a score.
        model: a network, or any function of (x, labels).
        train: whether dropout is on.
        continuous: whether the network was trained on all times of [0, T] or on a grid.
    Returns:
        Function of x (B, *D) in the network's range and t (B,) in [0, T], giving (B, *D).
    """
    model_fn = get_model_fn(model, train)

    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        return sde.to_score(model_fn(x, sde.noise_label(t, continuous)), t, continuous)

    return score_fn


def get_classifier_grad_fn(classifier: Callable) -> Callable:
    """`grad_fn(x, noise_std, labels)`: gradient of log p(label | x_t) with respect to x_t.

    Args:
        classifier: a network, or any function, of x (B, *D) in the network's range and s(t) (B,),
            that gives logits (B, K).
    Returns:
        Function that gives (B, *D) for labels (B,), int64 in [0, K).  It can be differentiated
        where gradients are enabled.
    """
    logit_fn = get_model_fn(classifier)

    def grad_fn(x: Tensor, noise_std: Tensor, labels: Tensor) -> Tensor:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_(True)
            log_p = torch.log_softmax(logit_fn(at, noise_std), dim=1)
            chosen = log_p.gather(1, labels[:, None]).sum()
            return torch.autograd.grad(chosen, at, create_graph=keep)[0]

    return grad_fn


def to_flattened_numpy(x: Tensor) -> np.ndarray:
    """A tensor as a flat NumPy array on the host."""
    return x.detach().cpu().numpy().reshape(-1)


def from_flattened_numpy(x: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """A flat NumPy array as a tensor of the given shape."""
    return torch.from_numpy(x.reshape(shape))
