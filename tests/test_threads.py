"""Threads: how they wait and how many there are, by what the user and the system say."""

import logging
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from small_runs import ROOT

from benchmarks import threads as benchmark
from score_lib.base import cgroups, memory, threads


@pytest.fixture
def unset(monkeypatch):
    """An environment that says nothing of threads."""
    for name in (*threads.WAITING, *threads.COUNTS):
        monkeypatch.setenv(name, "")  # so that the old value comes back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A function that writes files of control groups, by their place below /sys/fs/cgroup."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "sys")
    monkeypatch.setattr(cgroups, "PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(process, **files):
        (tmp_path / "cgroup").write_text(process)
        for place, text in files.items():
            path = tmp_path / "sys" / place.replace("__", "/").replace("_max", ".max")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def spins():
    return {name: os.environ[name] for name in threads.WAITING if name in os.environ}


def test_waiting_threads_stop_spinning_unless_the_user_says_how_they_wait(unset):
    threads.choose_waiting()
    assert spins() == {}, "PyTorch is imported: its threads have read the variables"
    unset.delitem(sys.modules, "torch")
    for name in threads.WAITING:
        unset.setenv(name, "7")
        threads.choose_waiting()
        assert spins() == {name: "7"}
        unset.delenv(name)
    unset.setattr(threads, "cores", lambda: 2)
    for idle, expected in ((2.0, ("10000", "1")), (1.75, ("10000", "1")), (1.5, ("0", "0"))):
        unset.setattr(threads, "idle_cores", lambda idle=idle: idle)
        threads.choose_waiting()
        assert spins() == dict(zip(("GOMP_SPINCOUNT", "KMP_BLOCKTIME"), expected, strict=True))
        for name in spins():
            unset.delenv(name)
    found = iter([0.0, 0.0, 2.0])  # busy for a moment
    unset.setattr(threads, "idle_cores", lambda: next(found))
    threads.choose_waiting()
    assert spins()["GOMP_SPINCOUNT"] == "10000"


def test_idle_cores_are_those_of_this_process(tmp_path, monkeypatch):
    """Core 0 is idle for 9 of 10 ticks, core 2 for 2 of 10; it is not bound to core 1."""
    file = tmp_path / "stat"
    file.write_text(
        "cpu 9 9\ncpu0 5 0 5 80 10 0 0 0 7 0\ncpu1 1 1 1 1 1 1 1 1\ncpu2 10 0 0 0 0 0 0 0\n"
    )
    later = "cpu 9 9\ncpu0 6 0 5 85 14 0 0 0 9 0\ncpu1 9 1 1 1 1 1 1 1\ncpu2 14 0 0 2 0 0 0 4\n"
    monkeypatch.setattr(threads, "_STAT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: file.write_text(later))
    assert threads.idle_cores() == pytest.approx(0.9 + 0.2)
    monkeypatch.setattr(threads, "_STAT", tmp_path / "none")
    assert threads.idle_cores() == math.inf


@pytest.mark.parametrize(
    "program",
    ("import examples", "import benchmarks", "runpy.run_path('main.py', None, '__main__')"),
)
def test_programs_say_so_before_pytorch_is_imported(program, unset):
    code = f"import os, runpy, sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\n"
    code += "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    choices = [f"False {spins}" for spins in (threads.SPINS_IDLE, threads.SPINS_BUSY)]
    assert result.stdout.splitlines()[-1] in choices, result.stderr


@pytest.mark.parametrize(
    ("process", "files", "cores"),
    (
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000", "a__cpu_max": "max 100000"}, 8),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000", "a__cpu_max": "350000 100000"}, 3),
        ("0::/host/path\n", {"cpu_max": "50000 100000"}, 1),
        ("0::/\n1:cpu:/\n", {"cpu__cpu.cfs_quota_us": -1, "cpu__cpu.cfs_period_us": 100000}, 8),
        (
            "4:cpu,cpuacct:/a\n",
            {
                "cpu,cpuacct__a__cpu.cfs_quota_us": 200000,
                "cpu,cpuacct__a__cpu.cfs_period_us": 50000,
            },
            4,
        ),
    ),
)
def test_cores_are_those_of_the_affinity_and_of_the_control_groups(group, process, files, cores):
    group(process, **files)
    assert threads.cores() == cores


def test_memory_is_at_most_that_of_the_control_groups(group):
    group("0::/a\n", memory_max="max", a__memory_max=str(3 << 20))
    assert memory.total_memory() == 3 << 20
    group("0::/\n", memory_max="max")
    assert memory.total_memory() > 1 << 28


def test_threads_are_limited_to_the_cores_unless_the_user_gives_their_number(unset, caplog):
    caplog.set_level(logging.INFO)
    chosen = []
    unset.setattr(torch, "get_num_threads", lambda: (chosen or [8])[-1])
    unset.setattr(torch, "set_num_threads", chosen.append)
    unset.setattr(threads, "cores", lambda: 3)
    unset.setenv("OMP_NUM_THREADS", "8")
    threads.settle_threads()
    assert chosen == [] and "8 CPU threads for 3 cores" in caplog.text
    unset.delenv("OMP_NUM_THREADS")
    unset.setenv("OMP_WAIT_POLICY", "active")
    threads.settle_threads()
    assert chosen == [3] and "3 CPU threads for 3 cores" in caplog.text
    assert "OMP_WAIT_POLICY=active" in caplog.text


def test_rates_of_waiting_are_compared_within_rounds():
    rates = {("defaults", "none"): [10.0, 30.0], ("defaults", "loop"): [1.0, 1.0]}
    rates |= {("ours", "none"): [20.0, 30.0], ("ours", "loop"): [10.0, 20.0]}
    rows = {(row["waiting"], row["beside"]): row for row in benchmark.rows(rates)}
    assert rows["ours", "none"]["of default"] == 1.5 and rows["ours", "loop"]["of default"] == 15
    assert rows["ours", "loop"]["of idle"] == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.slow
def test_processes_take_turns():
    echo = "for line in __import__('sys').stdin: print(float(line), flush=True)"
    program = f"print(0, flush=True)\n{echo}"
    process, other = (benchmark.Process(["-c", code]) for code in (program, benchmark.LOOP))
    try:
        assert process.read() == 0
        assert benchmark.beside(process, other, 2.5) == 2.5
        for each in (process, other):
            state = pathlib.Path(f"/proc/{each._process.pid}/stat").read_text().split()[2]
            assert state == "T"
    finally:
        process.end()
        other.end()
    with pytest.raises(RuntimeError, match="ended with code"):
        process.read()
