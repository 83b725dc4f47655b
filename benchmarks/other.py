"""Another implementation of the same public names, at work in a process of its own.

Not a command: `benchmarks.against` starts it as `python benchmarks/other.py FOLDER JOB`, and it
imports nothing but what is in the folder.  A line of JSON answers each line of its input.
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
    """Build the work of a job, then do it as often as the input says."""
    sys.path[0] = folder  # in place of the script's own
    os.chdir(folder)
    # What the implementation prints is not to be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        job = torch.load(job_file, weights_only=True)
        work = build(job)
        answer(ready=True)
        for line in sys.stdin:
            if line.strip() == "peak":
                answer(peak=torch.cuda.max_memory_allocated() if on_gpu(job) else 0)
                continue
            work()
            if on_gpu(job):
                torch.cuda.synchronize()
            answer(done=True)
    except Exception as error:  # somebody else's program may raise anything
        answer(error=f"{type(error).__name__}: {error}")


def on_gpu(job: dict) -> bool:
    """Whether a job runs on a GPU."""
    return job["device"].startswith("cuda")


def build(job: dict) -> Callable[[], object]:
    """The work of a job, through the public names."""
    config = ConfigDict({**job["config"], "device": torch.device(job["device"])})
    for name in NETWORKS:
        importlib.import_module(f"models.{name}")
    model = importlib.import_module("models.utils").create_model(config)
    bare = getattr(model, "module", model)
    bare.load_state_dict(job["weights"], strict=True)
    # The network knows how many scales it was trained with; samplers may make fewer steps.
    config.model.num_scales = job["steps"] or config.model.num_scales
    config.control.tolerance = job["tolerance"]
    images = job["images"].to(config.device)
    return {"train": training, "sampling": sampling, "likelihood": likelihood}[job["work"]](
        config, model, images
    )


def process(config: ConfigDict):
    """The forward process, and the time at which sampling stops."""
    sde_lib, model = importlib.import_module("sde_lib"), config.model
    if config.training.sde.lower() == "vesde":
        return sde_lib.VESDE(model.sigma_min, model.sigma_max, model.num_scales), 1e-5
    cls = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.subVPSDE}[config.training.sde.lower()]
    return cls(model.beta_min, model.beta_max, model.num_scales), 1e-3


def training(config: ConfigDict, model, images) -> Callable[[], object]:
    """The training step."""
    losses, ema = importlib.import_module("losses"), importlib.import_module("models.ema")
    state = {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": ema.ExponentialMovingAverage(model.parameters(), decay=config.model.ema_rate),
        "step": 0,
    }
    step = losses.get_step_fn(
        process(config)[0],
        train=True,
        optimize_fn=losses.optimization_manager(config),
        reduce_mean=config.training.reduce_mean,
        continuous=config.training.continuous,
        likelihood_weighting=config.training.likelihood_weighting,
    )
    return lambda: step(state, images)


def sampling(config: ConfigDict, model, images) -> Callable[[], object]:
    """The predictor-corrector sampler, for as many images."""
    sampling, options = importlib.import_module("sampling"), config.sampling
    sde, eps = process(config)
    sampler = sampling.get_pc_sampler(
        sde,
        tuple(images.shape),
        sampling.get_predictor(options.predictor.lower()),
        sampling.get_corrector(options.corrector.lower()),
        lambda x: x,
        options.snr,
        n_steps=options.n_steps_each,
        probability_flow=options.probability_flow,
        continuous=config.training.continuous,
        denoise=options.noise_removal,
        eps=eps,
        device=config.device,
    )
    return lambda: sampler(model)


def likelihood(config: ConfigDict, model, images) -> Callable[[], object]:
    """Bits/dim of the images."""
    likelihood = importlib.import_module("likelihood")
    likelihood_fn = likelihood.get_likelihood_fn(
        process(config)[0],
        lambda x: x,
        rtol=config.control.tolerance,
        atol=config.control.tolerance,
    )
    return lambda: likelihood_fn(model, images)


if __name__ == "__main__":
    main(*sys.argv[1:])
