"""Mistakes in the input of a program, and too little memory: they end it with one message."""

import contextlib
from collections.abc import Iterator

# The errors that mistakes in the input raise.
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError)
# How PyTorch says, by errors of other kinds too, that memory is not enough.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the machine or of a GPU was not enough."""
    by_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return by_torch or isinstance(error, MemoryError)


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
