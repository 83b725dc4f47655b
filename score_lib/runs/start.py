"""The beginning of a run: its last checkpoint, or weights to start from, `model.weights`.

The latter are used, in training and in place of a checkpoint, where a run has no checkpoint of its
own, and `eval.checkpoint` names none.
"""

import json
import logging
import os
import pathlib
from typing import NamedTuple

import torch
from ml_collections import ConfigDict

from score_lib.base import distributed
from score_lib.data.standardization import Standardization
from score_lib.disk.checkpoints import restore_latest, restore_part
from score_lib.disk.files import file_digest, printable, with_earlier
from score_lib.disk.fit import CheckpointError, count
from score_lib.disk.weights_files import completed, read_weights, tell_rounded, weights_by_name
from score_lib.exchange import adm
from score_lib.exchange.diffusers import load_diffusers
from score_lib.options import complete
from score_lib.runs.averages import start_averages
from score_lib.runs.history import (
    check_same_output,
    check_same_profiles,
    check_same_run,
    different_output,
    trained_config,
)

# The checkpoint at which training resumes, in the folder of a run.
META = pathlib.Path("checkpoints-meta", "checkpoint.pth")

# The checkpoint of the best figure, see `quality`.
BEST = pathlib.Path("checkpoints", "best.pth")


def chosen_checkpoint(config, workdir: str | os.PathLike) -> pathlib.Path | None:
    """The file of `eval.checkpoint`, of which "best" is the run's own `BEST`; None if it is ""."""
    chosen = config.eval.checkpoint
    if chosen == "best":
        return pathlib.Path(workdir) / BEST
    return pathlib.Path(chosen) if chosen else None


def name_of(path: pathlib.Path) -> str:
    """The name of a checkpoint in reports, the number of a numbered one."""
    return path.stem.removeprefix("checkpoint_")


def is_own(config, workdir: str | os.PathLike) -> bool:
    """Whether the weights of a mode other than training are of a checkpoint in the run's folder."""
    if chosen := chosen_checkpoint(config, workdir):
        return chosen.resolve().is_relative_to(pathlib.Path(workdir).resolve())
    return not weights_serve(config, workdir)


def weights_serve(config, workdir: str | os.PathLike) -> bool:
    """Whether a mode other than training uses `model.weights`: the run has no checkpoint, and no
    numbered one, either, which stay where that at which training resumes is gone."""
    numbered = pathlib.Path(workdir, BEST.parent).glob("*.pth")
    return needs_start(config, workdir) and not any(numbered)


def needs_start(config, workdir: str | os.PathLike) -> bool:
    """Whether training begins with `model.weights`: it is set, and there is nothing to resume."""
    if not config.model.weights:
        return False
    own = with_earlier(pathlib.Path(workdir) / META)
    return not any(path.is_file() for path in own)


def expect_units(state: dict) -> None:
    """Before a file is loaded into a state: forget the units of another one; see `check_units`."""
    units = state.setdefault("standardization", {})
    if isinstance(units, Standardization):
        units.fitted = False


def check_units(path: str | os.PathLike, config, state: dict, fresh: bool = False) -> None:
    """Refuse a loaded file of continuous data for grey levels, or one of grey levels for others.

    Args:
        fresh: there was no file.
    Raises:
        CheckpointError: the data it was trained with have other units.
    """
    units = state["standardization"]
    data = f"data.dataset = {config.data.dataset!r} with data.levels = {config.data.levels}"
    if not isinstance(units, Standardization):
        del state["standardization"]
        if units:
            raise CheckpointError(
                f"{path} was trained on continuous values, of which it holds the mean and "
                f"deviation, but {data} means grey levels: use the config that it was trained with"
            )
    elif not (units.fitted or fresh):
        raise CheckpointError(
            f"{path} holds no 'standardization', the mean and deviation of its data: it was not "
            f"trained on continuous values, which {data} means"
        )


@torch.no_grad()
def load_start(
    config, state: dict, device: torch.device, averaged: bool = True
) -> ConfigDict | None:
    """Load `model.weights` into a state that has made no step: the network and all averages.

    Args:
        state: "model", "ema", perhaps "averages" and "standardization", changed in place; its
            "step", "class_to_idx" and "examples" become the file's, and "start" says which it was.
        averaged: take a checkpoint's average, if it has one.
    Returns:
        the config that they were trained with, if it is known and all weights are of the file.
    Raises:
        OSError: there is no such file.
        CheckpointError: it does not fit the network, or was trained with other options that decide
            what its output means.
    """
    path, model = pathlib.Path(config.model.weights), state["model"]
    contents = _read_start(path, config, device)
    if not averaged:
        if "model" not in contents or contents.get("average", "none") != "none":
            raise CheckpointError(f"{path} holds an average alone: set eval.ema to ''")
        contents.pop("ema", None)
    trained = trained_config(path, contents)
    if trained is not None:
        check_same_output(path, trained, config)
    weights = weights_by_name(path, contents, model)
    if config.model.name in adm.NETWORKS:
        if not config.model.weights_except:
            adm.check_description(path, weights, model)
        logging.info("of %s, %s", path, adm.untold(config))
    weights = completed(path, weights, model, config.model.weights_except)
    tell_rounded(path, weights, model)
    model.load_state_dict(weights)
    if (key := "standardization") in state and key in contents:
        if isinstance(state[key], Standardization):
            restore_part(path, state[key], contents[key], key)
        else:
            state[key] = contents[key]
    averages = getattr(state.get("averages"), "named", {}).values()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for average in (state["ema"], *averages):
        # Copies, of which `load_state_dict` makes one.
        average.load_state_dict({**average.state_dict(), "shadow_params": trainable})
    state["step"] = count(path, contents, "step") if "step" in contents else 0
    state["class_to_idx"] = contents.get("class_to_idx", {})
    state["examples"] = contents.get("examples", [])
    state["start"] = {"weights": str(path), "digest": file_digest(path)}
    if config.model.weights_except:
        state["start"]["except"] = list(config.model.weights_except)
    logging.info("starting from the weights in %s (%s)", path, state["start"]["digest"])
    return None if config.model.weights_except else trained


def _read_start(path: pathlib.Path, config, device: torch.device) -> dict:
    """The contents of `model.weights`: a file, or a folder of Diffusers."""
    if not path.exists():
        raise FileNotFoundError(f"there are no weights at model.weights = {str(path)!r}")
    if not path.is_dir():
        return read_weights(path, device)
    contents = _of_folder(path, config)
    for note in contents["notes"]:
        logging.info("of %s: %s", path, note)
    return contents


def _of_folder(folder: pathlib.Path, config) -> dict:
    """The contents of a folder of Diffusers, as those of a checkpoint, and "notes" for the user."""
    model, process, facts = load_diffusers(folder, "cpu")
    told, trained = facts["config"], complete(config)
    # Networks that are told sigma do not depend on where it begins and ends, and a folder does not
    # say how weights were initialised.
    free = {"sigma_min", "sigma_max", "init_scale", "fourier_scale"}
    if process is None or told.training.sde == "vesde":
        free |= {"beta_min", "beta_max"}
    if process is None:  # nor what the output means
        free |= {"num_scales", "parametrization", "sigma_data"}
    if told.model.name == "ddpm":  # has no other
        free.add("embedding_type")
    with trained.unlocked():
        trained.model.update({k: v for k, v in told.model.items() if k not in free})
        trained.data.centered = told.data.centered
        if process is not None:
            trained.training.update(sde=told.training.sde, continuous=told.training.continuous)
    weights = dict(model.named_parameters())  # tables are made from the run's config
    return {"model": weights, "config": trained.to_json_best_effort(), "notes": facts["notes"]}


def options_for_folder(folder: pathlib.Path, config) -> dict[str, object]:
    """Options that a run needs to start from a folder of Diffusers, where its config has others.

    The same network can have several descriptions.
    """
    trained = trained_config(folder, _of_folder(folder, config))
    return {key: old for key, (old, _) in different_output(trained, complete(config)).items()}


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from; None at a start, and in all but the main process.

    Attributes:
        path: the checkpoint: the latest undamaged one.
        config: that it was trained with, if it is known.
    """

    path: pathlib.Path | None = None
    config: ConfigDict | None = None


def load_latest(config, state: dict, device: torch.device, workdir: pathlib.Path) -> Resumed:
    """Load what training begins with: the run's last undamaged checkpoint, if there is one, else
    `model.weights`.

    Args:
        state: of training, changed in place.
    Raises:
        OSError: there are no such weights.
        CheckpointError: it is of another network, process or data set, or of a later step than the
            last.
    """
    state |= {"position": 0, "start": {}, "best": {}, "snapshot_due": False, "metrics_due": False}
    state["examples"] = []
    path, resumed = workdir / META, Resumed()

    def check(chosen: pathlib.Path, contents: dict) -> None:
        nonlocal resumed
        resumed = Resumed(chosen, trained_config(chosen, contents))
        if resumed.config is not None:
            check_same_run(chosen, resumed.config, config)
        check_same_profiles(chosen, contents, config)
        step = count(chosen, contents, "step") if "step" in contents else 0
        if step > config.training.n_iters:
            raise CheckpointError(
                f"{chosen} is of step {step}, later than training.n_iters = "
                f"{config.training.n_iters}: raise it, or choose another --workdir"
            )

    if distributed.on_main(lambda: needs_start(config, workdir)):
        load_start(config, state, device)
        state["step"] = 0
        if config.model.weights_except:  # perhaps those of other classes
            state["class_to_idx"] = {}
    else:
        expect_units(state)
        restore_latest(path, state, device, check=check)
        check_units(path, config, state, fresh=not state["step"])
        # Published checkpoints do not tell how many examples they have seen.
        state["position"] = state["position"] or state["step"] * config.training.batch_size
        _tell_start(config, state)
    start_averages(state)
    return resumed


def _tell_start(config, state: dict) -> None:
    """Say what weights a restored run started from, and whether `model.weights` count."""
    if state["start"]:
        shown = printable(json.dumps(state["start"], default=str))
        logging.info("this run started from other weights: %s", shown)
    else:
        del state["start"]
        if config.model.weights:
            logging.info("model.weights are not used: the run has a checkpoint of its own")
