"""Samples beside held-out data, where no network for features exists: any data but pictures."""

import logging

import numpy as np
import torch
from torch import Tensor

from score_lib.base import distributed
from score_lib.disk.pictures import check_samples_finite
from score_lib.metrics.point_sets import point_set_metrics
from score_lib.metrics.samples import sample_metrics
from score_lib.metrics.series import series_metrics
from score_lib.runs.heldout import HeldOut
from score_lib.runs.rounds import Job
from score_lib.runs.samples import draw_samples
from score_lib.runs.setup import Run, in_batches

# Others have the measures of vectors, `sample_metrics`.
_METRICS = {"points": point_set_metrics, "series": series_metrics}


def compare_with_data(job: Job) -> dict[str, float]:
    """Distances of exactly `eval.num_samples` samples to as many held-out examples, or all.

    They are taken in the network's range, where entries have comparable scales.  Sets of points are
    compared as sets, series also by spectra and autocorrelations.  `samples.png` shows the first
    samples, and `held_out.png` the first held-out examples.
    """
    run, options = job.run, job.run.config.eval
    folder = f"ckpt_{job.label}"
    parts = in_batches(range(options.num_samples), options.batch_size)

    def make(number: int) -> dict[str, np.ndarray]:
        def draw() -> dict[str, np.ndarray]:
            drawn = run.draw(parts[number]).cpu()
            check_samples_finite(drawn)
            return {"samples": drawn.numpy()}

        found = job.round(f"{folder}/samples_{number}.npz", draw)
        logging.info("samples, batch %d", number)
        return found

    rounds = job.rounds(len(parts), make)

    def report() -> dict[str, float]:
        samples = torch.from_numpy(np.concatenate([found["samples"] for found in rounds]))
        data = first_examples(HeldOut(run, "test", False), options.num_samples)
        draw_samples(job.folder / folder / "samples.png", samples, run)
        draw_samples(job.folder / folder / "held_out.png", data, run)
        found = distances_of(run, samples, data)
        return {**found, "num_samples": len(samples), "num_data": len(data)}

    return distributed.on_main(report)


def distances_of(run: Run, samples: Tensor, data: Tensor) -> dict[str, float]:
    """The measures that suit the kind of the data, of samples (N, *D) and data (M, *D) in the
    user's units."""
    both = (run.scaler(x.to(run.device)) for x in (samples, data))
    return _METRICS.get(run.kind, sample_metrics)(*both)


def first_examples(data: HeldOut, most: int) -> Tensor:
    """The first held-out examples, (n, *D), as `Run.draw` gives samples."""
    parts, count = [], 0
    for number in range(len(data)):
        if count >= most:
            break
        parts.append(data.run.inverse_scaler(data.read(number)[0]).cpu())
        count += len(parts[-1])
    return torch.cat(parts)[:most]
