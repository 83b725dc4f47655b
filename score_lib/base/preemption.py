"""Pre-emption: SIGTERM and SIGUSR1 end a run in good order, with exit code 75."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_PR_SET_PDEATHSIG = 1  # of Linux's prctl

# sysexits.h calls it EX_TEMPFAIL: nothing is wrong, start the same command again.
EXIT_CODE = 75


class Preempted(SystemExit):
    """A signal asked the process to stop; ends the program with `EXIT_CODE`."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class StopSignals:
    """Context in which SIGTERM and SIGUSR1 only ask to stop.

    Outside of the main thread, where Python lets nobody listen to signals, they act as ever.

    Attributes:
        requested: whether one has arrived.
    """

    def __init__(self):
        self.requested = False
        self._at_once = False

    def __enter__(self) -> "StopSignals":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a request is followed at once: for work that leaves nothing half done.

        Raises:
            Preempted: a signal arrives, or has arrived before.
        """
        outer, self._at_once = self._at_once, True
        try:
            self._obey()
            yield
        finally:
            self._at_once = outer

    def _handle(self, number: int, frame) -> None:
        self.requested = True
        self._obey()

    def _obey(self) -> None:
        if self.requested and self._at_once:
            self._at_once = False  # once: clean-up is not interrupted again
            raise Preempted


def stop_with_parent() -> None:
    """Let SIGTERM arrive when the parent of this process ends, however that ends; only on Linux.

    For processes of torchrun: left by one that was killed, they would train on, and no other run
    could enter their folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Context in which signals to stop, and Ctrl-C, wait for its end: for the start of processes.

    Errors that a handler raises in the midst of a fork are ignored by Python: the request would be
    lost.
    Processes that are forked here ignore these signals until they handle them themselves.
    """
    arrived = []
    try:
        with _handled(lambda number, frame: arrived.append(number)):
            yield
    finally:
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


def deadly() -> contextlib.AbstractContextManager:
    """Context in which signals to stop, and Ctrl-C, end this process by their default action: for a
    long wait in a library that lets Python handle none of them, and leaves nothing half done."""
    return _handled(signal.SIG_DFL)


@contextlib.contextmanager
def _handled(handler: Callable | signal.Handlers) -> Iterator[None]:
    """Context with this handler of signals to stop and Ctrl-C, if they are Python's, and this
    thread's, to listen to."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    if None in before.values() or threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def born_deaf() -> Iterator[None]:
    """Context in whose new processes signals to stop are blocked, also while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_: int = 0) -> None:
    """For worker processes: live on through signals to the whole process group.

    They end with the process that started them, which may need them for its last step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
