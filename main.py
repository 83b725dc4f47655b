"""Command line: train, evaluate, sample, or control what an experiment generates.

    python main.py --config configs/vp/digits.py --workdir runs/digits --mode train

Any option of the config can be set, as in `--config.training.batch_size=64`.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
import traceback

from absl import app, flags
from ml_collections import ConfigDict, config_flags

FLAGS = flags.FLAGS
MODES = ("train", "eval", "sample", "control", "fid_stats")


class ConfigFile(flags.ArgumentParser):
    """Loads a config from its file, or says in one line why there is none.

    The stock parser of ml_collections answers with a traceback, or only when an option is read.
    """

    def parse(self, path: str) -> ConfigDict:
        """The config, locked; `path` may end in `:argument`, for `get_config(argument)`.

        Raises:
            ValueError: there is no such file, it fails, or it holds no config.
        """
        file, *argument = path.split(":", 1)
        if not os.path.isfile(file):
            raise ValueError(f"there is no such file in {os.getcwd()}")
        config = None
        try:
            if get_config := runpy.run_path(file).get("get_config"):
                config = get_config(*argument)
        except Exception as error:  # a config is a program: it may raise anything
            raise ValueError(f"{_place(error, file)}{type(error).__name__}: {error}") from error
        if not isinstance(config, ConfigDict):
            raise ValueError("it needs a function get_config() that returns a ConfigDict")
        return config.lock()


def _place(error: Exception, file: str) -> str:
    """Which line of a file an error comes from, where it comes from one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""


config_flags.DEFINE_config_file("config", None, "The experiment's config.")
FLAGS["config"].parser = ConfigFile()
flags.DEFINE_string("workdir", None, "Folder of the run.")
flags.DEFINE_enum("mode", None, MODES, "What to do.")
flags.DEFINE_string("eval_folder", "eval", "Folder for evaluation results, inside workdir.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised.")


@flags.multi_flags_validator(
    ["mode", "workdir"], message="--workdir says where the run's files are: it is needed here"
)
def _has_folder(values: dict) -> bool:
    return bool(values["workdir"]) or values["mode"] in (None, "fid_stats")


def main(_: list[str]) -> None:
    """Run the chosen mode; a mistake in the input ends it with one message."""
    from score_lib.base.preemption import Preempted, StopSignals
    from score_lib.disk.logs import log_to_console

    log_to_console(int(os.environ.get("RANK", 0)))
    try:
        # Nothing but training has to end what it has begun, and that listens for itself.
        with StopSignals() as stop, stop.at_once():
            run_mode()
    except Preempted:
        logging.warning("stopped as asked: start the same command again to go on")
        raise
    # Mistakes in the input are raised as these, with a message for the user.
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        if FLAGS.traceback:
            raise
        logging.error("%s", error)
        sys.exit(1)


def run_mode() -> None:
    """Do what `--mode` says, together with the processes that torchrun may have started."""
    import run_lib
    from score_lib.base import distributed

    actions = {
        "train": lambda: run_lib.train(FLAGS.config, FLAGS.workdir),
        "eval": lambda: run_lib.evaluate(FLAGS.config, FLAGS.workdir, FLAGS.eval_folder),
        "sample": lambda: run_lib.sample(FLAGS.config, FLAGS.workdir),
        "control": lambda: run_lib.control(FLAGS.config, FLAGS.workdir),
        "fid_stats": lambda: run_lib.fid_stats(FLAGS.config),
    }
    with distributed.joined():
        actions[FLAGS.mode]()


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; an option that there is not ends it with one message."""
    try:
        program, *others = app.parse_flags_with_usage(argv)
        if others:
            raise LookupError(f"{' '.join(others)!r} (options start with --)")
        return [program]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = error.args[0]
        if isinstance(reason, Exception):  # ml_collections passes some on in this way
            reason = reason.args[0]
        message = " ".join(str(reason).splitlines())
        print(f"FATAL Flags parsing error: no such option: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "mode"])
    app.run(main, flags_parser=parse_flags)
