"""Small networks, recorded outputs of published ones, and the rule for the weights of both."""

from __future__ import annotations

import functools
import zlib
from types import SimpleNamespace

import numpy as np
import torch
from ml_collections import ConfigDict
from recordings import load_json, load_tensors
from torch import nn

from models.utils import get_model


@functools.cache
def golden_networks() -> dict[str, SimpleNamespace]:
    """Recorded cases by name.

    Each has config, name (of the network), state_dict (names and shapes, in order), num_params, and
    the tensors x, labels, out, cotangent and grad_x, the gradient of (out * cotangent).sum().
    """
    arrays = load_tensors("golden_networks.npz")
    keys = ("x", "labels", "out", "cotangent", "grad_x")
    return {
        case: SimpleNamespace(
            name=entry["model"],
            config=ConfigDict(entry["config"]),
            state_dict=[(name, tuple(shape)) for name, shape in entry["state_dict"]],
            num_params=entry["num_params"],
            **{key: arrays[f"{case}/{key}"] for key in keys},
        )
        for case, entry in load_json("golden_networks.json").items()
    }


def fill_weights(model: nn.Module) -> nn.Module:
    """Fill every entry of the state dict but `sigmas` with numbers drawn by its name."""
    state = {
        name: value if name == "sigmas" else drawn_weights(name, tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


@functools.lru_cache(maxsize=4096)
def drawn_weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        value = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("weight", "alpha", "gamma")):
        value = 1 + 0.1 * z
    else:
        value = z if name.endswith(".W") else 0.1 * z
    return torch.from_numpy(value.astype(np.float32))


def tiny_config(name: str = "ncsnpp", *, image_size=8, num_channels=3, centered=False, **model):
    """Config of a network that runs in milliseconds; `model` overrides options of that section."""
    common = {
        "name": name,
        "nf": 8,
        "sigma_min": 0.01,
        "sigma_max": 50,
        "num_scales": 10,
        "dropout": 0.1,
        "conditional": True,
        "scale_by_sigma": False,
    }
    refine_net = {
        "normalization": "InstanceNorm++",
        "nonlinearity": "elu",
        "interpolation": "bilinear",
    }
    unet = {
        "normalization": "GroupNorm",
        "nonlinearity": "swish",
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (4,),
        "resamp_with_conv": True,
        "conv_size": 3,
        "attention_type": "ddpm",
        "embedding_type": "positional",
        "fourier_scale": 16,
        "resblock_type": "biggan",
        "fir": False,
        "fir_kernel": [1, 3, 3, 1],
        "skip_rescale": True,
        "progressive": "none",
        "progressive_input": "none",
        "progressive_combine": "sum",
        "init_scale": 0.0,
    }
    family = refine_net if name.startswith("ncsnv2") or name == "ncsn" else unet
    data = {"image_size": image_size, "num_channels": num_channels, "centered": centered}
    return ConfigDict({"data": data, "model": {**common, **family, **model}})


def build(config) -> nn.Module:
    """The network of a config."""
    return get_model(config.model.name)(config)


def layout(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the state dict, in order."""
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def out_and_gradient(function, x, *others, cotangent=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for x, and the gradient of (out * cotangent).sum(), or of out.square().sum()."""
    x = x.clone().requires_grad_()
    out = function(x, *others)
    value = out.square() if cotangent is None else out * cotangent
    return out.detach(), torch.autograd.grad(value.sum(), x)[0]


def error(value, expected) -> float:
    """Largest difference, relative to the largest value."""
    expected = expected.to(value.device)
    return ((value - expected).abs().max() / expected.abs().max()).item()


def images(config, *, seed: int = 0) -> torch.Tensor:
    """Two images of the configured shape."""
    size = config.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, config.data.num_channels, height, width, generator=generator)
