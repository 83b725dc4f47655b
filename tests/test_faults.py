"""Runs that are killed, full disks, damaged files: nothing is lost."""

import os
import random
import shutil
from signal import SIGKILL, SIGTERM, SIGUSR1

import numpy as np
import pytest
import torch
from faults import disks, files, folders, kills
from faults.outcomes import (
    META,
    SNAPSHOTS,
    evaluations_differ,
    reached_step,
    same,
    trainings_differ,
)
from faults.runs import Bench

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked from the tests"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


def assert_nothing_lost(results, at_least=1):
    results = list(results)
    if any("skipped" in result.kind for result in results):
        pytest.skip(str(results))
    assert [result for result in results if result.problems] == []
    assert len(results) >= at_least


def test_a_killed_training_run_resumes(bench):
    workdir = bench.new()
    for step, number in {13: SIGKILL, 23: SIGTERM, 37: SIGUSR1}.items():
        attempt = kills.Attempt(bench, "train", "fork", workdir)
        assert attempt.started.until(lambda step=step: reached_step(workdir) >= step)
        attempt.strike(random.Random(0), number, "process")
        assert attempt.disturbed and attempt.problems() == []
    assert bench.finish("train", workdir, "fork") == []


def test_a_killed_evaluation_resumes(bench):
    workdir = bench.new()
    folder = workdir / "eval"
    attempt = kills.Attempt(bench, "eval", "fork", workdir)
    assert attempt.started.until(lambda: len(list(folder.rglob("*.npz"))) >= 4)
    attempt.strike(random.Random(0), SIGTERM)
    assert attempt.disturbed and attempt.problems() == []
    assert bench.finish("eval", workdir) == []


def test_a_kill_during_a_checkpoint_keeps_the_previous(bench):
    assert kills.killed_while_saving(bench, random.Random(0), 10) == []


def test_kills_at_random_moments_lose_nothing(bench):
    assert_nothing_lost(kills.campaign(bench, random.Random(1), "train", "fork", 2), at_least=3)


def test_an_elastic_run_survives_the_death_of_a_rank(bench):
    problems = kills.killed_rank(bench, random.Random(0), "train", "two elastic")[1]
    assert problems == []


@pytest.mark.parametrize(("mode", "moment"), [("train", "a checkpoint"), ("eval", "the report")])
def test_nothing_is_lost_when_the_disk_fills_up(mode, moment, bench):
    assert_nothing_lost(disks.cases(bench, random.Random(0), only=[(mode, moment)]))


def test_damaged_checkpoints_are_skipped_or_refused(bench):
    draws, killed = random.Random(0), files.killed_training(bench)
    assert files.skipped(bench, draws, killed, files.cut, 2)[-1] == []
    assert files.all_damaged(bench, draws, killed, files.flip_data)[-1] == []


def test_a_damaged_round_is_refused(bench):
    killed = files.killed_evaluation(bench)
    found = files.refused(bench, random.Random(0), killed, files.cut, "eval/*bpd_1.npz")
    assert found[-1] == []


def test_a_second_run_is_refused_until_the_first_is_dead(bench):
    assert folders.second(bench, "train", "fork", "fork") == []
    assert folders.dead_owner(bench, random.Random(0)) == []


def test_clocks_that_jump_do_not_matter(bench):
    assert folders.clocks(bench, random.Random(0), "train") == []


def test_differences_of_training_runs_are_found(bench, tmp_path):
    """One weight in its last bit, one figure of the log, one pixel, one file too many."""
    trained = bench.trained()
    copies = [shutil.copytree(trained, tmp_path / str(number)) for number in range(5)]
    assert trainings_differ(copies[0], trained) == []
    state = torch.load(copies[1] / META, weights_only=True)
    weight = next(iter(state["model"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(10.0))
    torch.save(state, copies[1] / META)
    log = copies[2] / "metrics.jsonl"
    log.write_text(log.read_text().replace("7", "8", 1))
    pixels = copies[3] / f"samples/iter_{SNAPSHOTS}/sample.np"
    values = np.load(pixels)
    values.flat[0] ^= 1
    with pixels.open("wb") as file:
        np.save(file, values)
    (copies[4] / "samples" / ".x.tmp").touch()
    found = [trainings_differ(copy, trained) for copy in copies[1:]]
    assert [len(differences) for differences in found] == [1, 1, 1, 1]
    assert not same({"a": [1, 2.0]}, {"a": [1, 2.5]})


def test_differences_of_evaluations_are_found(bench, tmp_path):
    evaluated = bench.evaluated() / "eval"
    copy = shutil.copytree(evaluated, tmp_path / "eval")
    assert evaluations_differ(copy, evaluated) == []
    (copy / "report.json").write_text("[]\n")
    next(copy.glob("*_loss.npz")).unlink()
    assert len(evaluations_differ(copy, evaluated)) == 2
