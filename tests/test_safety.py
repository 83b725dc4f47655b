"""No work is lost: locks, checkpoints in the background, predecessors, signals."""

import contextlib
import errno
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import control_runs  # noqa: F401  (registers a small network)
import pytest
import torch
from faults import bad_checkpoints
from small_runs import ROOT, small_config
from torch._subclasses import FakeTensorMode

import main
import run_lib
from datasets import ImageStream, MemorySource
from score_lib.base.preemption import EXIT_CODE, Preempted, StopSignals, stop_with_parent
from score_lib.data.stream import _ended_at_exit
from score_lib.disk import writer as writer_room
from score_lib.disk.checkpoints import (
    CheckpointError,
    read_checkpoint,
    restore_checkpoint,
    restore_latest,
    save_checkpoint,
    write_contents,
)
from score_lib.disk.files import (
    folder_of_results,
    locked,
    remove_leftovers,
    set_aside,
    with_earlier,
)
from score_lib.disk.writer import CheckpointWriter

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def state():
    """A state after a step, so that the optimiser has moments."""
    run = run_lib.setup(small_config())
    run.add_optimizer()
    train_step, _ = run.step_fns()
    train_step(run.state, torch.zeros(2, 1, 8, 8))
    return run.state


def assert_same(path, other):
    ours, theirs = read_checkpoint(path), read_checkpoint(other)
    for texts in ("config", "examples"):
        assert ours.pop(texts, "") == theirs.pop(texts, "")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- locks ---


def hold(folder, entered, seconds):
    with locked(folder):
        entered.set()
        time.sleep(seconds)


@contextlib.contextmanager
def at_work_in(folder):
    """Context in which another process holds the lock of a folder."""
    entered = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, entered, 600))
    process.start()
    assert entered.wait(30)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def owner(tmp_path):
    with at_work_in(tmp_path / "run") as process:
        yield process


def test_a_second_run_is_refused_and_names_the_first(owner, tmp_path):
    with pytest.raises(BlockingIOError, match=f"process {owner.pid} on .* choose another folder"):
        run_lib.train(small_config(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_lock_of_a_dead_process_is_free(owner, tmp_path):
    owner.kill()
    owner.join()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()


def test_children_do_not_inherit_the_lock(tmp_path):
    with locked(tmp_path):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    next_one = FORK.Process(target=hold, args=(tmp_path, FORK.Event(), 0))
    next_one.start()
    next_one.join()
    assert child.is_alive() and next_one.exitcode == 0
    child.kill()


@pytest.mark.slow
def test_evaluation_can_run_during_training(tmp_path):
    config = small_config(eval__begin_ckpt=1, eval__end_ckpt=1, eval__enable_bpd=False)
    run_lib.train(config, tmp_path)
    with locked(tmp_path):
        records = run_lib.evaluate(config, tmp_path)
    assert [record["checkpoint"] for record in records] == ["1"]


@pytest.mark.slow
def test_a_second_evaluation_is_refused(tmp_path):
    config = small_config(eval__begin_ckpt=1, eval__end_ckpt=1, eval__enable_bpd=False)
    run_lib.train(config, tmp_path)
    said = pytest.raises(BlockingIOError, match=r"another run is at work in .*eval")
    with at_work_in(tmp_path / "eval"), said:
        run_lib.evaluate(config, tmp_path)


# --- checkpoints in the background ---


def test_the_writer_thread_writes_the_same_file(state, tmp_path):
    save_checkpoint(tmp_path / "now.pth", state)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "later.pth", state)
    assert_same(tmp_path / "later.pth", tmp_path / "now.pth")


def test_a_file_holds_the_state_at_the_time_of_the_call(state, tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        started.set()
        assert go_on.wait(30)
        write_contents(*arguments)

    with CheckpointWriter(slow) as writer:
        for name in ("first", "second"):
            started.clear()
            go_on.clear()
            save_checkpoint(tmp_path / f"{name}_now.pth", state)
            writer.save(tmp_path / f"{name}.pth", state)
            assert started.wait(30)
            with torch.no_grad():
                for parameter in state["model"].parameters():
                    parameter.add_(1)
                for average in state["ema"].shadow_params:
                    average.add_(1)
            state["step"] += 1
            assert not (tmp_path / f"{name}.pth").exists()
            go_on.set()
            writer.wait()
            assert_same(tmp_path / f"{name}.pth", tmp_path / f"{name}_now.pth")


def test_copies_from_a_gpu_are_waited_for_on_that_gpu(monkeypatch, tmp_path):
    """Which need not be the current one; with tensors that have a device and no numbers."""
    waited = []

    def stream_of(gpu):
        event = types.SimpleNamespace(synchronize=lambda: waited.append(str(gpu)))
        return types.SimpleNamespace(record_event=lambda: event)

    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    monkeypatch.setattr(writer_room, "_copied", lambda value, old: {})
    with FakeTensorMode():
        contents = {"step": 1, "model": {"w": torch.empty(2, device="cuda:1")}, "ema": []}
        contents["ema"] += [torch.empty(2, device="cuda:1"), torch.empty(2)]
    with CheckpointWriter(lambda *_: waited.append("written")) as writer:
        writer.save_contents(tmp_path / "c.pth", contents)
        writer.save_contents(tmp_path / "c.pth", {"w": torch.zeros(2)})
    assert waited == ["cuda:1", "written", "written"]


def test_the_next_file_waits_for_the_previous(state, tmp_path):
    def slow(*arguments):
        time.sleep(0.3)
        write_contents(*arguments)

    with CheckpointWriter(slow) as writer:
        save_checkpoint(tmp_path / "now.pth", state)
        writer.save(tmp_path / "first.pth", state)
        with torch.no_grad():
            next(state["model"].parameters()).add_(1)
        writer.save(tmp_path / "second.pth", state)
    assert_same(tmp_path / "first.pth", tmp_path / "now.pth")


@pytest.fixture
def full_disk(monkeypatch, written):
    """Every write fails from now on; `faults` fills a real disk."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def written(state, tmp_path):
    """A checkpoint with a predecessor."""
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        save_checkpoint(path, {**state, "step": step}, keep=2)
    return path


@pytest.mark.parametrize("seen_by", ("check", "wait", "save", "end"))
def test_a_failed_write_raises_and_keeps_the_previous_file(seen_by, state, written, full_disk):
    with pytest.raises(OSError, match=r"checkpoint\.pth"), CheckpointWriter() as writer:
        writer.save(written, state)
        if seen_by == "check":
            while True:
                writer.check()
                time.sleep(0.01)
        elif seen_by != "end":
            getattr(writer, seen_by)(*((written, state) if seen_by == "save" else ()))
    assert read_checkpoint(written)["step"] == 2
    names = sorted(path.name for path in written.parent.iterdir())
    assert names == ["checkpoint.1.pth", "checkpoint.pth"]


def test_failed_writes_keep_the_predecessors(state, written, full_disk):
    for _ in range(3):
        with pytest.raises(OSError):
            save_checkpoint(written, state, keep=2)
    assert steps_of(written) == {"checkpoint.pth": 2, "checkpoint.1.pth": 1}


# --- predecessors ---


def test_the_last_predecessors_are_kept(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    for step in range(5):
        save_checkpoint(path, {**state, "step": step}, keep=2)
    assert [read_checkpoint(p)["step"] for p in with_earlier(path) if p.exists()] == [4, 3, 2]


def steps_of(path):
    """The steps of a checkpoint and its predecessors, by name; a damaged file has none."""
    found = {}
    for file in filter(pathlib.Path.exists, with_earlier(path)):
        try:
            found[file.name] = read_checkpoint(file)["step"]
        except CheckpointError:
            found[file.name] = None
    return found


def without_links(*names):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", (True, False))
@pytest.mark.parametrize("keep", (1, 2))
def test_no_file_is_written_over(keep, links, state, written, monkeypatch):
    """A second name of the same file shows its contents ever after."""
    names = dict(zip((2, 1), with_earlier(written), strict=False))
    for step, path in names.items():
        os.link(path, path.with_name(f"of_{step}"))
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    for step in (3, 4):
        save_checkpoint(written, {**state, "step": step}, keep=keep)
    assert [read_checkpoint(written.with_name(f"of_{step}"))["step"] for step in names] == [2, 1]
    left = {"checkpoint.pth": 4, "checkpoint.1.pth": 3, "checkpoint.2.pth": 2}
    assert steps_of(written) == dict(list(left.items())[: keep + 1])
    assert not list(written.parent.glob(".*"))


def test_a_gap_among_the_predecessors_is_filled_first(state, written):
    """A kill may leave one, or a damaged file that was set aside."""
    save_checkpoint(written, {**state, "step": 3}, keep=2)
    written.with_name("checkpoint.1.pth").unlink()
    save_checkpoint(written, {**state, "step": 4}, keep=2)
    found = {"checkpoint.pth": 4, "checkpoint.1.pth": 3, "checkpoint.2.pth": 1}
    assert steps_of(written) == found


def damage(path, how):
    contents = bytearray(path.read_bytes())
    if how == "cut":
        del contents[len(contents) // 2 :]
    elif how == "flipped":  # a bit of a weight
        weights = read_checkpoint(path)["model"].values()
        contents[contents.index(max(weights, key=torch.numel).numpy().tobytes())] ^= 1
    else:
        contents = b""
    path.unlink()  # the predecessor may be the same file
    path.write_bytes(contents)


@pytest.mark.parametrize("how", ("cut", "flipped", "empty"))
def test_a_damaged_file_is_skipped_with_a_warning(how, written, state, caplog):
    damage(written, how)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        restore_checkpoint(written, state, "cpu")
    assert restore_latest(written, state, "cpu") != written and state["step"] == 1
    assert "skipped" in caplog.text and str(written) in caplog.text


def full(contents, file):
    file.write(b"x" * 100)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("keep", (1, 2))
def test_a_failed_write_after_damage_keeps_the_last_good_state(keep, tmp_path, monkeypatch, caplog):
    options = {"model__name": "gaussian", "training__snapshot_sampling": False}
    options |= {"training__keep_meta_checkpoints": keep, "training__snapshot_freq": 100}
    path = tmp_path / "checkpoints-meta/checkpoint.pth"
    run_lib.train(small_config(**options), tmp_path)
    for damaged in with_earlier(path)[:keep]:
        damage(damaged, "cut")
    contents = [damaged.read_bytes() for damaged in with_earlier(path)[:keep]]
    last = {f"checkpoint.{keep}.pth": 12 - 3 * keep}
    assert {name: step for name, step in steps_of(path).items() if step} == last
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run_lib.train(small_config(**options), tmp_path)
    assert steps_of(path) == last
    names = ["checkpoint_damaged.pth", "checkpoint.1_damaged.pth"][:keep]
    aside = [path.parent / "set_aside" / name for name in names]
    assert [file.read_bytes() for file in aside] == contents
    assert all(f"it is now {file}" in caplog.text for file in aside)
    monkeypatch.undo()
    run_lib.train(small_config(**options), tmp_path)
    assert steps_of(path)["checkpoint.pth"] == 12 and None not in steps_of(path).values()


def test_texts_are_in_utf8_whatever_the_locale(tmp_path):
    program = "from score_lib.disk.files import write_text; write_text('a', '\\xb1')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | ascii_only | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "a").read_bytes() == "±".encode()


def test_a_folder_that_is_set_aside_keeps_its_whole_name(tmp_path):
    (tmp_path / "step_2_0.999").mkdir()
    set_aside(tmp_path / "step_2_0.999", "other_options")
    assert (tmp_path / "set_aside" / "step_2_0.999_other_options").is_dir()


def test_what_is_set_aside_displaces_nothing(tmp_path):
    for text in ("first", "second", "third"):
        (tmp_path / "a.pth").write_text(text)
        set_aside(tmp_path / "a.pth", "damaged")
    found = {path.name: path.read_text() for path in (tmp_path / "set_aside").iterdir()}
    names = "a_damaged.pth", "a_damaged_2.pth", "a_damaged_3.pth"
    assert found == dict(zip(names, ("first", "second", "third"), strict=True))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(written, state):
    for path in with_earlier(written)[:2]:
        damage(path, "cut")
    with pytest.raises(CheckpointError, match="all damaged"):
        restore_latest(written, state, "cpu")


def test_flipped_bits_of_the_contents_are_noticed(tmp_path):
    path, flipped = tmp_path / "whole.pth", tmp_path / "flipped.pth"
    save_checkpoint(path, bad_checkpoints.state())
    contents, whole, noticed = path.read_bytes(), read_checkpoint(path), 0
    for position in range(50, len(contents), len(contents) // 100):
        changed = bytearray(contents)
        changed[position] ^= 1 << position % 8
        flipped.write_bytes(changed)
        try:
            torch.testing.assert_close(read_checkpoint(flipped), whole, rtol=0, atol=0)
        except CheckpointError:
            noticed += 1
    assert noticed > 30


@pytest.mark.slow
def test_a_run_resumes_from_the_predecessor_of_a_damaged_checkpoint(tmp_path):
    run_lib.train(small_config(), tmp_path / "whole")
    run_lib.train(small_config(training__n_iters=9), tmp_path / "run")
    damage(tmp_path / "run/checkpoints-meta/checkpoint.pth", "flipped")
    run_lib.train(small_config(), tmp_path / "run")
    assert_same(*(tmp_path / name / "checkpoints/checkpoint_2.pth" for name in ("run", "whole")))


@pytest.mark.slow
def test_leftovers_of_killed_writers_are_removed(tmp_path):
    config = small_config(
        training__n_iters=1, eval__begin_ckpt=0, eval__end_ckpt=0, eval__enable_bpd=False
    )
    for folder in ("", "checkpoints", "checkpoints-meta", "samples/iter_1", "eval", "eval/ckpt_1"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".file.abc.tmp").touch()
    run_lib.train(config, tmp_path)
    left = [path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.tmp")]
    assert sorted(left) == ["eval", "eval/ckpt_1"]  # where an evaluation may be at work
    run_lib.evaluate(config, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    remove_leftovers(tmp_path / "nowhere")


# --- signals ---


def test_a_signal_stops_work_that_may_stop_at_once():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
        with pytest.raises(Preempted), stop.at_once():
            pytest.fail("not reached")
        signal.raise_signal(signal.SIGTERM)
    with StopSignals() as stop:
        with pytest.raises(Preempted), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def wait_for_parent(ends):
    with StopSignals() as stop, contextlib.suppress(Preempted), stop.at_once():
        stop_with_parent()
        ends.send(os.getpid())
        time.sleep(60)
    ends.send(stop.requested)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_a_process_of_torchrun_stops_when_torchrun_is_killed():
    ours, theirs = multiprocessing.Pipe()
    launcher = FORK.Process(target=lambda: (start_child(theirs), time.sleep(60)))
    launcher.start()
    child = ours.recv()
    launcher.kill()
    stopped = ours.poll(20) and ours.recv()
    if not stopped:
        os.kill(child, signal.SIGKILL)
    assert stopped


def start_child(ends):
    FORK.Process(target=wait_for_parent, args=(ends,)).start()


def test_second_signal_is_ignored():
    cleaned = False
    with StopSignals() as stop, pytest.raises(Preempted), stop.at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_training_works_outside_the_main_thread():
    stop = StopSignals()

    def enter():
        with stop:
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not stop.requested


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("start_method", ("fork", "spawn"))
def test_data_workers_ignore_signals_to_the_process_group(start_method, monkeypatch):
    """From their birth on: one that died while it imported ended training with exit code 1.

    So did forked ones, in which PyTorch listens to the signal before they ignore it.
    """
    start = multiprocessing.Process.start

    def signalled(worker):
        start(worker)
        time.sleep(0.01)
        os.kill(worker.pid, signal.SIGTERM)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", signalled)
    source = MemorySource(torch.zeros(64, 1, 2, 2, dtype=torch.uint8))
    source.start_method = start_method
    batches = iter(ImageStream(source, 4, num_workers=1))
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    assert len([next(batches) for _ in range(20)]) == 20
    assert len(workers) == 1 and workers[0].is_alive()


def test_workers_end_with_the_program_where_the_start_of_others_fails(monkeypatch):
    """They ignore SIGTERM, and Python waited for them for ever."""
    start = multiprocessing.Process.start

    def failing(worker):
        start(worker)
        raise BlockingIOError("too many processes")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", failing)
    with pytest.raises(BlockingIOError):
        next(iter(ImageStream(forked_source(), 4, num_workers=1)))
    assert_ended_at_exit(multiprocessing.active_children(), 1)


def forked_source():
    source = MemorySource(torch.zeros(64, 1, 2, 2, dtype=torch.uint8))
    source.start_method = "fork"
    return source


def assert_ended_at_exit(workers, count):
    assert len(workers) == count and set(workers) <= set(_ended_at_exit(os.getpid()))
    for worker in workers:
        worker.kill()
        worker.join()


def test_a_signal_while_workers_start_is_obeyed_once_they_have(monkeypatch):
    """In the midst of a fork Python ignores what a handler raises: the request was lost."""
    start, workers = multiprocessing.Process.start, []

    def signalled(worker):
        signal.raise_signal(signal.SIGTERM)
        start(worker)
        workers.append(worker)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", signalled)
    with StopSignals() as stop, pytest.raises(Preempted), stop.at_once():
        next(iter(ImageStream(forked_source(), 4, num_workers=1)))
    assert stop.requested
    assert_ended_at_exit(workers, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


UNFINISHED_PASS = """
import sys, torch
from datasets import ImageStream, MemorySource
from score_lib.base.preemption import Preempted

source = MemorySource(torch.zeros(64, 1, 2, 2, dtype=torch.uint8))
source.start_method = "fork"
batches = iter(ImageStream(source, 4, num_workers=1))
next(batches)
{end}
"""


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("end", "code"), (("", 0), ("raise Preempted", EXIT_CODE), ("raise ValueError", 1))
)
def test_a_program_with_data_workers_ends(end, code, tmp_path):
    """In the midst of a pass through the data: they ignore the SIGTERM that Python sends them."""
    command = [sys.executable, "-c", UNFINISHED_PASS.format(end=end)]
    options = {"cwd": ROOT, "env": os.environ | {"TMPDIR": str(tmp_path)}, "timeout": 60}
    found = subprocess.run(command, capture_output=True, text=True, **options)
    assert (found.returncode, "Traceback" in found.stderr) == (code, code == 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stopped_command_ends_with_its_own_code(tmp_path):
    command = [sys.executable, ROOT / "main.py", f"--config={ROOT}/configs/vp/digits.py",
               f"--workdir={tmp_path}", "--mode=train", "--config.data.num_workers=0"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "training from step" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == EXIT_CODE == 75
    assert "start the same command again" in rest and "Traceback" not in rest
    assert read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] > 0


@pytest.mark.parametrize(
    ("number", "code", "said"),
    (
        (signal.SIGTERM, EXIT_CODE, ""),
        (signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt\n"),
    ),
)
def test_a_command_that_is_stopped_while_it_starts_ends_with_its_own_code(
    number, code, said, tmp_path
):
    """As it would later: the loop that starts it again goes on, or ends with Ctrl-C."""
    config = tmp_path / "config.py"
    config.write_text(f"import os\n\nos.kill(os.getpid(), {int(number)})\n")
    command = [sys.executable, ROOT / "main.py", f"--config={config}", "--mode=check"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (code, said)


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, caplog):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("score_lib.disk.logs.log_to_console", lambda rank: None)
    monkeypatch.setattr(main, "run_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main.main([])
    assert "interrupted: start the same command again" in caplog.text


def test_nobody_need_read_the_whole_help():
    command = [sys.executable, ROOT / "main.py", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize("name", ("", ".", "..", "eval/.."))
def test_figures_do_not_replace_files_of_the_run(tmp_path, name):
    """Before anything is read or written."""
    with pytest.raises(ValueError, match=r"^--eval_folder=.* would replace files of the run"):
        run_lib.evaluate(small_config(), tmp_path / "run", name)
    assert not list(tmp_path.iterdir())
    assert folder_of_results("a", "../b", "--eval_folder=../b") == pathlib.Path("a/../b")
