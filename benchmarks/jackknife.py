"""Errors of FID and Inception Score by the jackknife, beside their spread over sets of samples.

    python -m benchmarks.jackknife --sets 8

The samples are of the project's weights of digits; each set has `eval.num_samples` of its own.
"""

import argparse
import pathlib

import numpy as np

import run_lib
from configs.vp.digits import get_config
from evaluation import Statistics, get_extractor, load_dataset_stats
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.pictures import to_uint8
from score_lib.disk.reports import markdown_table
from score_lib.metrics import distances
from score_lib.metrics.jackknife import sampling_errors

WEIGHTS = pathlib.Path(__file__).parents[1] / "assets" / "weights" / "digits.safetensors"
_ERROR = "_standard_error"


def main(argv: list[str] | None = None) -> None:
    """Draw the sets, and print their figures and the spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=8, help="sets of samples")
    parser.add_argument("--size", type=int, default=0, help="samples in a set; 0: as the config")
    options = parser.parse_args(argv)
    config = get_config()
    config.model.weights = str(WEIGHTS)
    run = run_lib.restored(config, "")
    size = options.size or run.config.eval.num_samples
    rows = [figures(run, range(k * size, (k + 1) * size)) for k in range(options.sets)]
    print(markdown_table(rows))
    for name in ("fid", "inception_score"):
        values, errors = (np.array([row[key] for row in rows]) for key in (name, f"{name}{_ERROR}"))
        print(f"{name}: spread {values.std(ddof=1):.4f}, jackknife {errors.mean():.4f}")


def figures(run: run_lib.Run, indices: range) -> dict[str, float]:
    """FID and Inception Score of samples by number, with their errors."""
    extractor, real = get_extractor(run.config, run.device), load_dataset_stats(run.config)
    found = extractor(to_uint8(run.draw(indices), run.levels).numpy())
    fake = Statistics.of(extractor, found["pool_3"], found["logits"])
    return {
        "fid": distances.frechet_distance(real.moments(), fake.moments()),
        "inception_score": distances.inception_score(fake.logits)[0],
    } | sampling_errors(real, fake)


if __name__ == "__main__":
    with brief_mistakes():
        main()
