"""Networks by name, and published helper functions."""

import inspect

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from models.conditioning import conditions_of
from score_lib.base.devices import resolve_device
from score_lib.base.registry import Registry
from score_lib.option_table import TABLE
from score_lib.options import complete
from score_lib.parametrization import (  # noqa: F401  (published here)
    Coefficients,
    Parametrization,
    get_parametrization,
    parametrization_of,
    register_parametrization,
)
from score_lib.scores import get_model_fn, get_score_fn  # noqa: F401  (published here)

_MODELS = Registry("model")
register_model, get_model = _MODELS.register, _MODELS.get


def get_sigmas(config) -> np.ndarray:
    """Noise levels of SMLD, from sigma_max down to sigma_min in geometric steps.

    Returns:
        (num_scales,), float64.
    """
    model = complete(config).model
    return np.exp(np.linspace(np.log(model.sigma_max), np.log(model.sigma_min), model.num_scales))


def labels_index_sigmas(config) -> bool:
    """Whether the process tells a network the number of its level in `get_sigmas`; not without one,
    as in a config of `data` and `model` alone."""
    config = complete(config)
    training, chosen = config.training, parametrization_of(config)
    if str(training.get("sde")).lower() != "vesde" or training.get("continuous", True):
        return False
    return chosen is None or type(chosen).label is Parametrization.label


def get_ddpm_params(config) -> dict[str, np.ndarray | float | int]:
    """The noise schedule of DDPM, beta_i from beta_min / N to beta_max / N, with derived tables.

    Returns:
        betas, alphas, alphas_cumprod, sqrt_alphas_cumprod, sqrt_1m_alphas_cumprod: float64
        (num_scales,); beta_min, beta_max: of the continuous process; num_diffusion_timesteps.
    """
    model = complete(config).model
    steps = model.num_scales
    betas = np.linspace(model.beta_min / steps, model.beta_max / steps, steps)
    alphas_cumprod = np.cumprod(1.0 - betas)
    return {
        "betas": betas,
        "alphas": 1.0 - betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_1m_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "beta_min": model.beta_min,
        "beta_max": model.beta_max,
        "num_diffusion_timesteps": steps,
    }


def create_model(config, device: torch.device | str | None = None) -> nn.Module:
    """The configured network, on a device (default: `config.device`).

    Raises:
        ValueError: the name is unknown, or the network lacks or refuses an option of the config.
    """
    config = complete(config)
    build = get_model(config.model.name)
    try:
        model = build(config)
    except AttributeError as error:
        option = TABLE.get(f"model.{error.name}")
        if option is None or not isinstance(error.obj, ConfigDict):
            raise
        raise ValueError(
            f"the network {config.model.name!r} needs config.model.{error.name}, which is missing: "
            f"{option.check.allowed}"
        ) from error
    _check_takes(model, config)
    return model.to(resolve_device(config.device if device is None else device))


def _check_takes(model: nn.Module, config) -> None:
    """Refuse a network whose `forward` does not take the conditions of the config, or gives no
    variances where the config asks for them."""
    taken = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    if missing := [kind for kind in conditions_of(config) if kind not in taken]:
        raise ValueError(
            f"training.condition = {config.training.condition!r}, but the network "
            f"{config.model.name!r} does not take {', '.join(missing)}: choose ncsnpp, ddpm or "
            "adm, or add a keyword of that name to its forward"
        )
    if config.model.learn_sigma and "variances" not in taken:
        raise ValueError(
            f"model.learn_sigma = True, but the network {config.model.name!r} predicts no "
            "variances: set it to False, or choose adm"
        )


def to_flattened_numpy(x: Tensor) -> np.ndarray:
    """A tensor as a flat NumPy array on the host."""
    return x.detach().cpu().numpy().reshape(-1)


def from_flattened_numpy(x: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """A flat NumPy array as a tensor of the given shape."""
    return torch.from_numpy(x.reshape(shape))
