"""The whole path in minutes, without a GPU or a network: train, sample, evaluate digits.

    python demo.py --workdir runs/demo

Trains `configs/vp/digits.py` on scikit-learn's 8 px digits, draws samples from the last
checkpoint, and evaluates it; then shows the same figures for held-out digits and for noise.
Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import time

import numpy as np
import torch
from torch import Tensor

import run_lib
from configs.vp.digits import get_config
from score_lib.base.tensors import SampleNoise
from score_lib.data import get_dataset
from score_lib.disk.checkpoints import restore_checkpoint
from score_lib.disk.files import load_arrays
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import save_grid
from score_lib.disk.reports import markdown_table, mean_and_error
from score_lib.metrics import Statistics, get_extractor, load_dataset_stats, metrics
from score_lib.runs.evaluate import DataBytes, likelihood_terms

# Images of each kind whose bits/dim are computed for the comparison.
_FOR_LIKELIHOOD = 64


def main() -> None:
    """Run the modes one after the other, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo", help="folder of the run")
    workdir = pathlib.Path(parser.parse_args().workdir)
    log_to_console()
    start = time.perf_counter()
    config = get_config()
    run_lib.train(config, workdir)
    config.eval.checkpoint = str(workdir / "checkpoints" / "checkpoint_1.pth")
    folder = run_lib.sample(config, workdir)
    report = run_lib.evaluate(config, workdir)
    table = compare(config, workdir, folder)
    logging.info("done in %.0f s", time.perf_counter() - start)
    print(f"\nHeld-out digits:\n{markdown_table(report)}\nImages beside each other:\n{table}")
    print(f"samples and real digits: {folder / 'comparison.png'}")


def compare(config, workdir: pathlib.Path, folder: pathlib.Path) -> str:
    """The same figures for samples, for real digits and for noise, as a table and a picture."""
    run = run_lib.setup(config)
    restore_checkpoint(config.eval.checkpoint, run.state, run.device, must_exist=True)
    _, _, info = get_dataset(run.config, evaluation=True)
    held_out = torch.cat(list(DataBytes(run.config, info.sources["test"])))
    samples = torch.from_numpy(
        load_arrays(workdir / "eval" / "ckpt_1" / "samples_0.npz")["samples"]
    )
    noise = torch.randint(info.levels, held_out.shape) * 255 // (info.levels - 1)
    kinds = {"samples": samples, "real digits, held out": held_out, "noise": noise.byte()}
    with run.state["ema"].applied(run.state["model"].parameters()):
        records = [{"images": kind} | figures(run, x, info.levels) for kind, x in kinds.items()]
    rows = [torch.cat([samples[i : i + 8], held_out[i : i + 8]]) for i in range(0, 64, 8)]
    save_grid(folder / "comparison.png", torch.cat(rows).movedim(-1, 1) / 255, columns=16)
    return markdown_table(records)


def figures(run, pixels: Tensor, levels: int) -> dict[str, float | None]:
    """Bits/dim under the model, and distances to the training digits, of images (B, H, W, C)."""
    some = pixels[:_FOR_LIKELIHOOD].movedim(-1, 1)
    grey = (some * ((levels - 1) / 255)).round()
    dequantised = (grey + torch.rand_like(grey)) / levels
    noise = SampleNoise(run.config.seed, range(len(some)), run.device)
    terms = likelihood_terms(run, run.scaler(dequantised.to(run.device)), levels, noise)
    extractor = get_extractor(run.config, run.device)
    found = extractor(np.ascontiguousarray(pixels))
    statistics = Statistics.of(extractor, found["pool_3"], found["logits"])
    distances = metrics(load_dataset_stats(run.config), statistics, run.device)
    return mean_and_error("bits/dim", terms["bpd"]) | distances


if __name__ == "__main__":
    main()
