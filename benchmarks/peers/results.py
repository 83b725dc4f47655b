"""Measures of the trained networks: held-out loss, and distances of samples to the data."""

import math
import pathlib
import time

import numpy as np
import torch
from ml_collections import ConfigDict

from benchmarks.measure import seconds as timed
from benchmarks.peers import plain_loop, shared
from benchmarks.train import training
from evaluation import Statistics, frechet_distance, get_extractor
from models.ema import ExponentialMovingAverage
from run_lib import Run, fid_stats, restored, setup
from score_lib.data.loading import get_streams
from score_lib.disk.pictures import to_uint8
from score_lib.disk.reports import mean_and_error
from score_lib.metrics.two_sample import kid_estimate
from score_lib.runs.setup import in_batches
from score_lib.runs.statistics import data_statistics

TRIED = 8  # steps that tell how long one takes


def steps_in(seconds: float, config: ConfigDict, precision: str) -> int:
    """Steps of our training that fit into a time, and a tenth more: the time ends the training,
    not its last step, when the learning rate has come down to a fifth."""
    work = training(config, name=precision)
    work.call()
    taken = float(np.median([timed(work.call, work.run.device) for _ in range(TRIED)]))
    return max(1, math.ceil(1.1 * seconds / taken))


def write_images(config: ConfigDict, path: pathlib.Path) -> shared.Images:
    """Write all images of the configured data set for the contestants, and return them."""
    _, _, info = get_streams(config, evaluation=True)
    train, test = (
        source.images(np.arange(len(source)))
        for source in (info.sources["train"], info.sources["test"])
    )
    images = shared.Images(train, test, info.levels)
    shared.save(path, train=train.numpy(), test=test.numpy(), levels=info.levels)
    return images


def trained(config: ConfigDict, folder: pathlib.Path) -> Run:
    """Our network with averaged weights: of a run, or of a plain loop, in this folder."""
    weights = folder / "weights.pth"
    run = setup(config) if weights.exists() else restored(config, folder)
    network = run.state["model"].eval()
    if weights.exists():
        network.load_state_dict(torch.load(weights, weights_only=True))
        run.state["ema"] = ExponentialMovingAverage(network.parameters(), config.model.ema_rate)
    else:
        run.state["ema"].copy_to(network.parameters())
    return run


def loss_of(run: Run, images: shared.Images, held_out: int) -> dict[str, float]:
    """Error of our network's predicted noise, see `plain_loop.held_out_loss`."""
    network = run.state["model"]
    return loss_record(plain_loop.held_out_loss(network, run.config, images, held_out))


def loss_record(losses: np.ndarray) -> dict[str, float]:
    """The mean loss with its error."""
    return mean_and_error("held-out loss", losses)


def draw(run: Run, count: int, batch_size: int) -> tuple[np.ndarray, float]:
    """Samples of the configured sampler, uint8 (N, H, W, C), and the seconds that they took."""
    start = time.perf_counter()
    parts = [run.draw(part) for part in in_batches(range(count), batch_size)]
    seconds = time.perf_counter() - start
    return to_uint8(torch.cat(parts), run.levels).numpy(), seconds


class Distances:
    """Distances of samples to the training data.

    Args:
        workdir: statistics of the data are made there if there are none yet.
    Raises:
        ValueError: features cannot be computed, or statistics are of other data.
        FileNotFoundError: the extractor has no weights.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.extractor = get_extractor(config)
        run = setup(config)
        try:
            self.real = data_statistics(run, workdir)
        except FileNotFoundError:
            fid_stats(config, workdir)
            self.real = data_statistics(run, workdir)

    def of(self, samples: np.ndarray, seconds: float = 0.0) -> dict[str, float | int | None]:
        """The distances of samples, uint8 (N, H, W, C), with their number and time."""
        found = self.extractor(samples)
        fake = Statistics.of(self.extractor, found["pool_3"], found["logits"])
        distances = {"fid": frechet_distance(self.real.moments(), fake.moments())}
        distances |= kid_estimate(torch.from_numpy(self.real.pool_3), found["pool_3"]).named("kid")
        time_each = {"ms/sample": 1e3 * seconds / len(samples)} if seconds else {}
        return {"samples": len(samples)} | distances | time_each
