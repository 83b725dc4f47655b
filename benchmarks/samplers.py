"""Quality against evaluations of the network, for every sampler: a table, and a plot in the run.

    python -m benchmarks.samplers --workdir runs/demo

Needs a trained run, and the statistics of its data set.  Each sampler draws the same number of
samples from the same noise; the distance is FID in the features of `eval.extractor`.  Of a network
that is told classes, sample k is of class k mod K, guided as `sampling.guidance_scale` says: an
evaluation then has two terms.
"""

import argparse
import logging
import pathlib
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import show
from benchmarks.variants import with_settings
from evaluation import Statistics, frechet_distance, get_extractor, load_dataset_stats
from run_lib import Run, restored
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.files import atomic_write
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import to_uint8
from score_lib.metrics.stats import check_comparable
from score_lib.runs.setup import in_batches

# Options of `sampling` and evaluations per step.
SAMPLERS = {
    "Euler-Maruyama": ({"method": "pc", "predictor": "euler_maruyama", "corrector": "none"}, 1),
    "reverse diffusion + Langevin": (
        {"method": "pc", "predictor": "reverse_diffusion", "corrector": "langevin_per_sample"},
        2,
    ),
    "DDIM": ({"method": "ddim"}, 1),
    "Heun": ({"method": "heun"}, 2),
    "DPM-Solver++ 2M": ({"method": "dpmpp_2m"}, 1),
    "DPM-Solver++ 3M": ({"method": "dpmpp_3m"}, 1),
    "DPM-Solver++ SDE": ({"method": "dpmpp_sde"}, 1),
}
ADAPTIVE = {"RK45": "ode", "adaptive SDE": "adaptive"}
EVALUATIONS, MANY = (10, 20, 40, 80), (200, 1000)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/digits")
    parser.add_argument("--workdir", required=True, help="folder of a trained run")
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument(
        "--many", type=int, nargs="*", default=MANY, help="for predictor-corrector samplers as well"
    )
    names = (*SAMPLERS, *ADAPTIVE)
    parser.add_argument("--samplers", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    given = parser.parse_args(argv)
    log_to_console()
    run, records = restored(with_settings(given.config, given.set), given.workdir), []
    real = load_dataset_stats(run.config, given.workdir)
    chosen = given.evaluations, given.many, run.config.sampling.time_grid
    for name, options in cases(run.config.model.beta_max, *chosen):
        if name not in given.samplers:
            continue
        run.config.sampling.update(options)
        images, evaluations = draw(run, given.num_samples)
        distance = fid(run, images, real)
        records.append({"sampler": name, "evaluations": evaluations, "fid": distance})
        logging.info("%s", records[-1])
    show(f"samplers, {given.config}, {given.num_samples} samples", run.device, records)
    plot(pathlib.Path(given.workdir) / "samplers.png", records)


def cases(
    beta_max: float,
    evaluations: Sequence[int] = EVALUATIONS,
    many: Sequence[int] = MANY,
    grid: str = "",
) -> list[tuple[str, dict]]:
    """Names of samplers and options of `sampling`.

    Predictor-corrector samplers need many evaluations, and more steps than beta_max: a
    variance-preserving chain of fewer has no betas below 1.

    Args:
        evaluations: of the network, for every sampler.
        many: for predictor-corrector samplers as well.
        grid: of times, for solvers; predictor-corrector samplers keep the published one.
    """
    found = []
    for name, (options, per_step) in SAMPLERS.items():
        chain = options["method"] == "pc"
        for steps in (count // per_step for count in (*evaluations, *(many if chain else ()))):
            if not chain or steps > beta_max:
                steps_of = {"num_steps": steps, "time_grid": "" if chain else grid}
                found.append((name, options | steps_of))
    unread = {"num_steps": 0, "time_grid": ""}
    return found + [(name, {"method": method, **unread}) for name, method in ADAPTIVE.items()]


def draw(run: Run, count: int) -> tuple[Tensor, int]:
    """Samples, (B, C, H, W) in [0, 1], and evaluations of the network.

    Adaptive samplers evaluate each batch as often as it needs; counted is the mean.
    """
    drawn, evaluations = [], []
    for part in in_batches(range(count), run.config.eval.batch_size):
        images, calls = run.draw_counted(part)
        drawn.append(images)
        evaluations.append(calls)
    return torch.cat(drawn), statistics.mean(evaluations)


def fid(run: Run, images: Tensor, real: Statistics) -> float:
    """Distance of samples (B, C, H, W) in [0, 1] to the data set."""
    extractor = get_extractor(run.config, run.device)
    found = extractor(to_uint8(images, run.levels))
    samples = Statistics.of(extractor, found["pool_3"], found["logits"])
    check_comparable(real.made_by(), samples.made_by())
    return frechet_distance(real.moments(run.device), samples.moments(run.device))


def plot(path: pathlib.Path, records: list[dict]) -> None:
    """FID against evaluations, a line for each sampler, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="evaluations of the network", ylabel="FID")
    axes.set(xscale="log", yscale="log")
    for name in dict.fromkeys(record["sampler"] for record in records):
        points = [(r["evaluations"], r["fid"]) for r in records if r["sampler"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.legend(fontsize="small")
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    logging.info("plot in %s", path)


if __name__ == "__main__":
    with brief_mistakes():
        main()
