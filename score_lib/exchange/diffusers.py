"""Pipelines of Diffusers as our networks and processes, and back.

The library itself is not needed, and nothing in its folders is run.
"""

import os
import pathlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from models.unet import UNet
from models.utils import create_model
from score_lib.base.devices import resolve_device
from score_lib.base.distributed import unwrapped
from score_lib.disk.fit import is_finite
from score_lib.exchange import folders, schedulers, unet_configs, unet_names
from score_lib.exchange.errors import ExchangeError
from score_lib.options import Config, complete
from score_lib.sdes.process import SDE

_FIRST_DENSE = "time_embedding.linear_1.weight"
# Options beside the network and the process that training and evaluation need.
_RUN = {"data": {"dataset": "IMAGES"}, "model": {"ema_rate": 0.9999}}


def load_diffusers(
    folder: str | os.PathLike, device: torch.device | str = "auto"
) -> tuple[UNet, SDE | None, dict[str, object]]:
    """The network and the process of a pipeline, or a bare UNet2DModel, that Diffusers saved.

    Args:
        folder: with subfolders, as today, or without, as in 2022; weights are .safetensors or .bin.
        device: of the network; "auto" is a GPU where there is one.
    Returns:
        the network, in evaluation mode and float32; the process, None for a bare network; and
        facts: "config", complete, with which `models.utils.create_model` builds the same network
        and `get_sampling_fn` samples as the pipeline does; "sampling", the options of its scheduler
        by its own names; "scheduler" and "pipeline", the classes; "dtype" of the stored weights;
        "versions" of the library that wrote it; "notes", sentences for the user.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a part is missing, damaged or hostile, or the network is not one of ours; the
            message is one sentence that says why.
    """
    where = resolve_device(device)
    found = folders.open_folder(folder)
    options = unet_configs.checked(found.config, found.network)
    process = None
    if found.process is not None:
        process = schedulers.read(found.scheduler, found.process, found.pipeline)
    config = _config(unet_configs.to_ours(options), process)
    # Each weight takes at least a byte, so that no small file makes a large network.
    if unet_configs.fewest_weights(options) > found.weights.stat().st_size:
        raise ExchangeError(f"{found.weights} is too small for the network in {found.config}")
    stored = folders.read_weights(found.weights)
    model = _network(found.config, config)
    unet_configs.check_groups(found.config, model, options)
    names = _check_fit(found.weights, stored, model)
    theirs = {today: stored[name] for name, today in names.items()}
    weights = _our_weights(theirs, model, flipped=options["flip_sin_to_cos"])
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    model.load_state_dict({**model.state_dict(), **weights})
    facts = {
        "config": config,
        "pipeline": found.pipeline,
        "scheduler": "" if process is None else found.process["_class_name"],
        "sampling": {} if process is None else process.sampling,
        "dtype": ", ".join(sorted(dtypes)),
        "versions": found.versions,
        "notes": _notes(config, process),
    }
    return model.to(where), None if process is None else process.sde, facts


def _config(ours: dict[str, dict], process: schedulers.Process | None) -> Config:
    parts = [_RUN, ours, {} if process is None else process.config]
    if process is not None and schedulers.other_range(process.sde, ours["data"]["centered"]):
        # Ours would be the range of the network, and theirs is that of the pipeline.
        parts.append({"sampling": {"clip": False}})
    sections = {name for part in parts for name in part}
    return complete(
        {name: {k: v for part in parts for k, v in part.get(name, {}).items()} for name in sections}
    )


def _network(path: pathlib.Path, config: Config) -> UNet:
    """The network of a config, in evaluation mode, on the CPU.

    Raises:
        ExchangeError: it cannot be built.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn do not stay
            return create_model(config, "cpu").eval()
    except ValueError as error:
        raise ExchangeError(f"{path} describes no network of ours: {error}") from error


def _notes(config: Config, process: schedulers.Process | None) -> list[str]:
    if process is None:
        return ["there is no scheduler, so that the process is unknown"]
    notes = list(process.notes)
    if config.training.condition:
        notes.append(
            "the network is told a class, as models.conditioning.Given does; the pipeline itself "
            "draws no samples of such networks"
        )
    if problem := schedulers.other_range(process.sde, config.data.centered):
        notes.append(problem)
        if process.sampling.get("clip_sample"):
            notes.append(
                "the pipeline clamps x_0 to [-1, 1], and the config leaves it as it is "
                "(sampling.clip = False): for the pipeline's samples set it to True, with "
                "x / 2 + 0.5 as the inverse scaler"
            )
    return notes


# --- Weights -----------------------------------------------------------------------------------


def _check_fit(path: pathlib.Path, stored: Mapping[str, Tensor], model: UNet) -> dict[str, str]:
    """Names in the file -> today's names, if the tensors are exactly those of the network.

    Raises:
        ExchangeError: says which are missing, not in the network, of another shape or not finite.
    """
    own = model.state_dict()
    expected = {p.theirs: p.form.to_theirs(own[p.ours]).shape for p in unet_names.pairs(model)}
    names = unet_names.todays_names(stored)
    found = {today: stored[name].shape for name, today in names.items()}
    problems = {
        "missing": expected.keys() - found.keys(),
        "not in the network": found.keys() - expected.keys(),
        "twice": [t for t, count in Counter(names.values()).items() if count > 1],
        "of another shape": [k for k in found.keys() & expected if found[k] != expected[k]],
    }
    listed = [
        f"{len(keys)} are {problem} ({', '.join(sorted(keys)[:3])})"
        for problem, keys in problems.items()
        if keys
    ]
    if listed:
        raise ExchangeError(
            f"{path} does not fit the network that is described beside it: of its weights, "
            f"{'; '.join(listed)}"
        )
    for name in names:
        if not stored[name].is_floating_point() or not is_finite(stored[name]):
            raise ExchangeError(f"{path} holds {name!r} with other than finite numbers")
    return names


def _our_weights(theirs: dict[str, Tensor], model: UNet, *, flipped: bool) -> dict[str, Tensor]:
    """Weights by today's names under the names of a network.

    Args:
        flipped: whether sines and cosines of the time are in the other order than ours.
    """
    if flipped and model.plan.embedding.fourier is None:
        theirs = {**theirs, _FIRST_DENSE: _swapped(theirs[_FIRST_DENSE])}
    pairs = unet_names.pairs(model)
    return {pair.ours: pair.form.to_ours(theirs[pair.theirs]) for pair in pairs}


def _swapped(weight: Tensor) -> Tensor:
    """A map (out, in) of features whose two halves are swapped; an odd one's last one stays."""
    half = weight.shape[1] // 2
    first, second, rest = weight.split([half, half, weight.shape[1] - 2 * half], dim=1)
    return torch.cat([second, first, rest], dim=1)


# --- Writing -----------------------------------------------------------------------------------


def save_diffusers(
    folder: str | os.PathLike,
    config: object,
    model: torch.nn.Module | None = None,
    sde: SDE | None = None,
    *,
    scheduler: Mapping[str, object] | None = None,
) -> None:
    """Write a network and its process as a folder that Diffusers loads.

    Args:
        folder: is made; files of the same names are replaced, but no pipeline by a network alone.
        config: of the network; or a run, see `score_lib.runs.setup.Run`, of which the averaged
            network and the process are written.
        model: the network, ddpm or ncsnpp.
        sde: its process; None writes the network alone, a UNet2DModel.
        scheduler: options of the scheduler by its own names, such as `clip_sample`, in place of
            those that the config tells; `_class_name` selects "DDIMScheduler".
    Raises:
        ValueError: Diffusers cannot express it; the message says why.
        OSError: the folder cannot be written.
    """
    if model is None:
        if not hasattr(run := config, "state"):
            raise ExchangeError("save_diffusers needs a network beside its config, or a run")
        with run.state["ema"].applied(run.state["model"].parameters()):
            save_diffusers(folder, run.config, run.state["model"], run.sde, scheduler=scheduler)
        return
    config, network = complete(config), unwrapped(model)
    if not isinstance(network, UNet):
        raise ExchangeError(f"a {type(network).__name__} cannot be written: only ddpm and ncsnpp")
    options = unet_configs.to_theirs(config, network)
    process = None
    if sde is not None:
        process = schedulers.described(config, sde, scheduler or {})
    folders.write_folder(folder, options, _their_weights(network), process)


def _their_weights(model: UNet) -> dict[str, Tensor]:
    """The weights under their names; attentions that the network lacks add nothing."""
    own = model.state_dict()
    weights = {pair.theirs: pair.form.to_theirs(own[pair.ours]) for pair in unet_names.pairs(model)}
    for name, like in unet_names.missing_attentions(model):
        for key, tensor in unet_names.attention_tensors(name, like):
            ends = key.startswith(f"{name}.to_out")
            weights[key] = torch.zeros_like(tensor) if ends else tensor
    return {name: weights[name].float() for name in sorted(weights)}
