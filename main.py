"""Command line: train, evaluate, or sample an experiment.

    python main.py --config configs/vp/digits.py --workdir runs/digits --mode train

Any option of the config can be set, as in `--config.training.batch_size=64`.
"""

from __future__ import annotations

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
MODES = ("train", "eval", "sample", "fid_stats")

config_flags.DEFINE_config_file("config", None, "The experiment's config.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder of the run.")
flags.DEFINE_enum("mode", None, MODES, "What to do.")
flags.DEFINE_string("eval_folder", "eval", "Folder for evaluation results, inside workdir.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised.")


@flags.multi_flags_validator(
    ["mode", "workdir"], message="--workdir says where the run's files are: it is needed here"
)
def _has_folder(values: dict) -> bool:
    return bool(values["workdir"]) or values["mode"] in (None, "fid_stats")


def main(argv: list[str]) -> None:
    """Run the chosen mode; a mistake in the input ends it with one message."""
    import run_lib
    from utils.logs import log_to_console

    if len(argv) > 1:
        raise app.UsageError(f"what does {' '.join(argv[1:])!r} mean? Options start with --")
    log_to_console()
    try:
        actions = {
            "train": lambda: run_lib.train(FLAGS.config, FLAGS.workdir),
            "eval": lambda: run_lib.evaluate(FLAGS.config, FLAGS.workdir, FLAGS.eval_folder),
            "sample": lambda: run_lib.sample(FLAGS.config, FLAGS.workdir),
            "fid_stats": lambda: run_lib.fid_stats(FLAGS.config),
        }
        actions[FLAGS.mode]()
    # Mistakes in the input are raised as these, with a message for the user.
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if FLAGS.traceback:
            raise
        logging.error("%s", error)
        sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a config that cannot be loaded ends it with one message."""
    try:
        return app.parse_flags_with_usage(argv)
    # What misspelt options and values of a wrong type end in.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The text of a KeyError is in quotes, and that of a misspelt option on two lines.
        message = "; ".join(str(error.args[0] if error.args else error).splitlines())
        print(f"{argv[0]}: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "mode"])
    app.run(main, flags_parser=parse_flags)
