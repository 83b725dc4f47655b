"""Classifier-free guidance against guidance by a classifier: classes recognised, and FID.

    python main.py --config configs/vp/digits.py --workdir runs/digits --mode train
    python main.py --config configs/vp/digits_conditional.py --workdir runs/conditional --mode train
    python main.py --config configs/vp/digits_classifier.py --workdir runs/classifier --mode train
    python -m benchmarks.guidance --unconditional runs/digits --conditional runs/conditional \\
        --classifier runs/classifier

All samples are drawn by the same solver from the same noise; sample k is of class k mod 10.
"""

import argparse
import logging
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import show
from configs.defaults import load
from controllable_generation import ClassGuidance
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from run_lib import Run, restored
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import to_uint8
from score_lib.disk.reports import mean_and_error
from score_lib.metrics.configured import recognises_classes
from score_lib.metrics.stats import class_metrics
from score_lib.runs.setup import META, from_checkpoint

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    needed = {"required": True, "help": "folder of a trained run"}
    parser.add_argument("--unconditional", **needed)
    parser.add_argument("--conditional", **needed)
    parser.add_argument("--classifier", **needed)
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--num_steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3, help="sets of samples, for errors")
    given = parser.parse_args(argv)
    log_to_console()
    records = by_condition(given) + by_classifier(given)
    title = (
        f"guidance, {given.repeats} sets of {given.num_samples} samples, DPM-Solver++ 2M in "
        f"{given.num_steps} steps"
    )
    show(title, restored(load("vp/digits"), given.unconditional).device, records)


def by_condition(given: argparse.Namespace) -> list[dict]:
    """Rows of classifier-free guidance at each scale."""
    run = _restored("vp/digits_conditional", given.conditional, given)
    records = []
    for scale in SCALES:
        run.config.sampling.guidance_scale = scale
        figures = repeated(run, given, {})
        records.append({"guidance": "classifier-free", "scale": scale, **figures})
        logging.info("%s", records[-1])
    return records


def by_classifier(given: argparse.Namespace) -> list[dict]:
    """Rows of guidance by a noise-conditional classifier at each scale."""
    run = _restored("vp/digits", given.unconditional, given)
    classifier = from_checkpoint(pathlib.Path(given.classifier) / META, run.device)
    labels, records = _classes(given.num_samples), []
    for scale in SCALES:
        until = run.config.control.guidance_until
        with classifier.sampling_network() as network:
            guidance = ClassGuidance(network, labels.to(run.device), scale, until=until)
            figures = repeated(run, given, {"constraints": [guidance]})
        records.append({"guidance": "classifier", "scale": scale, **figures})
        logging.info("%s", records[-1])
    return records


def repeated(run: Run, given: argparse.Namespace, options: dict) -> dict[str, float]:
    """Figures of several sets of samples, each of its own seed: means and standard errors."""
    rows = [
        quality(run, run.draw(range(given.num_samples), seed, **options))
        for seed in range(given.repeats)
    ]
    found = {}
    for name in rows[0]:
        found |= mean_and_error(name, np.array([row[name] for row in rows]))
    return found


def _restored(config: str, folder: str, given: argparse.Namespace) -> Run:
    run = restored(load(config), folder)
    run.config.sampling.update(method="dpmpp_2m", num_steps=given.num_steps)
    return run


def _classes(count: int) -> Tensor:
    return torch.arange(count) % 10


def quality(run: Run, images: Tensor) -> dict[str, float]:
    """FID, and how well samples (B, *D) in [0, 1] are of their classes."""
    extractor = get_extractor(run.config, run.device)
    found = extractor(to_uint8(images, run.levels))
    labels = _classes(len(images))
    fake = Statistics.of(extractor, found["pool_3"], found["logits"], "samples", labels)
    real = load_dataset_stats(run.config)
    distances = metrics(real, fake, run.device)
    of_classes = class_metrics(real, fake, recognises_classes(run.config))
    of_classes.pop("recognised_standard_error")
    return {"fid": distances["fid"], "recall": distances["recall"], **of_classes}


if __name__ == "__main__":
    main()
