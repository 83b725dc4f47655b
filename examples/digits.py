"""The whole path in minutes, on a CPU and without a network: train, sample, evaluate digits.

    python -m examples.digits --workdir runs/demo

Trains `configs/vp/digits.py` on scikit-learn's 8 px digits, draws samples from the last checkpoint
and evaluates it.  Held-out digits and noise are measured beside the samples.  Started again, it
resumes.
"""

import argparse
import logging
import pathlib
import time

import torch
from torch import Tensor

import run_lib
from configs.vp.digits import get_config
from datasets import get_streams
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from score_lib.base.memory import keep_freed_memory
from score_lib.base.tensors import SampleNoise
from score_lib.base.threads import settle_threads
from score_lib.disk.arrays import load_arrays
from score_lib.disk.logs import log_to_console
from score_lib.disk.pictures import save_grid
from score_lib.disk.reports import markdown_table, mean_and_error
from score_lib.runs.heldout import DataBytes
from score_lib.runs.measures import likelihood_terms

# Images of each kind that enter bits/dim.
_FOR_LIKELIHOOD = 64


def main() -> None:
    """Train, sample and evaluate, then print and draw the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo", help="folder of the run")
    workdir = pathlib.Path(parser.parse_args().workdir)
    log_to_console()
    keep_freed_memory()
    settle_threads()
    start = time.perf_counter()
    config = get_config()
    run_lib.train(config, workdir)
    config.eval.checkpoint = str(workdir / "checkpoints" / "checkpoint_1.pth")
    picture = run_lib.sample(config, workdir) / "comparison.png"
    report = run_lib.evaluate(config, workdir)
    samples = load_arrays(workdir / "eval" / "ckpt_1" / "samples_0.npz")["samples"]
    table = compare(run_lib.restored(config, workdir), torch.from_numpy(samples), picture)
    logging.info("done in %.0f s", time.perf_counter() - start)
    print(f"\nHeld-out digits:\n{markdown_table(report)}\nSamples, digits and noise:\n{table}")
    print(f"Left: samples. Right: held-out digits. {picture}")


def compare(run: run_lib.Run, samples: Tensor, picture: pathlib.Path) -> str:
    """Draw samples (N, H, W, C) beside held-out digits; a table of figures of both and of noise."""
    _, _, info = get_streams(run.config, evaluation=True)
    held_out = torch.cat(list(DataBytes(run.config, info.sources["test"])))
    rows = [torch.cat([samples[i : i + 8], held_out[i : i + 8]]) for i in range(0, 64, 8)]
    save_grid(picture, torch.cat(rows).movedim(-1, 1) / 255, columns=16)
    torch.manual_seed(run.config.seed)
    noise = (torch.randint(info.levels, held_out.shape) * 255 // (info.levels - 1)).byte()
    kinds = {"samples": samples, "real digits, held out": held_out, "noise": noise}
    with run.state["ema"].applied(run.state["model"].parameters()):
        records = [{"images": kind} | figures(run, x, info.levels) for kind, x in kinds.items()]
    return markdown_table(records)


def figures(run: run_lib.Run, pixels: Tensor, levels: int) -> dict[str, float | None]:
    """Bits/dim of images (N, H, W, C), and distances to the training digits."""
    grey = (pixels[:_FOR_LIKELIHOOD].movedim(-1, 1) * ((levels - 1) / 255)).round()
    x = run.scaler(((grey + torch.rand_like(grey)) / levels).to(run.device))
    noise = SampleNoise(run.config.seed, range(len(x)), run.device)
    bits = mean_and_error("bits/dim", likelihood_terms(run, x, levels, noise)["bpd"])
    extractor = get_extractor(run.config, run.device)
    found = extractor(pixels.contiguous())
    statistics = Statistics.of(extractor, found["pool_3"], found["logits"])
    return bits | metrics(load_dataset_stats(run.config), statistics, run.device)


if __name__ == "__main__":
    main()
