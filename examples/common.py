"""Shared by the examples: their command line, and the file of their data."""

import argparse
import logging
import os
import pathlib
import time
from collections.abc import Callable

import numpy as np

from score_lib.base.memory import keep_freed_memory
from score_lib.base.threads import settle_threads
from score_lib.disk.files import atomic_write
from score_lib.disk.logs import log_to_console
from score_lib.disk.reports import markdown_table


def present(description: str, demonstrate: Callable) -> None:
    """Run an example in the folder that `--workdir` names, and print its figures.

    Args:
        description: docstring of the example, whose second paragraph is its command.
        demonstrate: from the folder to rows of figures and the file of a picture.
    """
    title, command = description.split("\n\n")[:2]
    workdir = workdir_of(title, command.split()[-1])
    start = time.perf_counter()
    records, picture = demonstrate(workdir)
    logging.info("done in %.0f s", time.perf_counter() - start)
    print(f"\n{markdown_table(records)}\n{picture}")


def workdir_of(description: str, default: str) -> pathlib.Path:
    """The folder that `--workdir` names; messages go to the console from here on.

    Args:
        description: text of `--help`.
        default: the folder without that option.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workdir", default=default, help="folder of the run")
    workdir = pathlib.Path(parser.parse_args().workdir)
    log_to_console()
    keep_freed_memory()
    settle_threads()
    return workdir


def save_data(path: str | os.PathLike, data: np.ndarray) -> None:
    """Write examples (N, *D) as .npy, for the data set ARRAYS."""
    with atomic_write(path) as file:
        np.save(file, data, allow_pickle=False)
