"""Another implementation of the same public names, in a process of its own.

`benchmarks.against` starts it as `python benchmarks/other.py FOLDER JOB`.  It imports only modules
of the folder, and answers each line of its input with a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable

import torch
from ml_collections import ConfigDict

NETWORKS = ("ddpm", "ncsnv2", "ncsnpp")  # modules that register networks


def main(folder: str, job_file: str) -> None:
    """Build the work of a job, then do it for each line "work" of the input."""
    sys.path[0] = folder  # in place of the script's own
    os.chdir(folder)
    # Its own prints must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        job = torch.load(job_file, weights_only=True)
        on_gpu = job["device"].startswith("cuda")
        work = build(job)
        answer(ready=True)
        for line in sys.stdin:
            if line.strip() == "peak":
                answer(peak=torch.cuda.max_memory_allocated() if on_gpu else 0)
                continue
            work()
            if on_gpu:
                torch.cuda.synchronize()
            answer(done=True)
    except Exception as error:  # another program may raise anything
        answer(error=f"{type(error).__name__}: {error}")


def build(job: dict) -> Callable[[], object]:
    """The work of a job, through the public names."""
    config = ConfigDict({**job["config"], "device": torch.device(job["device"])})
    for name in NETWORKS:
        importlib.import_module(f"models.{name}")
    model = importlib.import_module("models.utils").create_model(config)
    getattr(model, "module", model).load_state_dict(job["weights"], strict=True)
    # The weights have one noise level per scale of the config; the sampler may make fewer steps.
    config.model.num_scales = job["steps"] or config.model.num_scales
    images, (sde, eps) = job["images"].to(config.device), process(config)
    if job["work"] == "train":
        return training(config, model, images, sde)
    if job["work"] == "sampling":
        get_sampling_fn = importlib.import_module("sampling").get_sampling_fn
        sampler = get_sampling_fn(config, sde, tuple(images.shape), lambda x: x, eps)
        return lambda: sampler(model)
    get_likelihood_fn = importlib.import_module("likelihood").get_likelihood_fn
    tolerances = {"rtol": job["tolerance"], "atol": job["tolerance"]}
    likelihood_fn = get_likelihood_fn(sde, lambda x: x, **tolerances)
    return lambda: likelihood_fn(model, images)


def process(config: ConfigDict):
    """The forward process, and the time at which sampling stops."""
    sde_lib, model, name = importlib.import_module("sde_lib"), config.model, config.training.sde
    if name.lower() == "vesde":
        return sde_lib.VESDE(model.sigma_min, model.sigma_max, model.num_scales), 1e-5
    cls = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.subVPSDE}[name.lower()]
    return cls(model.beta_min, model.beta_max, model.num_scales), 1e-3


def training(config: ConfigDict, model, images, sde) -> Callable[[], object]:
    """The training step."""
    losses, ema = importlib.import_module("losses"), importlib.import_module("models.ema")
    state = {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": ema.ExponentialMovingAverage(model.parameters(), decay=config.model.ema_rate),
        "step": 0,
    }
    options = ("reduce_mean", "continuous", "likelihood_weighting")
    step = losses.get_step_fn(
        sde,
        train=True,
        optimize_fn=losses.optimization_manager(config),
        **{option: config.training[option] for option in options},
    )
    return lambda: step(state, images)


if __name__ == "__main__":
    main(*sys.argv[1:])
