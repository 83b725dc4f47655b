"""Train ours, a plain loop and Diffusers side by side, and compare what comes out.

    python -m benchmarks.peers --minutes 10

See `benchmarks.peers` for how.  The table is in WORKDIR/peers.md, with all figures in peers.json; a
second start takes up a training that is there.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from ml_collections import ConfigDict

from benchmarks import variants
from benchmarks.measure import hardware
from benchmarks.peers import results, shared
from benchmarks.peers.commands import ALL, OURS, PLAIN, RUNS, Commands
from benchmarks.peers.contest import (
    Contestant,
    compete,
    entries_of_journal,
    entries_of_run,
    rates,
    summary,
    times_as_fast,
)
from benchmarks.peers.environment import ROOT, python_of, variables
from configs.defaults import load
from run_lib import setup
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.files import write_text
from score_lib.disk.reports import markdown_table

# Schedulers of the library for few steps; that of its chain comes last.
FEW_STEPS = ("DPMSolverMultistepScheduler", "DDIMScheduler")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and print; a mistake or a peer that fails ends it with one message."""
    given = parse(argv)
    os.chdir(ROOT)
    torch.set_num_threads(given.threads)
    with brief_mistakes(RuntimeError):
        Comparison(given).run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with absolute paths."""
    parser = variants.arguments(__doc__.splitlines()[0])
    parser.set_defaults(config="vp/fashion_mnist", rounds=10)
    parser.add_argument("--workdir", default="runs/peers", help="folder for everything")
    parser.add_argument("--environment", default="", help="default: WORKDIR/env")
    parser.add_argument("--contestants", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--log_freq", type=int, default=10, help="steps between two log lines")
    parser.add_argument("--samples", type=int, default=2000, help="of each network")
    parser.add_argument("--chain_samples", type=int, default=100, help="by 1000 steps of DDPM")
    parser.add_argument("--evaluations", type=int, default=20, help="of the network, a sample")
    parser.add_argument("--held_out", type=int, default=2000, help="images for the loss")
    given = parser.parse_args(argv)
    given.workdir = pathlib.Path(given.workdir).resolve()
    given.environment = pathlib.Path(given.environment or given.workdir / "env").resolve()
    return given


def configured(given: argparse.Namespace) -> ConfigDict:
    """The config that all are trained by, on the CPU, and whose samples are a solver's.

    Raises:
        ValueError: it is of another process or of other data than the peers know.
    """
    given.batch_size = given.batch_size or load(given.config).training.batch_size
    config, _ = variants.configured(given, given.batch_size)
    config.device, config.training.log_freq = "cpu", given.log_freq
    sampling = {"method": "dpmpp_2m", "predictor": "none", "corrector": "none"}
    config.sampling.update(**sampling, num_steps=given.evaluations)
    process, images = (config.training.sde, config.training.continuous), config.data.image_size
    if process != ("vpsde", True) or not images or config.training.condition:
        raise ValueError(
            f"{given.config} is not an unconditional network of images for the continuous VP SDE, "
            "which is all that the peers know: choose vp/fashion_mnist or vp/digits"
        )
    return config


class Comparison:
    """One comparison.

    Args:
        given: the command line.
    Raises:
        ValueError: the config does not fit.
    """

    def __init__(self, given: argparse.Namespace):
        self.given, self.workdir = given, given.workdir
        self.config = configured(given)
        network = setup(self.config).state["model"]
        parameters = sum(p.numel() for p in network.parameters())
        # Installing may fail: before hours of training.
        python = python_of(given.environment)
        self.commands = Commands(given, self.config, python, parameters)

    def run(self) -> None:
        """Train, measure, print the table and write it."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_text(self.workdir / "config.json", self.config.to_json_best_effort())
        self.images = results.write_images(self.config, self.workdir / "images.npz")
        self.distances = results.Distances(self.config, self.workdir)
        training = self.trained()
        rows = [{"trained by": "held-out images", **self.distances.of(self.held_out_bytes())}]
        for name in self.given.contestants:
            first = {"trained by": name, **training[name]}
            for row in self.ours(name) if name in (*RUNS, PLAIN) else self.diffusers(name):
                rows.append(first | row)
                first = {"trained by": name}
        self.report(rows)

    def trained(self) -> dict[str, dict]:
        """Steps, rates and memory of each training, from this start or an earlier one."""
        path, settings = self.workdir / "trainings.json", self.settings()
        if path.exists():
            record = json.loads(path.read_text())
            if record["settings"] == settings:
                return record["trained"]
            raise ValueError(f"{path} is of other settings: choose another --workdir, or remove it")
        seconds = 60 * self.given.minutes
        runs = [name for name in self.given.contestants if name in RUNS]
        steps = {
            name: results.steps_in(seconds, self.config, self.commands.precision(name))
            for name in runs
        }
        self.commands = self.commands._replace(steps=steps)
        contestants = [self.contestant(name) for name in self.given.contestants]
        for contestant in contestants:
            shutil.rmtree(contestant.folder, ignore_errors=True)
        compete(contestants, self.given.minutes, self.given.rounds)
        found = self.rates_of(contestants)
        write_text(path, json.dumps({"settings": settings, "trained": found}, indent=2) + "\n")
        return found

    def settings(self) -> dict[str, object]:
        """The options that the trainings depend on."""
        names = ("config", "set", "batch_size", "minutes", "rounds", "threads", "log_freq")
        return {name: getattr(self.given, name) for name in (*names, "contestants")}

    def contestant(self, name: str) -> Contestant:
        """The training of a name, not yet started."""
        command = functools.partial(self.commands.train, name)
        environment = variables(self.given.threads)
        return Contestant(name, command, self.commands.folder(name), name not in RUNS, environment)

    def rates_of(self, contestants: list[Contestant]) -> dict[str, dict]:
        """Steps, rates and memory of the trainings."""
        found, all_rates = {}, {}
        for one in contestants:
            run = one.name in RUNS
            read, file = (
                (entries_of_run, "stdout.txt") if run else (entries_of_journal, "log.jsonl")
            )
            entries = read(one.folder / file)
            all_rates[one.name] = rates(entries, one.windows, self.given.batch_size)
            last = entries[-1][1] if entries else 0
            found[one.name] = {"steps": last, **summary(all_rates[one.name])}
            if OURS in all_rates and one.name != OURS:
                found[one.name] |= times_as_fast(all_rates[OURS], all_rates[one.name])
            found[one.name] |= {"CPU s": one.cpu_s, "peak MB": one.peak_mb}
        return found

    def ours(self, name: str) -> Iterator[dict]:
        """Rows of our network: its loss, and samples; those of a plain loop are its own first."""
        given = self.given
        run = results.trained(self.config, self.commands.folder(name))
        loss = results.loss_of(run, self.images, given.held_out)
        if name == PLAIN:
            evaluations = 2 * (given.evaluations // 2)
            drawn = self.samples_of(name, "heun", given.samples, evaluations)
            yield loss | {"sampler": "Heun", "evaluations": evaluations} | drawn
            loss = {}
        samples, seconds = results.draw(run, given.samples, given.batch_size)
        row = loss | {"sampler": "ours, DPM-Solver++ 2M", "evaluations": given.evaluations}
        yield row | self.distances.of(samples, seconds)

    def diffusers(self, name: str) -> Iterator[dict]:
        """Rows of the library's network: its loss, and samples by its schedulers."""
        given, file = self.given, self.commands.folder(name) / "losses.npz"
        self.call(self.commands.peer(name, "loss", "--out", file))
        row = results.loss_record(np.load(file)["losses"])
        cases = [(scheduler, given.samples, given.evaluations) for scheduler in FEW_STEPS]
        if given.chain_samples:
            cases.append(("DDPMScheduler", given.chain_samples, shared.CHAIN))
        for scheduler, count, evaluations in cases:
            drawn = self.samples_of(name, scheduler, count, evaluations, "--scheduler", scheduler)
            row |= {"sampler": scheduler.removesuffix("Scheduler"), "evaluations": evaluations}
            yield row | drawn
            row = {}

    def samples_of(
        self, name: str, sampler: str, count: int, evaluations: int, *more: str
    ) -> dict[str, float | int | None]:
        """Distances of samples that a peer draws by itself."""
        file = self.commands.folder(name) / f"samples_{sampler}.npz"
        asked = "--samples", count, "--evaluations", evaluations, "--out", file, *more
        self.call(self.commands.peer(name, "sample", *asked))
        with np.load(file) as found:
            return self.distances.of(found["samples"], float(found["seconds"]))

    def call(self, command: list[str]) -> None:
        """Run a peer's command.

        Raises:
            RuntimeError: it fails.
        """
        environment = variables(self.given.threads)
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{made.stderr.strip()[-2000:]}")

    def held_out_bytes(self) -> np.ndarray:
        """As many held-out images as samples are drawn, uint8 (N, H, W, C)."""
        grey = self.images.test[: self.given.samples].movedim(1, -1).double()
        return (grey * (255 / (self.images.levels - 1))).round().byte().numpy()

    def report(self, rows: list[dict]) -> None:
        """Print the table; write it, and all figures."""
        device = torch.device("cpu")
        title = (
            f"{self.given.config}, batches of {self.given.batch_size}, "
            f"{self.given.minutes:g} minutes each, on {hardware(device)}"
        )
        table = f"{title}\n\n{markdown_table(rows)}"
        print(f"\n{table}", flush=True)
        facts = {"settings": self.settings(), "hardware": hardware(device), "results": rows}
        write_text(self.workdir / "peers.json", json.dumps(facts, indent=2) + "\n")
        write_text(self.workdir / "peers.md", table)


if __name__ == "__main__":
    main()
