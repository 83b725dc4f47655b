"""The whole path in minutes, without a GPU or a network: train, sample, evaluate digits.

    python demo.py --workdir runs/demo

Trains `configs/vp/digits.py` on scikit-learn's 8 px digits, draws samples from the last
checkpoint, and evaluates it on held-out digits.  Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import time

import run_lib
from configs.vp.digits import get_config
from datasets import get_dataset
from utils.images import save_grid
from utils.logs import log_to_console
from utils.reports import markdown_table


def main() -> None:
    """Run the three modes one after the other, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo", help="folder of the run")
    workdir = pathlib.Path(parser.parse_args().workdir)
    log_to_console()
    start = time.perf_counter()
    config = get_config()
    run_lib.train(config, workdir)
    config.eval.checkpoint = str(workdir / "checkpoints" / "checkpoint_1.pth")
    samples = run_lib.sample(config, workdir)
    records = run_lib.evaluate(config, workdir)
    save_real_digits(config, workdir / "real.png")
    logging.info("done in %.0f s", time.perf_counter() - start)
    print(f"\n{markdown_table(records)}")
    print(f"samples:     {samples / 'sample.png'}")
    print(f"real digits: {workdir / 'real.png'}")


def save_real_digits(config, path: pathlib.Path) -> None:
    """A grid of held-out digits, to compare with."""
    _, held_out, _ = get_dataset(config, evaluation=True)
    save_grid(path, next(iter(held_out))["image"][: config.sampling.num_samples])


if __name__ == "__main__":
    main()
