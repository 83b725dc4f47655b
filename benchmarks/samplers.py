"""Quality against evaluations of the network, for every sampler: a table and a plot.

    python -m benchmarks.samplers --workdir runs/demo

Needs a trained run, and the statistics of its data set. Each sampler draws the same number of
samples from the same noise; the distance is FID in the features of `eval.extractor`.
"""

from __future__ import annotations

import argparse
import logging
import pathlib

from torch import Tensor

from benchmarks.measure import show
from configs.defaults import load
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from run_lib import Run, restored
from score_lib.base.tensors import SampleNoise
from score_lib.disk.files import atomic_write
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import to_uint8

# Names, options of `sampling`, and steps of samplers with one evaluation a step.
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
# The predictor-corrector samplers also at their own pace: with fewer steps than beta_max, a
# variance-preserving chain has none.
EVALUATIONS, MANY = (10, 20, 40, 80), (200, 1000)


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/digits")
    parser.add_argument("--workdir", required=True, help="folder of a trained run")
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--plot", default="", help="file of the plot; default: in the workdir")
    arguments = parser.parse_args()
    log_to_console()
    run = restored(load(arguments.config), arguments.workdir)
    records = []
    with run.state["ema"].applied(run.state["model"].parameters()):
        for name, (options, a_step) in SAMPLERS.items():
            for wanted in (*EVALUATIONS, *(MANY if options["method"] == "pc" else ())):
                if options["method"] == "pc" and wanted // a_step <= run.config.model.beta_max:
                    continue
                records.append(measure(run, name, options, wanted // a_step, arguments.num_samples))
                logging.info("%s", records[-1])
        for name, method in {"RK45": "ode", "adaptive SDE": "adaptive"}.items():
            records.append(measure(run, name, {"method": method}, 0, arguments.num_samples))
    show(f"samplers, {arguments.config}, {arguments.num_samples} samples", run.device, records)
    plot(arguments.plot or pathlib.Path(arguments.workdir) / "samplers.png", records)


def measure(run: Run, name: str, options: dict, steps: int, count: int) -> dict:
    """FID of a sampler in a number of steps, and the evaluations that it made."""
    sampling = run.config.sampling
    sampling.update(options, num_steps=steps)
    noise = SampleNoise(run.config.seed, range(count), run.device)
    images, evaluations = run.sampler(count)(run.state["model"], noise=noise)
    return {"sampler": name, "evaluations": evaluations, "fid": fid(run, images)}


def fid(run: Run, images: Tensor) -> float:
    """Distance of samples (B, C, H, W) in [0, 1] to the data set."""
    extractor = get_extractor(run.config, run.device)
    found = extractor(to_uint8(images, run.levels))
    statistics = Statistics.of(extractor, found["pool_3"], found["logits"])
    return metrics(load_dataset_stats(run.config), statistics, run.device)["fid"]


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
    main()
