"""What the examples share: their command line, and how they write data."""

import argparse
import os
import pathlib

import numpy as np

from score_lib.base.memory import keep_freed_memory
from score_lib.disk.files import atomic_write
from score_lib.disk.logs import log_to_console


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
    return workdir


def save_data(path: str | os.PathLike, data: np.ndarray) -> None:
    """Write examples (N, *D) as .npy, for the data set ARRAYS."""
    with atomic_write(path) as file:
        np.save(file, data, allow_pickle=False)
