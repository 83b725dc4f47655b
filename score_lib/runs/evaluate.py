"""The rounds of an evaluation: loss, bits/dim and samples of one set of weights.

Every round is a file, computed once: an evaluation that was killed goes on with the first round
that is missing, and ends in the same figures.  The randomness of a round is a function of the seed
and of the number of the example or sample that it is for, not of the batches they come in.

Several processes share the rounds, each of which is made whole by one of them, so that their number
changes no figure; they meet in the folder, which all of them must see.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from configs.defaults import flatten
from score_lib.base import distributed
from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.data.loading import get_dataset
from score_lib.data.sources import Source
from score_lib.data.stream import ImageStream
from score_lib.disk.files import file_digest, load_arrays, save_arrays, write_text
from score_lib.disk.pictures import save_grid, to_uint8
from score_lib.disk.reports import markdown_table, mean_and_error, save_histogram
from score_lib.likelihood import bits_per_dim, get_log_likelihood_fn, offsets
from score_lib.losses.classifier import ClassifierLoss
from score_lib.losses.noisy import Draws, NoisyLoss
from score_lib.metrics.configured import get_extractor, load_dataset_stats, stats_path
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.stats import Statistics, compute_statistics, metrics, save_statistics


@dataclasses.dataclass
class Job:
    """The evaluation of one checkpoint.

    Attributes:
        run: with the checkpoint's averaged weights in place.
        folder: where results go.
        label: number or name of the checkpoint, part of file names.
        fingerprint: of the checkpoint and the options; rounds with another one are not reused.
    """

    run: object
    folder: pathlib.Path
    label: str
    fingerprint: str

    def round(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict:
        """The arrays of a round: from its file, or computed and written there, by this process.

        Raises:
            ValueError: the file is damaged, or belongs to another evaluation.
        """
        path = self.folder / name
        if not path.exists():
            self._write(path, compute())
        # Read even if it was just written: then nothing depends on when it was.
        return self._read(path)

    def rounds(self, count: int, make: Callable[[int], dict]) -> list[dict]:
        """[make(k) for k in range(count)], where `make` is a `round` that any process may make."""
        for number in distributed.share(range(count)):
            make(number)
        distributed.barrier()
        return [make(number) for number in range(count)]

    def joint_round(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict:
        """The arrays of a round that all processes compute together, see `round`."""
        path = self.folder / name
        if not distributed.on_main(path.exists):
            arrays = compute()
            distributed.on_main(lambda: self._write(path, arrays))
        return self._read(path)

    def _write(self, path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
        save_arrays(path, fingerprint=np.array(self.fingerprint), **arrays)

    def _read(self, path: pathlib.Path) -> dict[str, np.ndarray]:
        arrays = load_arrays(path)
        if str(arrays.pop("fingerprint", "")) != self.fingerprint:
            raise ValueError(
                f"{path} was made with other options or another checkpoint: choose another "
                "--eval_folder, or remove it"
            )
        return arrays


def evaluate_loss(job: Job) -> dict[str, float]:
    """Mean loss over the held-out examples, with its standard error.

    `eval.loss_num_repeats` passes, each with noise and noise levels of its own.
    """
    run = job.run
    loss_fn = run.loss_fn(train=False)
    repeats = run.config.eval.get("loss_num_repeats", 1)

    @torch.no_grad()
    def compute():
        passes = [
            _losses(run, loss_fn, derive_seed(run.config.seed, "loss", r)) for r in range(repeats)
        ]
        values = np.mean(passes, axis=0)
        return {"all_losses": values, "mean_loss": values.mean()}

    values = job.joint_round(f"ckpt_{job.label}_loss.npz", compute)["all_losses"]
    return mean_and_error("loss", values)


def _losses(run, loss_fn: NoisyLoss, seed: int) -> np.ndarray:
    """Loss of each held-out example, at one noise level each."""
    data = HeldOut(run, "test", run.config.data.uniform_dequantization, seed)

    def of_batch(number: int) -> Tensor:
        images, labels = data.read(number)
        draws = loss_fn.draw(images, SampleNoise(seed, data.indices(number), run.device))
        return loss_fn.per_sample(run.state["model"], images, draws, labels).double()

    return data.map(of_batch)


def evaluate_accuracy(job: Job) -> dict[str, float]:
    """Accuracy of a classifier at `eval.accuracy_num_levels` noise levels from least to most.

    Over the held-out examples, each with `eval.accuracy_num_repeats` draws of noise.  The table is
    also in `ckpt_{k}_accuracy.md`; the result is the accuracy at the least noise.

    Raises:
        ValueError: the network is no classifier, or there is no label for it.
    """
    run, options = job.run, job.run.config.eval
    if run.objective != "classifier":
        raise ValueError("eval.enable_accuracy needs a classifier: training.objective='classifier'")
    loss_fn = run.loss_fn(train=False)
    count = options.get("accuracy_num_levels", 11)
    levels = loss_fn.levels.at(torch.linspace(0, 1, count, device=run.device))
    rows = []
    for k, level in enumerate(levels):
        compute = functools.partial(_correct, run, loss_fn, level)
        shares = job.joint_round(f"ckpt_{job.label}_accuracy_{k}.npz", compute)["correct"]
        _, std = loss_fn.levels.marginal(torch.zeros_like(level)[None], level[None])
        place = {"level": float(level), "noise_std": float(std)}
        rows.append(place | mean_and_error("accuracy", shares))
    table = markdown_table(rows)
    path = job.folder / f"ckpt_{job.label}_accuracy.md"
    distributed.on_main(lambda: write_text(path, table))
    logging.info("accuracy by noise level; chance is %.4f\n%s", 1 / run.num_classes, table)
    return {key: rows[0][key] for key in ("accuracy", "accuracy_standard_error")}


@torch.no_grad()
def _correct(run, loss_fn: ClassifierLoss, level: Tensor) -> dict[str, np.ndarray]:
    """The share of noise draws for which each held-out example gets its label."""
    repeats = run.config.eval.get("accuracy_num_repeats", 1)
    seed = derive_seed(run.config.seed, "accuracy")
    data = HeldOut(run, "test", run.config.data.uniform_dequantization, seed)
    run.check_labels(data.info)

    def of_batch(number: int) -> Tensor:
        images, labels = data.read(number)
        noise = SampleNoise(seed, data.indices(number), run.device)
        right = torch.zeros(len(images), dtype=torch.int64, device=run.device)
        for _ in range(repeats):
            draws = Draws(level.expand(len(images)), noise(images))
            right += loss_fn.logits(run.state["model"], images, draws).argmax(1) == labels
        return right.double() / repeats

    return {"correct": data.map(of_batch)}


def evaluate_bpd(job: Job) -> dict[str, float]:
    """Mean bits/dim of uniformly dequantised examples, with its standard error.

    `eval.bpd_num_repeats` passes over `eval.bpd_dataset`, each with noise of its own.  The error
    is that of the mean over examples, as others might have been drawn.
    """
    run, options = job.run, job.run.config.eval
    split = options.get("dataset", "") or options.bpd_dataset
    passes = options.get("bpd_num_repeats", 5)
    seeds = [derive_seed(run.config.seed, "bpd", repeat) for repeat in range(passes)]
    data = [HeldOut(run, split, True, seed) for seed in seeds]
    batches = len(data[0])

    def make(k: int) -> dict:
        repeat, number = divmod(k, batches)
        compute = functools.partial(_bpd_round, run, data[repeat], number, seeds[repeat])
        found = job.round(f"{split}_ckpt_{job.label}_bpd_{k}.npz", compute)
        logging.info("bits/dim, pass %d, batch %d: %.4f", repeat, number, found["bpd"].mean())
        return found

    values = np.concatenate([found["bpd"] for found in job.rounds(passes * batches, make)])
    bpd = values.reshape(passes, -1).mean(axis=0)
    path = job.folder / f"ckpt_{job.label}_bpd.png"
    distributed.on_main(lambda: save_histogram(path, bpd, "bits/dim"))
    return mean_and_error("bpd", bpd)


def _bpd_round(run, data: HeldOut, number: int, seed: int) -> dict[str, np.ndarray]:
    noise = SampleNoise(seed, data.indices(number), run.device)
    return likelihood_terms(run, data.read(number)[0], data.levels, noise)


def likelihood_terms(run, images: Tensor, levels: int, noise: Callable) -> dict[str, np.ndarray]:
    """Bits/dim of images, and their terms.

    "total" = "prior" + "divergence" is the log-likelihood in nats, with a "standard_error" where
    there are several probes; "dequantisation" and "scaling" are what bits/dim are above it.

    Args:
        run: whose network's present weights are used.
        images: (B, C, H, W), dequantised, in the network's range.
        levels: grey levels of the data.
        noise: for Hutchinson's probes, called like `torch.randn_like`.
    """
    options = run.config.eval
    log_likelihood_fn = get_log_likelihood_fn(
        run.sde,
        hutchinson_type=options.get("hutchinson_type", "Rademacher"),
        num_probes=options.get("num_probes", 1),
        continuous=run.config.training.continuous,
        per_sample=options.get("per_sample_error", False),
    )
    terms = log_likelihood_fn(run.state["model"], images, noise=noise)._asdict()
    bpd = bits_per_dim(terms["total"], images[0].numel(), run.inverse_scaler, levels)
    del terms["z"]
    dequantisation, scaling = map(np.array, offsets(run.inverse_scaler, levels))
    shared = {
        "dequantisation": dequantisation,
        "scaling": scaling,
        "nfe": np.array(terms.pop("nfe")),
    }
    return {"bpd": bpd.cpu().numpy()} | {k: v.cpu().numpy() for k, v in terms.items()} | shared


def evaluate_samples(job: Job) -> dict[str, float | None]:
    """FID, Inception Score, KID, precision and recall of exactly `eval.num_samples` samples.

    They are drawn in rounds of `eval.batch_size` and compared with the data set's statistics.
    """
    run, options = job.run, job.run.config.eval
    real = load_dataset_stats(run.config)
    extractor = get_extractor(run.config, run.device)
    folder, at_once = f"ckpt_{job.label}", options.batch_size

    def samples(number: int) -> np.ndarray:
        indices = range(options.num_samples)[number * at_once : (number + 1) * at_once]
        compute = functools.partial(_sample_round, run, indices)
        return job.round(f"{folder}/samples_{number}.npz", compute)["samples"]

    def features(number: int) -> dict:
        found = job.round(
            f"{folder}/statistics_{number}.npz", lambda: _features(extractor, samples(number))
        )
        logging.info("features of samples, batch %d", number)
        return found

    found = job.rounds(-(-options.num_samples // at_once), features)

    def report() -> dict[str, float | None]:
        shown = torch.from_numpy(samples(0)[:64]).movedim(-1, 1) / 255
        save_grid(job.folder / folder / "samples.png", shown)
        pool_3, logits = (_joined(found, name) for name in ("pool_3", "logits"))
        result = metrics(real, Statistics.of(extractor, pool_3, logits, "samples"), run.device)
        published = {"IS": "inception_score", "fid": "fid", "kid": "kid"}
        arrays = {key: np.array(result[name], dtype=float) for key, name in published.items()}
        save_arrays(job.folder / f"report_{job.label}.npz", **arrays)
        return {**result, "num_samples": options.num_samples}

    return distributed.on_main(report)


def _sample_round(run, indices: range) -> dict[str, np.ndarray]:
    images = run.draw(indices)
    return {"samples": to_uint8(images, run.levels).numpy()}


def _features(extractor, samples: np.ndarray) -> dict[str, np.ndarray]:
    found = extractor(samples)
    return {name: values.numpy() for name, values in found.items() if values is not None}


def _joined(rounds: list[dict], name: str) -> np.ndarray | None:
    return np.concatenate([r[name] for r in rounds]) if name in rounds[0] else None


def make_statistics(run) -> pathlib.Path:
    """Write the statistics of the configured data set's training part, for FID and the like.

    Images are taken as uint8, without flips or dequantisation, and none is left out.  With
    `eval.suggest_noise_scales`, also say which `model.sigma_max` and `model.num_scales` fit.

    Returns:
        the file, see `evaluation.stats_path`.
    """
    config = run.config
    extractor = get_extractor(config, run.device)
    _, _, info = get_dataset(config, evaluation=True)
    batches = DataBytes(config, info.sources["train"])
    stats = compute_statistics(extractor, batches.share(), progress=True, dataset=info.name)
    path = stats_path(config)
    distributed.on_main(lambda: save_statistics(path, stats))
    logging.info("statistics of %d images are in %s", stats.count, path)
    if config.eval.get("suggest_noise_scales", False):
        distributed.on_main(lambda: _suggest_noise_scales(config, batches))
    return path


def _suggest_noise_scales(config, batches: DataBytes) -> None:
    images = torch.cat(list(batches)) / 255
    sigma_max = largest_pairwise_distance(images)
    logging.info(
        "the largest distance between two images is %.4g: model.sigma_max for a VE process; with "
        "model.sigma_min = %g, model.num_scales = %d fits discrete noise levels",
        sigma_max,
        config.model.sigma_min,
        fitting_num_scales(sigma_max, config.model.sigma_min, images[0].numel()),
    )


class DataBytes:
    """The images of a source in batches of bytes, (B, H, W, C), as extractors take them."""

    def __init__(self, config, source: Source):
        workers = config.data.get("num_workers", 4)
        self.stream = ImageStream(
            source, config.eval.batch_size, evaluation=True, as_uint8=True, num_workers=workers
        )
        self.numbers = range(len(self.stream))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        self.stream.seek(self.numbers.start * self.stream.batch_size)
        batches = itertools.islice(self.stream, len(self.numbers))
        return (batch["image"].movedim(1, -1) for batch in batches)

    def share(self) -> DataBytes:
        """The batches that are this process's."""
        mine = copy.copy(self)
        mine.numbers = distributed.share(self.numbers)
        return mine


class HeldOut:
    """The batches of one pass over a part of the data set, by number.

    Args:
        run: the run.
        split: "train" or "test".
        dequantize: add uniform noise within each grey level.
        seed: of that noise; by default the data set's own.
    """

    def __init__(self, run, split: str, dequantize: bool, seed: int | None = None):
        train, test, info = get_dataset(run.config, dequantize, evaluation=True, device=run.device)
        self.stream = {"train": train, "test": test}[split]
        self.info, self.levels, self.scaler = info, info.levels, run.scaler
        self.stream.seed = self.stream.seed if seed is None else seed
        self._batches, self._next = None, None

    def __len__(self) -> int:
        return len(self.stream)

    def indices(self, number: int) -> range:
        """Numbers of the examples in a batch."""
        first = number * self.stream.batch_size
        return range(first, min(first + self.stream.batch_size, len(self.stream.source)))

    def map(self, of_batch: Callable[[int], Tensor]) -> np.ndarray:
        """What a function of the number of a batch, giving (b,), is for all batches: (N,).

        Several processes share the batches.
        """
        mine = [of_batch(number) for number in distributed.share(range(len(self)))]
        values = torch.cat(mine).cpu().numpy() if mine else np.empty(0)
        return np.concatenate(distributed.gather(values))

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """A batch in the network's range, (B, C, H, W), and its labels (B,).

        One batch after the other is fastest.
        """
        if number != self._next:
            self.stream.seek(number * self.stream.batch_size)
            self._batches = iter(self.stream)
        self._next = number + 1
        batch = next(self._batches)
        return self.scaler(batch["image"]), batch["label"]


# What an evaluation may consist of, and the option that asks for it.
TASKS = {
    "enable_loss": evaluate_loss,
    "enable_accuracy": evaluate_accuracy,
    "enable_bpd": evaluate_bpd,
    "enable_sampling": evaluate_samples,
}

# Options that say which rounds are made, and not what is in them.
_NOT_IN_FINGERPRINT = (
    *TASKS,
    "begin_ckpt",
    "end_ckpt",
    "checkpoint",
    "wait_minutes",
    "bpd_num_repeats",
    "suggest_noise_scales",
)


def find_checkpoints(config, workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of the checkpoints to evaluate, by number or name.

    Raises:
        ValueError: no checkpoint is asked for.
        FileNotFoundError: names all that are missing, once `eval.wait_minutes` are over.
    """
    options = config.eval
    if options.get("checkpoint", ""):
        path = pathlib.Path(options.checkpoint)
        wanted = {path.stem.removeprefix("checkpoint_"): path}
    else:
        folder = workdir / "checkpoints"
        numbers = range(options.begin_ckpt, options.end_ckpt + 1)
        wanted = {str(k): folder / f"checkpoint_{k}.pth" for k in numbers}
        if not wanted:
            raise ValueError(
                f"eval.begin_ckpt = {numbers.start} comes after eval.end_ckpt = {numbers.stop - 1}"
            )
    deadline = time.monotonic() + 60 * options.get("wait_minutes", 0.0)
    while missing := [str(path) for path in wanted.values() if not path.is_file()]:
        if time.monotonic() >= deadline:
            raise FileNotFoundError(
                f"there are no checkpoints {', '.join(missing)}: set eval.begin_ckpt and "
                "eval.end_ckpt to those that exist, eval.checkpoint to a file, or "
                "eval.wait_minutes to wait for them"
            )
        logging.info("waiting for %s", missing[0])
        time.sleep(10)
    return wanted


def fingerprint(config, checkpoint: pathlib.Path) -> str:
    """A short hash of what the rounds of an evaluation depend on: the checkpoint and options."""
    text = json.dumps(_relevant(config.to_json_best_effort())) + file_digest(checkpoint)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_folder(config, folder: pathlib.Path) -> None:
    """Refuse a folder with rounds that were made with other options.

    Raises:
        ValueError: names the options; or it does not say which they were.
    """
    path = folder / "config.json"
    if not path.exists() or not any(folder.rglob("*.npz")):
        return
    ours = _relevant(config.to_json_best_effort())
    try:
        theirs = _relevant(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, and says no more what the results beside it were made with: "
            "choose another --eval_folder, or remove it"
        ) from error
    if ours != theirs:
        keys = ours.keys() | theirs.keys()
        differing = sorted(key for key in keys if ours.get(key) != theirs.get(key))
        shown = ", ".join(differing[:8]) + (", ..." if len(differing) > 8 else "")
        raise ValueError(
            f"{folder} holds an evaluation with another {shown}: choose another "
            "--eval_folder, or remove it"
        )


def _relevant(config_json: str) -> dict[str, object]:
    """Options that rounds depend on, by their dotted names in order."""
    flat = flatten(ConfigDict(json.loads(config_json)))
    left_out = {"device", *(f"eval.{name}" for name in _NOT_IN_FINGERPRINT)}
    return {key: flat[key] for key in sorted(flat.keys() - left_out)}
