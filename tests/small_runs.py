"""Small runs for tests: a config that trains in seconds, and runs in processes of their own."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from configs.defaults import load
from datasets import get_streams
from score_lib.data.stream import ImageStream

ROOT = pathlib.Path(__file__).parents[1]

SMALL = {
    "model.nf": 8,
    "model.num_scales": 5,
    "data.num_workers": 0,
    "training.batch_size": 16,
    "training.n_iters": 12,
    "training.log_freq": 1,
    "training.eval_freq": 4,
    "training.snapshot_freq": 6,
    "training.snapshot_freq_for_preemption": 3,
    "sampling.method": "pc",
    "sampling.num_samples": 4,
    "sampling.num_steps": 0,
    "eval.bpd_steps": 6,
}


def small_config(name="vp/digits", **changes):
    """A digits config with everything small; changes are options with __ for the dot.

    Where it names a predictor, that draws its samples.
    """
    config = load(name)
    small = dict(SMALL)
    if config.sampling.predictor == "none":
        small["sampling.method"] = config.sampling.method
    config.update_from_flattened_dict(small | dotted(changes))
    return config


def dotted(changes):
    """Options by their dotted names, from keywords with __ for the dot."""
    return {key.replace("__", "."): value for key, value in changes.items()}


def contents(folder):
    """The bytes of all files below a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def few_digits(folder, **changes):
    """Options of the data 400 digits, 40 of them held out, as a user's own images, and of their
    evaluation."""
    _, _, info = get_streams(small_config(), evaluation=True)
    np.save(folder / "digits.npy", info.sources["train"].read(np.arange(400))[0].numpy())
    return {
        "data__dataset": "IMAGES",
        "data__path": str(folder / "digits.npy"),
        "eval__stats": str(folder / "stats.npz"),
        "eval__extractor": "digits",
        "eval__begin_ckpt": 1,
        "eval__end_ckpt": 1,
        "eval__enable_sampling": True,
        **changes,
    }


def command(config="configs/vp/digits.py", workdir="", mode="train", **changes):
    """The command line of a small run."""
    options = [f"--config.{key}={value}" for key, value in (SMALL | dotted(changes)).items()]
    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / config}",
        f"--workdir={workdir}",
        f"--mode={mode}",
        *options,
    ]


def logged(folder):
    """The records of a run's log of numbers."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def run(arguments, **options):
    """Run a command to its end and return it with its output as text."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=300, **options
    )


def run_forked(arguments, cwd=".", prepare=lambda: None):
    """Run `main.py` in a fork of this process, which saves the imports: exit code and output.

    `prepare` is called in the fork first.
    """
    with tempfile.TemporaryFile("w+") as output:
        return _ended(start_forked(arguments, output, cwd, prepare), output)


def run_module_forked(module, *arguments, cwd="."):
    """`run_forked` of a program that `python -m` starts."""
    with tempfile.TemporaryFile("w+") as output:
        run = functools.partial(runpy.run_module, module, None, "__main__")
        argv = [module, *map(str, arguments)]
        return _ended(_forked(_main, run, argv, cwd, output), output)


def start_forked(arguments, output, cwd=".", prepare=lambda: None):
    """The process of `run_forked`, under way; its output goes to a file."""
    argv = [str(ROOT / "main.py"), *arguments]
    return _forked(_main, lambda: run_program(argv), argv, cwd, output, prepare)


def _forked(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def _ended(process, output):
    process.join()
    output.seek(0)
    return process.exitcode, output.read()


def _main(run, argv, cwd, output, prepare=lambda: None):
    sys.stdout = sys.stderr = output
    sys.argv = argv
    os.chdir(cwd)
    prepare()
    run()


def run_program(argv):
    """Run `main.py` in this process, which may have imported it before."""
    # The flags that the imported module defined would be defined a second time.
    for flag in list(flags.FLAGS.flags_by_module_dict().get("main", [])):
        delattr(flags.FLAGS, flag.name)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def stop_in_the_wait_for_data(monkeypatch, after):
    """A batch that does not come after so many, and a signal meanwhile."""
    batches = ImageStream._batches

    def stuck(self, start):
        for count, batch in enumerate(batches(self, start)):
            if count == after:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2)
            yield batch

    monkeypatch.setattr(ImageStream, "_batches", stuck)
