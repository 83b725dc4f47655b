"""Cost of reproducing the published rows: evaluations, operations, hours, memory.

    python -m benchmarks.published --tflops 10

Nothing of the networks is computed.  A sampler's evaluations of the network are counted with a
network of zeros, and its operations are counted as in `--mode check`.  The evaluations of the
adaptive solver depend on the weights, so that those below are assumed.
"""

import argparse
import functools

import torch
from torch import nn

import run_lib
from configs.defaults import load
from models.utils import get_model
from score_lib.base.mistakes import brief_mistakes
from score_lib.checks.network import cost
from score_lib.disk.reports import markdown_table
from score_lib.runs.published import KINDS, ROWS
from score_lib.samplers.configured import get_sampling_fn
from score_lib.scores import label_at

ODE_EVALUATIONS = 200
# As of digits, and of a forward pass: with Hutchinson's probe it goes backwards, too.
LIKELIHOOD_EVALUATIONS, WITH_PROBE = 400, 3


class _Zeros(nn.Module):
    """A network whose output is 0."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def main(argv: list[str] | None = None) -> None:
    """Print the published figures, and the requirements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=10.0, help="rate of the device")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args(argv)
    print(markdown_table([printed(name) for name in options.rows]))
    print(markdown_table([requirements(name, options.tflops * 1e12) for name in options.rows]))


def printed(name: str) -> dict[str, str]:
    """The figures of a row as they were printed, and where."""
    row = ROWS[name]
    found = {"experiment": f"`{name}`", "row": row.name}
    titles = {"fid": "FID", "inception_score": "IS", "fid_ode": "FID, ODE", "bpd": "bits/dim"}
    for kind, title in titles.items():
        texts = [
            f"{f.text}{f' ± {f.spread:g}' if f.spread else ''} ({f.place})"
            for f in row.figures
            if f.kind == kind
        ]
        found[title] = ", ".join(texts)
    return found


def requirements(name: str, rate: float) -> dict[str, object]:
    """A row of the table.

    Args:
        rate: operations a second.
    """
    run = run_lib.setup(load(name))
    label = label_at(run.sde, torch.full((1,), 0.5 * run.sde.T), **run.reading)
    found = cost(functools.partial(get_model(run.config.model.name), run.config), run.shape, label)
    kinds = {figure.kind for figure in ROWS[name].figures}
    images = ROWS[name].num_samples
    passes = run.config.eval.bpd_num_repeats * ROWS[name].num_images
    steps = sampler_evaluations(run)
    evaluations = {
        "samples": (steps, images) if kinds & {"fid", "inception_score"} else None,
        "ode": (ODE_EVALUATIONS, images) if any(KINDS[kind].ode for kind in kinds) else None,
        "bpd": (WITH_PROBE * LIKELIHOOD_EVALUATIONS, passes) if "bpd" in kinds else None,
    }
    hours = {
        key: f"{value[0] * value[1] * found.operations / rate / 3600:.3g}" if value else ""
        for key, value in evaluations.items()
    }
    return {
        "experiment": f"`{name}`",
        "GFLOP": f"{found.operations / 1e9:.3g}",
        "evaluations": str(steps) if evaluations["samples"] else "",
        "h, samples": hours["samples"],
        "h, ODE": hours["ode"],
        "h, bits/dim": hours["bpd"],
        "weights, MB": f"{4 * found.parameters / 1e6:.0f}",
        "MB an image": f"{found.activations / 1e6:.3g}",
    }


def sampler_evaluations(run: run_lib.Run) -> int:
    """How often the configured sampler evaluates the network."""
    shape, eps = (1, *run.shape), run.sde.sampling_eps
    sample = get_sampling_fn(run.config, run.sde, shape, run.inverse_scaler, eps)
    return int(sample(_Zeros())[1])


if __name__ == "__main__":
    with brief_mistakes():
        main()
