"""Classifier-free guidance against guidance by a classifier: classes recognised, and FID.

    python main.py --config configs/vp/digits.py --workdir runs/digits --mode train
    python main.py --config configs/vp/digits_conditional.py --workdir runs/conditional --mode train
    python main.py --config configs/vp/digits_classifier.py --workdir runs/classifier --mode train
    python -m benchmarks.guidance --unconditional runs/digits --conditional runs/conditional \\
        --classifier runs/classifier

All samples are drawn by the same solver from the same noise; sample k is of class k mod 10.  With
`--data fashion_mnist` the experiments are those of Fashion-MNIST.
"""

import argparse
import functools
import logging
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.fashion_mnist import sureness
from benchmarks.measure import show
from benchmarks.variants import with_settings
from controllable_generation import ClassGuidance
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from run_lib import Run, restored
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import to_uint8
from score_lib.disk.reports import mean_and_error
from score_lib.metrics.configured import recognises_classes
from score_lib.metrics.stats import class_metrics
from score_lib.runs.start import META
from score_lib.runs.trained import from_checkpoint

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    needed = {"required": True, "help": "folder of a trained run"}
    parser.add_argument("--unconditional", **needed)
    parser.add_argument("--conditional", **needed)
    parser.add_argument("--classifier", **needed)
    parser.add_argument("--data", default="digits", choices=("digits", "fashion_mnist"))
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="classifier-free")
    parser.add_argument("--classifier_scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=1024, help="samples at a time")
    parser.add_argument("--method", default="dpmpp_2m", help="sampler")
    parser.add_argument("--time_grid", default="", help="of the sampler, see sampling.time_grid")
    parser.add_argument("--num_steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3, help="sets of samples, for errors")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="of both score networks"
    )
    given = parser.parse_args(argv)
    log_to_console()
    records = by_condition(given) + by_classifier(given)
    title = (
        f"guidance, {given.repeats} sets of {given.num_samples} samples, {given.method} in "
        f"{given.num_steps} steps"
    )
    show(title, _unconditional(given).device, records)


def by_condition(given: argparse.Namespace) -> list[dict]:
    """Rows of classifier-free guidance at each scale."""
    run = _restored(f"vp/{given.data}_conditional", given.conditional, given)
    records = []
    for scale in given.scales:
        run.config.sampling.guidance_scale = scale
        figures = repeated(run, given)
        records.append({"guidance": "classifier-free", "scale": scale, **figures})
        logging.info("%s", records[-1])
    return records


def by_classifier(given: argparse.Namespace) -> list[dict]:
    """Rows of guidance by a noise-conditional classifier at each scale."""
    run, records = _unconditional(given), []
    classifier = from_checkpoint(pathlib.Path(given.classifier) / META, run.device)
    until = run.config.control.guidance_until
    for scale in given.classifier_scales:
        with classifier.sampling_network() as network:
            guidance = functools.partial(ClassGuidance, network, scale=scale, until=until)
            figures = repeated(run, given, guidance)
        records.append({"guidance": "classifier", "scale": scale, **figures})
        logging.info("%s", records[-1])
    return records


def repeated(
    run: Run, given: argparse.Namespace, guidance: Callable[[Tensor], ClassGuidance] | None = None
) -> dict[str, float]:
    """Figures of several sets of samples, each of its own seed: means and standard errors.

    Args:
        guidance: of samples by their classes.
    """
    rows = []
    for seed in range(given.repeats):
        parts = []
        for first in range(0, given.num_samples, given.batch_size):
            indices = range(first, min(first + given.batch_size, given.num_samples))
            options = {"constraints": [guidance(_classes(indices))]} if guidance else {}
            parts.append(run.draw(indices, seed, **options))
        rows.append(quality(run, torch.cat(parts), given.conditional))
    if len(rows) == 1:
        return rows[0]
    found = {}
    for name in rows[0]:
        found |= mean_and_error(name, np.array([row[name] for row in rows]))
    return found


def _unconditional(given: argparse.Namespace) -> Run:
    return _restored(f"vp/{given.data}", given.unconditional, given)


def _restored(experiment: str, folder: str, given: argparse.Namespace) -> Run:
    run = restored(with_settings(experiment, given.set), folder)
    names = "method", "num_steps", "time_grid"
    run.config.sampling.update({name: getattr(given, name) for name in names})
    return run


def _classes(indices: range) -> Tensor:
    return torch.tensor(indices) % 10


def quality(run: Run, images: Tensor, workdir: str) -> dict[str, float]:
    """FID, and how well samples (B, *D) in [0, 1] are of their classes.

    Args:
        workdir: with statistics of the data, where they do not come with the project.
    """
    extractor = get_extractor(run.config, run.device)
    found = extractor(to_uint8(images, run.levels))
    labels = _classes(range(len(images)))
    fake = Statistics.of(extractor, found["pool_3"], found["logits"], "samples", labels)
    real = load_dataset_stats(run.config, pathlib.Path(workdir))
    distances = metrics(real, fake, run.device)
    of_classes = class_metrics(real, fake, recognises_classes(run.config))
    figures = {"fid": distances["fid"], "recall": distances["recall"]}
    figures |= sureness(found["logits"]) | of_classes
    return {key: value for key, value in figures.items() if not key.endswith("_standard_error")}


if __name__ == "__main__":
    with brief_mistakes():
        main()
