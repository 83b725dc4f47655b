"""Refusals of an evaluation: of each measure, before the work of the first."""

import functools
from collections.abc import Callable

from score_lib.elbo import get_elbo_fn
from score_lib.likelihood import get_log_likelihood_fn
from score_lib.runs.comparisons import enough_held_out
from score_lib.runs.dequantizer import get_dequantization
from score_lib.runs.heldout import HeldOut
from score_lib.runs.rounds import Job
from score_lib.runs.setup import Run
from score_lib.runs.statistics import comparable_extractor, data_statistics
from score_lib.vlb import get_vlb_fn


def check_samples(job: Job) -> None:
    """Refuse samples without comparable data, before any is drawn.

    Raises:
        FileNotFoundError: there are no statistics of the data, or no weights of the extractor.
        ValueError: they do not fit, there are too few samples or held-out examples, or samples
            would be of an unknown class.
    """
    run = job.run
    run.conditions.classes_of_samples(range(1), run.state["class_to_idx"])  # by unknown names
    if "image" in run.conditions.kinds:
        job.check_data("test", labels=False)  # sample k has the condition of held-out example k
    if not run.pictures:
        enough_held_out(job)
    elif job.statistics is None:
        job.statistics = data_statistics(run, job.workdir)
        # Not kept: other measures need the memory of the device.
        comparable_extractor(run, job.statistics, job.workdir)


def check_likelihood(
    job: Job, build: Callable[[Run, int], Callable], *, dequantize: bool = True
) -> None:
    """Refuse a likelihood or bound before any is computed; warn where the images are unlike others.

    Args:
        build: makes the function of it, for a run and a number of grey levels.
        dequantize: whether grey levels are.
    Raises:
        FileNotFoundError: there is no such dequantizer.
        ValueError: the data, the process or the dequantizer does not fit.
    """
    run = job.run
    job.check_data(run.bpd_part)
    data = HeldOut(run, run.bpd_part, False, count=run.config.eval.bpd_num_images)
    data.tell_order()
    build(run, data.levels)
    if dequantize and not run.continuous:
        get_dequantization(run, data.levels, job.workdir or "")


def likelihood_fn(run: Run, steps: int) -> Callable:
    """That of `get_log_likelihood_fn`, as the config says, in so many steps."""
    options = run.config.eval
    return get_log_likelihood_fn(
        run.sde,
        hutchinson_type=options.hutchinson_type,
        num_probes=options.num_probes,
        per_sample=options.per_sample_error,
        steps=steps,
        **run.reading,
    )


def elbo_fn(run: Run, levels: int) -> Callable:
    """That of `get_elbo_fn`, as the config says."""
    return get_elbo_fn(run.sde, num_times=run.config.eval.elbo_num_times, **run.reading)


def vlb_fn(run: Run, levels: int) -> Callable:
    """That of `get_vlb_fn`, as the config says, for data of so many grey levels."""
    return get_vlb_fn(
        run.sde,
        run.inverse_scaler,
        levels,
        variance=run.config.eval.vlb_variance,
        num_times=run.config.eval.vlb_num_times,
        parametrization=run.reading["parametrization"],
    )


# The refusals of measures, by the options of `eval` that ask for these.
CHECKS = {
    "enable_loss": lambda job: job.check_data("test"),
    "enable_accuracy": lambda job: job.check_data("test"),
    "enable_bpd": functools.partial(
        check_likelihood, build=lambda run, _: likelihood_fn(run, run.config.eval.bpd_steps)
    ),
    "enable_elbo": functools.partial(check_likelihood, build=elbo_fn),
    "enable_vlb": functools.partial(check_likelihood, build=vlb_fn, dequantize=False),
    "enable_sampling": check_samples,
}
