"""Samples beside held-out data, where no network for features exists: any data but pictures."""

import logging

import numpy as np
import torch
from torch import Tensor

from score_lib.base import distributed
from score_lib.base.tensors import some_of
from score_lib.data.loading import check_levels, get_streams
from score_lib.data.sources import Subset
from score_lib.disk.pictures import check_samples_finite
from score_lib.metrics.point_sets import point_set_metrics
from score_lib.metrics.samples import sample_metrics
from score_lib.metrics.series import series_metrics
from score_lib.metrics.shares import warn_of_shares
from score_lib.runs.rounds import Job
from score_lib.runs.samples import draw_samples
from score_lib.runs.setup import Run, in_batches

# Others have the measures of vectors, `sample_metrics`.
_METRICS = {"points": point_set_metrics, "series": series_metrics}
# The fewest samples and data that each of these takes.
_LEAST = {"points": 2}


def compare_with_data(job: Job) -> dict[str, float]:
    """Distances of exactly `eval.num_samples` samples to `HeldOutExamples`.

    They are taken in the network's range, where entries have comparable scales.  Sets of points are
    compared as sets, series also by spectra and autocorrelations.  `samples.png` shows the first
    samples, and `held_out.png` the first held-out examples of those.

    Raises:
        ValueError: too few samples or held-out examples, before any sample is drawn.
    """
    run, options = job.run, job.run.config.eval
    held_out = enough_held_out(job)
    tell_shares(run, options.num_samples, held_out)
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

    job.check_held_out(get_streams(run.config, evaluation=True)[2].sources["test"])
    rounds = job.rounds(len(parts), make)

    def report() -> dict[str, float]:
        samples = torch.from_numpy(np.concatenate([found["samples"] for found in rounds]))
        data = held_out.read()
        draw_samples(job.folder / folder / "samples.png", samples, run)
        draw_samples(job.folder / folder / "held_out.png", data, run)
        found = distances_of(run, samples, data)
        return {**found, "num_samples": len(samples), "num_data": len(data)}

    return distributed.on_main(report)


def enough_held_out(job: Job) -> "HeldOutExamples":
    """The examples that samples are compared with.

    Raises:
        ValueError: too few samples or held-out examples.
    """
    count = job.run.config.eval.num_samples
    held_out = HeldOutExamples(job.run, count)
    _check_enough(job.run, count, held_out)
    return held_out


def _check_enough(run: Run, samples: int, held_out: "HeldOutExamples") -> None:
    least = _LEAST.get(run.kind, 4)
    if samples < least:
        raise ValueError(
            f"eval.num_samples = {samples} should be {least} or more for distances of {run.kind}"
        )
    if len(held_out) < least:
        raise ValueError(
            f"distances of {run.kind} need {least} or more held-out examples, and {held_out.name} "
            f"has {len(held_out)}: set eval.enable_sampling = False, or see data.split"
        )


def tell_shares(run: Run, samples: int, held_out: "HeldOutExamples") -> None:
    """Warn of so many samples that are of classes in other shares than the held-out examples."""
    drawn = run.conditions.classes_of_samples(range(samples), run.state["class_to_idx"])
    if drawn is not None and held_out.labelled and distributed.is_main():
        warn_of_shares(drawn.numpy(), held_out.labels())


def distances_of(run: Run, samples: Tensor, data: Tensor) -> dict[str, float]:
    """The measures that suit the kind of the data, of samples (N, *D) and data (M, *D) in the
    user's units."""
    both = (run.scaler(x.to(run.device)) for x in (samples, data))
    return _METRICS.get(run.kind, sample_metrics)(*both)


class HeldOutExamples:
    """The held-out examples that samples are compared with: as many as samples, or all.

    They are chosen at random, and always the same.  Of a network that is conditional on images they
    are the first ones, which its samples are of.  Grey levels are dequantised if those are that the
    network learns, since its samples are like them.

    Args:
        most: number of samples.
    Attributes:
        name: of the data set, with what is done to its examples.
        labelled: whether they are of several classes.
    """

    def __init__(self, run: Run, most: int):
        self.run, dequantize = run, run.config.data.uniform_dequantization
        streams = get_streams(run.config, dequantize, evaluation=True, device=run.device)
        _, self._stream, info = streams
        check_levels(run.config, info)
        self.name, source = info.name, self._stream.source
        self.labelled = source.num_classes > 1
        if most < len(source):
            first = "image" in run.conditions.kinds
            numbers = range(most) if first else some_of(len(source), most, "held-out examples")
            self._stream.source = Subset(source, np.asarray(numbers))
            self.name += f", {'the first' if first else 'random'} {most} of {len(source)}"
        if dequantize:
            self.name += ", dequantised"

    def __len__(self) -> int:
        return len(self._stream.source)

    def labels(self) -> np.ndarray:
        """The classes of the examples, (n,)."""
        return torch.cat([batch["label"].cpu() for batch in self._stream]).numpy()

    def read(self) -> Tensor:
        """The examples, (n, *D), as `Run.draw` gives samples."""
        run = self.run
        parts = (run.scaler(batch["image"]) for batch in self._stream)
        return torch.cat([run.inverse_scaler(part).cpu() for part in parts])
