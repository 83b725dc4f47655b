"""The whole path in minutes, on a CPU and without a network: train, sample, evaluate digits.

    python -m examples.digits --workdir runs/demo

Trains `configs/vp/digits.py` on scikit-learn's 8 px digits and evaluates the last checkpoint.  Its
samples are drawn beside held-out digits, and noise is given to the same measures.  Started again,
it resumes.
"""

import logging
import pathlib
import time

import torch
from torch import Tensor

import run_lib
from configs.vp.digits import get_config
from datasets import get_streams
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from examples.common import workdir_of
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.tensors import SampleNoise
from score_lib.disk.arrays import load_arrays
from score_lib.disk.pictures import save_grid
from score_lib.disk.reports import markdown_table, mean_and_error
from score_lib.runs.heldout import DataBytes
from score_lib.runs.measures import likelihood_terms

# Samples, and images of noise, that enter bits/dim.
_FOR_LIKELIHOOD = 64
_BITS = "bits/dim"


def main() -> None:
    """Train and evaluate, then print and draw the comparison."""
    workdir = workdir_of(__doc__.splitlines()[0], "runs/demo")
    start = time.perf_counter()
    config = get_config()
    config.training.snapshot_sampling = False  # the evaluation draws samples
    run_lib.train(config, workdir)
    config.eval.checkpoint = str(workdir / "checkpoints" / "checkpoint_1.pth")
    report = run_lib.evaluate(config, workdir)
    picture = workdir / "comparison.png"
    table = compare(run_lib.restored(config, workdir), report[0], workdir / "eval", picture)
    logging.info("done in %.0f s", time.perf_counter() - start)
    print(f"\nHeld-out digits:\n{markdown_table(report)}\nSamples, digits and noise:\n{table}")
    print(f"Left: samples. Right: held-out digits. {picture}")


def compare(run: run_lib.Run, report: dict, folder: pathlib.Path, picture: pathlib.Path) -> str:
    """Draw samples beside held-out digits; a table of figures of both and of noise.

    Args:
        report: of the evaluation; its bits/dim are those of held-out digits.
        folder: of the evaluation, with its samples.
    """
    samples = torch.from_numpy(load_arrays(folder / "ckpt_1" / "samples_0.npz")["samples"])
    _, _, info = get_streams(run.config, evaluation=True)
    held_out = torch.cat(list(DataBytes(run.config, info.sources["test"])))
    rows = [torch.cat([samples[i : i + 8], held_out[i : i + 8]]) for i in range(0, 64, 8)]
    save_grid(picture, torch.cat(rows).movedim(-1, 1) / 255, columns=16)
    torch.manual_seed(run.config.seed)
    noise = (torch.randint(info.levels, held_out.shape) * 255 // (info.levels - 1)).byte()
    of_samples, of_noise = bits_per_dim(run, [samples, noise], info.levels)
    of_digits = {key.replace("bpd", _BITS): report[key] for key in report if key[:3] == "bpd"}
    kinds = {"samples": samples, "real digits, held out": held_out, "noise": noise}
    bits = (of_samples, of_digits, of_noise)
    distances = [distances_to_data(run, pixels) for pixels in kinds.values()]
    rows = zip(kinds, bits, distances, strict=True)
    return markdown_table([{"images": kind} | b | d for kind, b, d in rows])


def bits_per_dim(run: run_lib.Run, kinds: list[Tensor], levels: int) -> list[dict[str, float]]:
    """Bits/dim of images of each kind, (N, H, W, C) in bytes, with their standard errors.

    Those of all kinds are integrated at once, which takes less time than one after the other.
    """
    pixels = torch.cat([kind[:_FOR_LIKELIHOOD] for kind in kinds]).movedim(-1, 1)
    grey = (pixels * ((levels - 1) / 255)).round()
    x = run.scaler(((grey + torch.rand_like(grey)) / levels).to(run.device))
    noise = SampleNoise(run.config.seed, range(len(x)), run.device)
    with run.state["ema"].applied(run.state["model"].parameters()):
        bits = likelihood_terms(run, x, levels, noise)["bpd"]
    return [mean_and_error(_BITS, part) for part in bits.reshape(len(kinds), -1)]


def distances_to_data(run: run_lib.Run, pixels: Tensor) -> dict[str, float | None]:
    """Distances of images (N, H, W, C) to the training digits."""
    extractor = get_extractor(run.config, run.device)
    found = extractor(pixels.contiguous())
    statistics = Statistics.of(extractor, found["pool_3"], found["logits"])
    return metrics(load_dataset_stats(run.config), statistics, run.device)


if __name__ == "__main__":
    with brief_mistakes():
        main()
