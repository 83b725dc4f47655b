"""Messages of a run: each once, those of libraries from warnings up, and no nan."""

import logging
import math
import os
import re
import sys

import pytest
from absl import logging as absl_logging
from small_runs import command, logged, run_forked, small_config

import run_lib
from score_lib.disk.logs import Rate, log_to_console, messages_to
from score_lib.runs.rounds import Job


@pytest.fixture(autouse=True)
def _root_stays():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = before, level


def test_messages_appear_once_whoever_adds_handlers(capsys, tmp_path):
    with messages_to(tmp_path / "stdout.txt"):
        pass
    log_to_console()
    with messages_to(tmp_path / "stdout.txt"):
        root = logging.getLogger()
        root.addHandler(absl_logging.get_absl_handler())
        root.addHandler(logging.StreamHandler(sys.stderr))
        for number in range(2):
            logging.info("message %d", number)
    for text in (capsys.readouterr().err, (tmp_path / "stdout.txt").read_text()):
        assert re.findall("message .", text) == ["message 0", "message 1"]


def test_messages_of_libraries_below_warnings_are_dropped(capsys, tmp_path):
    log_to_console()
    with messages_to(tmp_path / "stdout.txt"):
        library = logging.getLogger("matplotlib.font_manager")
        library.info("generated new fontManager")
        library.warning("no such font")
        logging.info("ours")
    for text in (capsys.readouterr().err, (tmp_path / "stdout.txt").read_text()):
        assert "generated" not in text and "no such font" in text and "ours" in text


def test_messages_may_hold_names_that_are_not_utf_8(tmp_path):
    others = set(logging.getLogger().handlers)  # pytest's could not pass it on to another process
    message = {"name": "root", "msg": "the folder %s", "args": (os.fsdecode(b"caf\xe9"),)}
    with messages_to(tmp_path / "stdout.txt"):
        (handler,) = set(logging.getLogger().handlers) - others
        handler.handle(logging.makeLogRecord(message))
    assert "the folder caf\\udce9" in (tmp_path / "stdout.txt").read_text()


def test_the_first_rate_is_left_out(tmp_path):
    rate = Rate(10)
    assert rate.at(5) is None
    assert 0 < rate.at(6) < math.inf
    arguments = command(workdir=tmp_path, training__n_iters=3, training__snapshot_sampling=False)
    code, output = run_forked(arguments[2:])
    assert code == 0
    first, second, third = re.findall("step .: training loss .*", output)
    assert "images/s" not in first and "images/s" in second and "images/s" in third
    assert "nan" not in output
    lines = re.sub(r"^\S+ ", "", output, flags=re.MULTILINE).splitlines()
    assert len(lines) == len(set(lines))


def test_pauses_do_not_count_in_rates(monkeypatch):
    clock = iter((100.0, 101.0, 111.0, 114.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    rate = Rate(10)
    rate.at(0)
    with rate.paused():
        pass  # from 101 s to 111 s
    assert rate.at(2) == 2 * 10 / 4


def test_each_round_is_made_and_logged_once(tmp_path):
    made = []
    job = Job(run_lib.setup(small_config()), tmp_path, "1", "")
    assert job.rounds(3, lambda k: made.append(k) or {"number": k})[2] == {"number": 2}
    assert made == [0, 1, 2]


class Wandb:
    """Stands for the library, and keeps what it is given."""

    def __init__(self):
        self.starts, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, pixels):
        return pixels


def test_weights_and_biases_get_numbers_and_pictures(tmp_path, monkeypatch):
    library = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    options = {"training__snapshot_freq": 2, "training__snapshot_freq_for_preemption": 2}
    for until in (2, 4):
        config = small_config(training__n_iters=until, training__wandb="digits", **options)
        run_lib.train(config, tmp_path / "a")
    first, second = library.starts
    assert first["project"] == "digits" and first["name"] == "a" and first["resume"] == "allow"
    assert first["id"] == second["id"] and first["config"]["training"]["n_iters"] == 2
    assert library.finished == 2
    lines = logged(tmp_path / "a")
    losses = [(step, v["training_loss"]) for step, v in library.logged if "training_loss" in v]
    assert losses == [(r["step"], r["training_loss"]) for r in lines if "training_loss" in r]
    pictures = {step: v["samples"] for step, v in library.logged if "samples" in v}
    assert list(pictures) == [2, 4] and pictures[2].dtype == "uint8"
    assert pictures[2].shape[-1] == 3 and pictures[2].max() > pictures[2].min()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        run_lib.train(small_config(training__wandb="digits", training__n_iters=1), tmp_path)
    assert not (tmp_path / "checkpoints-meta").exists()
