"""Train and evaluate digits with several seeds: their figures, and how far seeds differ.

    python -m benchmarks.digits_figures --workdir runs/reproduce --seeds 1 2 3

Each seed has a folder of its own, in which training and evaluation resume.  The row of digits in
`score_lib.runs.published` was printed by it for other seeds.  The exit code is 1 if a figure is
outside its band.
"""

import argparse
import logging
import pathlib
import sys

import numpy as np

import run_lib
from configs.vp.digits import get_config
from score_lib.base.memory import keep_freed_memory
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.logs import log_to_console
from score_lib.disk.reports import markdown_table


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate the seeds, then print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/reproduce", help="folder of the seeds' folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--figures", default="", help="which, as eval.figures; default: all")
    options = parser.parse_args(argv)
    log_to_console()
    keep_freed_memory()
    workdir = pathlib.Path(options.workdir)
    found = [
        record | {"seed": seed}
        for seed in options.seeds
        for record in figures_of(seed, workdir / f"seed_{seed}", options.figures)
    ]
    print(f"\n{markdown_table(found)}\n{markdown_table(summary(found))}")
    if any(record["verdict"].startswith("outside") for record in found):
        sys.exit(1)


def figures_of(seed: int, folder: pathlib.Path, figures: str) -> list[dict]:
    """The records of `run_lib.reproduce` for a seed, which is trained if need be."""
    config = get_config()
    config.seed, config.eval.figures = seed, figures
    if not (folder / "checkpoints" / "checkpoint_1.pth").exists():
        logging.info("training seed %d", seed)
        run_lib.train(config, folder)
    return run_lib.reproduce(config, folder)


def summary(found: list[dict]) -> list[dict]:
    """Mean over seeds of each figure, and the standard deviation of a single seed."""
    rows = []
    for figure in dict.fromkeys(record["figure"] for record in found):
        values = np.array([record["ours"] for record in found if record["figure"] == figure])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        mean = float(values.mean())
        rows.append({"figure": figure, "seeds": len(values), "mean": mean, "spread": spread})
    return rows


if __name__ == "__main__":
    with brief_mistakes():
        main()
