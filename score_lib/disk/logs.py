"""Messages, metrics and progress bars of a run."""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from logging.handlers import BufferingHandler

from torch import Tensor

from score_lib.base.distributed import is_main
from score_lib.disk.files import naming, write_text

# The file of a run's numbers.
METRICS = "metrics.jsonl"
_FORMAT = "%(asctime)s %(levelname).1s {process}%(message)s"


@contextlib.contextmanager
def kept_messages() -> Iterator[list[logging.LogRecord]]:
    """Context that gives the list of its log messages, for a file that is not there yet."""
    keeper, root = BufferingHandler(10_000), logging.getLogger()
    root.addHandler(keeper)
    try:
        yield keeper.buffer
    finally:
        root.removeHandler(keeper)


@contextlib.contextmanager
def messages_to(
    path: str | os.PathLike, earlier: Iterable[logging.LogRecord] = ()
) -> Iterator[None]:
    """Context in which log messages go to a file as well as to the console.

    Args:
        earlier: messages for the file alone.
    Raises:
        OSError: at the end, if messages could not be written.
    """
    handler = _MessageFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FORMAT.format(process="")))
    handler.addFilter(_is_for_users)
    root = logging.getLogger()
    for record in earlier:
        handler.handle(record)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
    if handler.error is not None:
        with naming(path):
            raise handler.error


class _MessageFile(logging.FileHandler):
    """A file for messages that keeps its first error, where logging would print each of them.

    Messages are on the console, too, so that a run need not stop for want of this file.
    """

    error: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        self.error = self.error or error

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self.error = self.error or error


def _is_for_users(record: logging.LogRecord) -> bool:
    """Our own messages; of libraries, warnings and errors only."""
    own = record.name == "root" or record.name.startswith("score_lib.")
    return own or record.levelno >= logging.WARNING


class _Console(logging.StreamHandler):
    """The root logger's first handler, and the only one that writes to the console."""

    def handle(self, record: logging.LogRecord) -> bool:
        root = logging.getLogger()
        # Libraries may add a handler later: each message would be shown twice.
        for other in root.handlers[1:]:
            is_of_absl = hasattr(other, "python_handler")
            if is_of_absl or getattr(other, "stream", None) in (sys.stdout, sys.stderr):
                root.removeHandler(other)
        return super().handle(record)


def log_to_console(rank: int = 0) -> None:
    """Show messages from level INFO up on the console, and of libraries from WARNING up.

    Of several processes, those other than the main one show warnings and errors, and their rank.
    """
    handler = _Console(sys.stderr)
    process = f"[process {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(_FORMAT.format(process=process), datefmt="%H:%M:%S"))
    handler.addFilter(_is_for_users)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if rank else logging.INFO)


class MetricsLog:
    """The numbers of a run, step by step: `metrics.jsonl`, and TensorBoard's event files.

    `metrics.jsonl` has one JSON object a line, with a "step" and values that are a function of the
    config alone.  Lines past the step at which a run resumes are dropped, so that a run that was
    stopped leaves the same file as one that was not.  What depends on the machine, such as images
    a second, goes to TensorBoard only.

    Args:
        workdir: folder of the run.
        step: steps made so far; later records are dropped.
        others: get the same as TensorBoard, such as a `WandbWriter`; closed with the log.
        due: a value of this step that is yet to come; a record that has it is dropped, too.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int = 0,
        others: Sequence = (),
        due: str | None = None,
    ):
        workdir = pathlib.Path(workdir)
        self.path, self._events = workdir / METRICS, workdir / "tensorboard"
        self._keep_until(step, due)
        self._file = self.path.open("a", encoding="utf-8")
        self._writers = [_summary_writer(self._events, step), *others]

    def write(
        self,
        step: int,
        machine: dict[str, float] | None = None,
        facts: dict[str, object] | None = None,
        **values: float,
    ) -> None:
        """Record values of a step.

        Args:
            machine: those that depend on the machine.
            facts: plain values beside them, such as texts, for `metrics.jsonl` alone.
        """
        with naming(self.path):
            self._file.write(json.dumps({"step": step, **values, **(facts or {})}) + "\n")
            self._file.flush()
        with naming(self._events):
            for name, value in {**values, **(machine or {})}.items():
                for writer in self._writers:
                    writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """Show a picture, (C, H, W) in [0, 1], in TensorBoard."""
        with naming(self._events):
            for writer in self._writers:
                writer.add_image(name, picture, step)

    def close(self) -> None:
        """Flush to disk."""
        with naming(self.path):
            self._file.close()
        with naming(self._events):
            for writer in self._writers:
                writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _keep_until(self, step: int, due: str | None) -> None:
        if not self.path.exists():
            return
        # Undecodable bytes are not a record.
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [
            line
            for line in lines
            if step_of(line) < step or (step_of(line) == step and due not in _record(line))
        ]
        write_text(self.path, "".join(line + "\n" for line in kept))


class SilentLog:
    """A `MetricsLog` that keeps nothing: of several processes, only the main one has a log."""

    def write(self, step: int, **given: object) -> None:
        """Record nothing."""

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """Show nothing."""


def step_of(line: str) -> float:
    """The step of a record; infinity for an invalid one, such as a line cut short by a kill."""
    step = _record(line).get("step")
    return step if isinstance(step, int) else math.inf


def _record(line: str) -> dict:
    """The values of a record; {} for an invalid one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _summary_writer(folder: pathlib.Path, step: int):
    # TensorBoard loads TensorFlow for its file access where it is installed, unless this module
    # of its builds without TensorFlow is there.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _show_unless_raised_again
    return SummaryWriter(str(folder), purge_step=step + 1)


def _show_unless_raised_again(arguments) -> None:
    """For threads: TensorBoard's raises its error again at the next call, where the run sees it."""
    own = type(arguments.thread).__module__.startswith("tensorboard.")
    if not own or not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


@contextlib.contextmanager
def progress_bar(total: int | None, done: int, unit: str) -> Iterator:
    """A progress bar with rate and time left, which messages do not disturb.

    Silent where there is no terminal, and in all processes but the main one.
    """
    from tqdm import tqdm

    silent = not sys.stderr.isatty() or not is_main()
    redirected = contextlib.nullcontext()
    if not silent:  # in a notebook its import warns of missing widgets
        from tqdm.contrib.logging import logging_redirect_tqdm

        redirected = logging_redirect_tqdm()
    with (
        redirected,
        tqdm(total=total, initial=done, unit=unit, disable=silent, dynamic_ncols=True) as bar,
    ):
        yield bar


class Rate:
    """Images per second between two looks, without the time of pauses."""

    def __init__(self, batch_size: int):
        self.batch_size, self.last = batch_size, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context with work that is none on these images."""
        begun = time.perf_counter()
        yield
        if self.last is not None:
            step, at = self.last
            self.last = step, at + time.perf_counter() - begun

    def at(self, step: int) -> float | None:
        """Images per second since the last call; None at the first, which start-up would slow."""
        now, last = time.perf_counter(), self.last
        self.last = step, now
        return None if last is None else (step - last[0]) * self.batch_size / (now - last[1])
