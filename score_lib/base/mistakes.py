"""Mistakes in the input of a program: they end it with one message, not with a traceback."""

import contextlib
from collections.abc import Iterator

# The errors that mistakes in the input raise.
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError)


@contextlib.contextmanager
def brief_mistakes(*others: type[Exception], before: str = "") -> Iterator[None]:
    """Context in which a mistake ends the program: its message on stderr, and exit code 1.

    Args:
        others: errors that are mistakes as well, such as those of processes that were started.
        before: words before the message.
    Raises:
        SystemExit: with the message.
    """
    try:
        yield
    except (*MISTAKES, *others) as error:
        raise SystemExit(f"{before}{error}") from error
