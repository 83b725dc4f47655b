"""Measures of a checkpoint: loss, accuracy, bits/dim, and distances of samples to data.

The randomness of a round is a function of the seed and of the number of the example or sample, not
of its batch.
"""

import functools
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.adm_configured import WithVariances
from models.conditioning import UNCONDITIONAL, Condition, given
from score_lib.base import distributed
from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.dequantization import Dequantization
from score_lib.disk.arrays import save_arrays
from score_lib.disk.files import write_text
from score_lib.disk.pictures import save_grid
from score_lib.disk.reports import markdown_table, mean_and_error, save_histogram
from score_lib.likelihood import LogLikelihood
from score_lib.losses.objectives import NoisyLoss
from score_lib.metrics.configured import recognises_classes
from score_lib.metrics.extractors import Extractor
from score_lib.metrics.jackknife import sampling_errors
from score_lib.metrics.stats import Statistics, class_metrics, class_text, metrics
from score_lib.runs.accuracy import correct_shares, levels_by_noise
from score_lib.runs.comparisons import compare_with_data
from score_lib.runs.dequantizer import get_dequantization
from score_lib.runs.heldout import HeldOut
from score_lib.runs.refusals import check_samples, elbo_fn, likelihood_fn, vlb_fn
from score_lib.runs.rounds import Job
from score_lib.runs.setup import Run, in_batches
from score_lib.runs.statistics import comparable_extractor, statistics_record

# The share of a batch whose likelihood is computed again, with half as many steps.
CHECKED_SHARE = 1 / 16


def evaluate_loss(job: Job) -> dict[str, float]:
    """Mean loss over the held-out examples, with its standard error.

    `eval.loss_num_repeats` passes, each with noise and noise levels of its own.

    Raises:
        FloatingPointError: some losses are not finite.
    """
    run = job.run
    job.check_data("test")
    loss_fn = run.loss_fn(train=False)
    repeats = run.config.eval.loss_num_repeats

    @torch.no_grad()
    def compute():
        seeds = [derive_seed(run.config.seed, "loss", repeat) for repeat in range(repeats)]
        passes = [_losses(run, loss_fn, seed) for seed in seeds]
        values = np.mean(passes, axis=0)
        return {"all_losses": values, "mean_loss": values.mean()}

    values = job.joint_round(f"ckpt_{job.label}_loss.npz", compute)["all_losses"]
    _check_finite("loss", values)
    return mean_and_error("loss", values)


def _losses(run: Run, loss_fn: NoisyLoss, seed: int) -> np.ndarray:
    """Loss of each held-out example, at one noise level each."""
    data = HeldOut(run, "test", run.config.data.uniform_dequantization, seed)

    def of_batch(number: int) -> Tensor:
        images, labels, condition = data.read(number)
        draws = loss_fn.draw(images, SampleNoise(seed, data.indices(number), run.device))
        model = run.network(UNCONDITIONAL)
        return loss_fn.per_sample(model, images, draws, labels, condition).double()

    return data.map(of_batch)


def evaluate_accuracy(job: Job) -> dict[str, float]:
    """Accuracy of a classifier at `eval.accuracy_num_levels` noise levels from least to most.

    Over the held-out examples, each with `eval.accuracy_num_repeats` draws of noise.  The table is
    also in `ckpt_{k}_accuracy.md`; the result is the accuracy at the least noise.

    Raises:
        ValueError: there is no label for it.
    """
    run, options = job.run, job.run.config.eval
    job.check_data("test")
    loss_fn = run.loss_fn(train=False)
    rows = []
    for k, level in levels_by_noise(run, loss_fn, options.accuracy_num_levels):
        compute = functools.partial(correct_shares, run, loss_fn, level)
        shares = job.joint_round(f"ckpt_{job.label}_accuracy_{k}.npz", compute)["correct"]
        _, std = loss_fn.levels.marginal(torch.zeros_like(level)[None], level[None])
        place = {"level": float(level), "noise_std": float(std)}
        rows.append(place | mean_and_error("accuracy", shares))
    table = markdown_table(rows)
    path = job.folder / f"ckpt_{job.label}_accuracy.md"
    distributed.on_main(lambda: write_text(path, table))
    chance = 1 / run.config.data.num_classes
    logging.info("accuracy by noise level; chance is %.4f\n%s", chance, table)
    return {key: rows[0][key] for key in ("accuracy", "accuracy_standard_error")}


def evaluate_bpd(job: Job, *, errors: bool = False) -> dict[str, float]:
    """Mean bits/dim of dequantised examples, with its standard error; nats of continuous data.

    `eval.bpd_num_repeats` passes over `eval.bpd_dataset`, each with noise of its own.  The error
    is that of the mean over examples, as others might have been drawn.  With `eval.bpd_steps` there
    is "bpd_step_error", how far half as many steps move the mean of a part of the examples: no
    bound of the error of all steps, since changes of opposite sign cancel.

    Args:
        errors: add "bpd_noise_error", that of the mean over passes for these very examples: by
            dequantisation and probes, which needs two passes; and "num_images".
    """
    unit, repeats = job.run.unit, job.run.config.eval.bpd_num_repeats
    rounds = _rounds(job, "bpd", repeats, likelihood_terms)
    passes = _passes(rounds, repeats, unit.name)
    values = passes.mean(axis=0)
    path = job.folder / f"ckpt_{job.label}_{unit.name}.png"
    distributed.on_main(lambda: save_histogram(path, values, unit.title))
    found = _means("", values, job.run)
    if "step_error" in rounds[0]:
        found[f"{unit.name}_step_error"] = np.concatenate(
            [terms["step_error"] for terms in rounds]
        ).mean()
    if errors:
        found["num_images"] = len(values)
    if errors and repeats > 1:
        variances = passes.var(axis=0, ddof=1) / repeats  # of the mean of each example
        found[f"{unit.name}_noise_error"] = float(np.sqrt(variances.mean() / len(values)))
    return found


def evaluate_elbo(job: Job) -> dict[str, float]:
    """An upper bound of the mean bits/dim or nats, by the variational bound of the reverse SDE.

    One pass over `eval.bpd_dataset`, dequantised; see `elbo.get_elbo_fn`.
    """
    return _mean_of("elbo", job, elbo_terms)


def evaluate_vlb(job: Job) -> dict[str, float]:
    """An upper bound of the mean bits/dim of a network of discrete noise levels, see `vlb`.

    One pass over `eval.bpd_dataset`, which is not dequantised.
    """
    return _mean_of("vlb", job, vlb_terms, dequantize=False)


def _means(prefix: str, values: np.ndarray, run: Run) -> dict[str, float]:
    """Mean and standard error of values in the run's unit; nats also for each dimension."""
    found = mean_and_error(prefix + run.unit.name, values)
    if run.continuous:
        found |= mean_and_error(f"{prefix}nats_per_dim", values / math.prod(run.shape))
    return found


def _mean_of(kind: str, job: Job, terms: Callable, **options) -> dict[str, float]:
    """`_means` of one pass."""
    values = _passes(_rounds(job, kind, 1, terms, **options), 1, job.run.unit.name)
    return _means(f"{kind}_", values[0], job.run)


def _passes(rounds: list[dict[str, np.ndarray]], passes: int, key: str) -> np.ndarray:
    """One of the terms of `_rounds`, (passes, N)."""
    return np.concatenate([found[key] for found in rounds]).reshape(passes, -1)


def _rounds(
    job: Job, kind: str, passes: int, terms: Callable, *, dequantize: bool = True
) -> list[dict[str, np.ndarray]]:
    """Terms of the first `eval.bpd_num_images` examples of `eval.bpd_dataset`, a batch a round.

    Args:
        kind: names the files of rounds, and the seeds.
        terms: `terms(run, images, levels, noise, condition)` gives arrays, among them that of
            `Run.unit`.
        dequantize: whether grey levels are, as `eval.dequantizer` says; the density of the noise
            then counts.
    Raises:
        FloatingPointError: the likelihoods of some examples are not finite.
    """
    run, unit, split = job.run, job.run.unit, job.run.bpd_part
    job.check_data(split)
    seeds = [derive_seed(run.config.seed, kind, repeat) for repeat in range(passes)]
    data = [HeldOut(run, split, False, seed, run.config.eval.bpd_num_images) for seed in seeds]
    batches, workdir = len(data[0]), job.workdir or ""
    dequantize = dequantize and not run.continuous
    spread = get_dequantization(run, data[0].levels, workdir) if dequantize else None

    def make(k: int) -> dict:
        repeat, number = divmod(k, batches)
        part = data[repeat]

        def compute() -> dict[str, np.ndarray]:
            noise = SampleNoise(seeds[repeat], part.indices(number), run.device)
            images, _, condition = part.read(number)
            if spread is None:
                return terms(run, images, part.levels, noise, condition)
            images, log_q = _dequantized(run, spread, part, images, number)
            found = terms(run, images, part.levels, noise, condition)
            return found | {"bpd": found["bpd"] + log_q / (images[0].numel() * np.log(2))}

        found = job.round(f"{split}_ckpt_{job.label}_{kind}_{k}.npz", compute)
        _check_finite(unit.title, found[unit.name], part.indices(number).start)
        mean = found[unit.name].mean()
        logging.info("%s, pass %d, batch %d: %.4f %s", kind, repeat, number, mean, unit.title)
        return found

    return job.rounds(passes * batches, make)


def _check_finite(name: str, values: np.ndarray, first: int = 0) -> None:
    """Refuse figures of consecutive examples, (N,), with nan or inf, whose mean says nothing."""
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise FloatingPointError(
            f"the {name} of {len(wrong)} of {len(values)} examples is not a finite number, first "
            f"that of example {first + wrong[0]}: evaluate a checkpoint before training diverged, "
            "or bits/dim and nats with a larger eval.bpd_steps"
        )


@torch.no_grad()
def _dequantized(
    run: Run, dequantize: Dequantization, data: HeldOut, images: Tensor, number: int
) -> tuple[Tensor, np.ndarray]:
    """A batch of grey levels, dequantised, and log q of its noise, (B,), in nats.

    Both are in the network's range.
    """
    images, log_q = dequantize(run.inverse_scaler(images), lambda like: data.uniform(number))
    return run.scaler(images), log_q.double().cpu().numpy()


def elbo_terms(
    run: Run, images: Tensor, levels: int, noise: Callable, condition: Condition = UNCONDITIONAL
) -> dict[str, np.ndarray]:
    """Bits/dim or nats by the bound, and its standard error in nats; as `likelihood_terms`."""
    bound = elbo_fn(run, levels)(run.network(condition), images, noise=noise)
    values = run.unit.of(bound.total, levels)
    return {
        run.unit.name: values.cpu().numpy(),
        "standard_error": bound.standard_error.cpu().numpy(),
    }


def vlb_terms(
    run: Run, images: Tensor, levels: int, noise: Callable, condition: Condition = UNCONDITIONAL
) -> dict[str, np.ndarray]:
    """Bits/dim of images by the bound of the chain, and its terms; as `likelihood_terms`."""
    network = run.network(UNCONDITIONAL)
    if run.config.eval.vlb_variance == "learned":
        network = WithVariances(network)
    terms = vlb_fn(run, levels)(given(network, condition), images, noise=noise)._asdict()
    return {"bpd": terms.pop("total").cpu().numpy()} | {
        k: v.cpu().numpy() for k, v in terms.items()
    }


def likelihood_terms(
    run: Run, images: Tensor, levels: int, noise: Callable, condition: Condition = UNCONDITIONAL
) -> dict[str, np.ndarray]:
    """Bits/dim of images, or nats of continuous data, and their terms.

    "total" = "prior" + "divergence" is the log-likelihood in nats in the network's range, with a
    "standard_error" where there are several probes; "dequantisation" and "scaling" are the offsets
    of bits/dim, and "scaling" alone, log |dx / dy|, that of nats.  With `eval.bpd_steps` there is
    "step_error" of the first of the images: their values less those of half as many steps.

    Args:
        run: its network's present weights are used.
        images: (B, *D), dequantised, in the network's range.
        levels: grey levels of the data.
        condition: of each image, of a conditional network.
        noise: for Hutchinson's probes, called like `torch.randn_like`.
    """
    draws = []

    def kept(like: Tensor) -> Tensor:
        draws.append(noise(like))
        return draws[-1]

    steps = run.config.eval.bpd_steps
    terms = _log_likelihood(run, images, kept, condition, steps)._asdict()
    values = {run.unit.name: run.unit.of(terms["total"], levels).cpu().numpy()}
    if steps:
        again, some = iter(draws), math.ceil(len(images) * CHECKED_SHARE)
        part = {kind: value[:some] for kind, value in condition.items()}
        coarse = _log_likelihood(run, images[:some], lambda _: next(again)[:some], part, steps // 2)
        coarse = run.unit.of(coarse.total, levels).cpu().numpy()
        values["step_error"] = values[run.unit.name][:some] - coarse
    del terms["z"]
    shared = {"nfe": np.array(terms.pop("nfe")), **run.unit.offsets(levels)}
    return values | {k: v.cpu().numpy() for k, v in terms.items()} | shared


def _log_likelihood(
    run: Run, images: Tensor, noise: Callable, condition: Condition, steps: int
) -> LogLikelihood:
    return likelihood_fn(run, steps)(run.network(condition), images, noise=noise)


def evaluate_samples(job: Job, *, errors: bool = False) -> dict[str, float | None]:
    """FID, Inception Score, KID, precision and recall of exactly `eval.num_samples` samples.

    Those of a network that is conditional on classes also get `class_metrics`.
    They are drawn in rounds of `eval.batch_size` and compared with the data set's statistics.
    Of data that are no pictures, see `compare_with_data`.

    Args:
        errors: add `sampling_errors`, which take as long as fifty such distances.
    """
    run, options = job.run, job.run.config.eval
    check_samples(job)
    if not run.pictures:
        return compare_with_data(job)
    real, extractor = job.statistics, comparable_extractor(run, job.statistics, job.workdir)
    basis = extractor.identity + (" and spatial features" if extractor.with_spatial else "")
    folder = f"ckpt_{job.label}"
    parts = in_batches(range(options.num_samples), options.batch_size)

    def samples(number: int) -> np.ndarray:
        def draw() -> dict[str, np.ndarray]:
            return {"samples": run.to_bytes(run.draw(parts[number])).numpy()}

        return job.round(f"{folder}/samples_{number}.npz", draw)["samples"]

    def features(number: int) -> dict:
        path = f"{folder}/statistics_{number}.npz"
        found = job.round(path, lambda: _features(extractor, samples(number)), basis)
        logging.info("features of samples, batch %d", number)
        return found

    found = job.rounds(len(parts), features)

    def report() -> dict[str, float | None]:
        shown = torch.from_numpy(samples(0)[:64]).movedim(-1, 1) / 255
        save_grid(job.folder / folder / "samples.png", shown)
        fake, name = _statistics_of_samples(run, extractor, found), extractor.distance
        result = metrics(real, fake, run.device, distance=name)
        if fake.labels is not None:
            result |= class_metrics(real, fake, recognises_classes(run.config), distance=name)
        if errors:
            compute = functools.partial(sampling_errors, real, fake, run.device, distance=name)
            both = f"statistics {real.hash()} and {basis}"
            made = job.round(f"{folder}/errors.npz", compute, both)
            result |= {key: float(value) for key, value in made.items()}
        result["statistics"] = statistics_record(run, real, job.workdir)
        published = {"IS": "inception_score", name: name, "kid": "kid"}
        arrays = {key: np.array(result[of], dtype=float) for key, of in published.items()}
        save_arrays(job.folder / f"report_{job.label}.npz", **arrays)
        return {**result, "num_samples": options.num_samples}

    return distributed.on_main(report)


def _features(extractor: Extractor, samples: np.ndarray) -> dict[str, np.ndarray]:
    found = extractor(samples)
    return {name: values.numpy() for name, values in found.items() if values is not None}


def _statistics_of_samples(run: Run, extractor: Extractor, rounds: list[dict]) -> Statistics:
    """The features of all rounds, with the classes that the samples were drawn for."""
    pool_3, logits, spatial = (
        np.concatenate([r[name] for r in rounds]) if name in rounds[0] else None
        for name in ("pool_3", "logits", "spatial")
    )
    learned = run.state["class_to_idx"]
    labels = run.conditions.classes_of_samples(range(len(pool_3)), learned)
    record = {"spatial": spatial, "classes": class_text(learned)}
    return Statistics.of(extractor, pool_3, logits, "samples", labels, **record)


# The measures, by the option of `eval` that asks for them.
MEASURES = {
    "enable_loss": evaluate_loss,
    "enable_accuracy": evaluate_accuracy,
    "enable_bpd": evaluate_bpd,
    "enable_elbo": evaluate_elbo,
    "enable_vlb": evaluate_vlb,
    "enable_sampling": evaluate_samples,
}
