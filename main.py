"""Command line: check, train, evaluate, sample, or control the samples of an experiment.

    python main.py --config configs/vp/digits.py --workdir runs/digits --mode train

Any option of the config can be set, as in `--config.training.batch_size=64`.
"""

import contextlib
import logging
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from score_lib.base.mistakes import MISTAKES, is_out_of_memory
from score_lib.base.preemption import Preempted, StopSignals, stop_with_parent
from score_lib.base.threads import choose_waiting, settle_threads
from score_lib.options import add_missing, from_json

FLAGS = flags.FLAGS
# Calls of `run_lib`, which is imported late.
MODES: dict[str, Callable] = {
    "train": lambda lib: lib.train(FLAGS.config, FLAGS.workdir),
    "eval": lambda lib: lib.evaluate(FLAGS.config, FLAGS.workdir, FLAGS.eval_folder),
    "reproduce": lambda lib: _reproduce(lib),
    "sample": lambda lib: lib.sample(FLAGS.config, FLAGS.workdir),
    "control": lambda lib: lib.control(FLAGS.config, FLAGS.workdir),
    "fid_stats": lambda lib: lib.fid_stats(FLAGS.config, FLAGS.workdir),
    "check": lambda lib: _check(lib),
    "ema": lambda lib: lib.write_averages(FLAGS.config, FLAGS.workdir),
    "export": lambda lib: lib.export(FLAGS.config, FLAGS.workdir),
    "train_dequantizer": lambda lib: lib.train_dequantizer(FLAGS.config, FLAGS.workdir),
}
# Options that take less memory, by mode.
_LESS_MEMORY = {
    "train": "a smaller training.batch_size, a larger training.grad_accumulation, with which "
    "gradients stay the same, or model.checkpoint_activations=True",
    "sample": "a smaller training.batch_size, in which samples are drawn",
    "control": "a smaller control.num_images or control.num_results",
    **dict.fromkeys(("eval", "fid_stats", "reproduce"), "a smaller eval.batch_size"),
}


class ConfigFile(flags.ArgumentParser):
    """Loads a config from its file; mistakes in it are told in one line, not in a traceback."""

    def parse(self, path: str) -> ConfigDict:
        """The config, complete and locked.

        Args:
            path: of a program, which may import modules that lie beside it, and whose name may end
                in `:argument`, for `get_config(argument)`; or of the `config.json` of a run.

        Raises:
            ValueError: there is no such file, it fails, or it holds no config.
        """
        file, *argument = path.split(":", 1)
        if not os.path.isfile(file):
            raise ValueError(f"there is no such file in {os.getcwd()}")
        config = None
        try:
            if file.endswith(".json"):
                config = _stored(file, *argument)
            elif get_config := _run(file).get("get_config"):
                config = get_config(*argument)
        except Exception as error:  # a config is a program: it may raise anything
            raise ValueError(f"{_place(error, file)}{type(error).__name__}: {error}") from error
        if not isinstance(config, ConfigDict):
            raise ValueError("it needs a function get_config() that returns a ConfigDict")
        add_missing(config)
        return config.lock()


def _stored(file: str, argument: str = "") -> ConfigDict:
    """The config in a run's `config.json`, without options that never counted."""
    from score_lib.samplers.configured import without_unread

    if argument:
        raise ValueError(f"a config.json takes no argument: leave out ':{argument}'")
    _show_messages()
    return without_unread(from_json(pathlib.Path(file).read_text(encoding="utf-8")))


def _run(file: str) -> dict[str, object]:
    """The names that a program defines; it finds modules in its folder."""
    folder = os.path.dirname(os.path.abspath(file))
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, where it hides nothing
    return runpy.run_path(file)


def _place(error: Exception, file: str) -> str:
    """ "line 7: " for an error raised in a file, or below its line 7; "" for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""


class Section(flags.ArgumentParser):
    """Refuses a whole section, which would replace one whose other options the experiment sets."""

    def parse(self, given: str | ConfigDict) -> ConfigDict:
        """The section of the config itself, its default.

        Raises:
            ValueError: something is given in its place.
        """
        if isinstance(given, ConfigDict):
            return given
        raise ValueError(
            "a section is not set as a whole, but option by option, as in --config.optim.lr=0.0002"
        )


class Folder(flags.ArgumentParser):
    """A folder; shells leave the ~ of `--workdir=~/runs` to the program."""

    def parse(self, path: str) -> str:
        """The path, from the home folder on where it begins with ~."""
        return os.path.expanduser(path)


config_flags.DEFINE_config_file("config", None, "The experiment's config.")
FLAGS["config"].parser = ConfigFile()
config_flags.register_flag_parser_for_type(ConfigDict, Section())
flags.DEFINE(Folder(), "workdir", None, "Folder of the run.", serializer=flags.ArgumentSerializer())
flags.DEFINE_enum("mode", None, list(MODES), "What to do.")
flags.DEFINE_string("eval_folder", "eval", "Folder for evaluation results, inside workdir.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised.")


@flags.multi_flags_validator(
    ["mode", "workdir"], message="--workdir, the folder of the run, is needed for this mode"
)
def _has_folder(values: dict) -> bool:
    return bool(values["workdir"]) or values["mode"] in (None, "fid_stats", "check")


def main(_: list[str]) -> None:
    """Run the chosen mode; a mistake in the input ends it with one message and exit code 1."""
    _show_messages()
    try:
        run_mode()
    except Preempted:
        logging.warning("stopped by a signal: start the same command again to resume")
        raise
    except KeyboardInterrupt:  # raised again: a loop of the shell ends, too
        logging.warning("interrupted: start the same command again to go on from its last file")
        raise
    except MISTAKES as error:  # logged: of several processes, each message names its rank
        if FLAGS.traceback:
            raise
        logging.error("%s", error)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if FLAGS.traceback or not is_out_of_memory(error):
            raise
        advice = _LESS_MEMORY.get(FLAGS.mode, "a machine with more of it")
        reason = str(error).partition("\n")[0] or type(error).__name__
        logging.error("memory is not enough: try %s (%s)", advice, reason)
        sys.exit(1)


def _show_messages() -> None:
    """Log to the console.

    Standard streams that the program was started without lead nowhere: they are written to, and
    files of the run would take their numbers.
    """
    from score_lib.disk.logs import log_to_console

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (kept)
    log_to_console(int(os.environ.get("RANK", 0)))


def run_mode() -> None:
    """Run the mode of `--mode`, in every process that torchrun started."""
    import run_lib
    from score_lib.base import distributed
    from score_lib.base.devices import resolve_device
    from score_lib.base.memory import keep_freed_memory
    from score_lib.options import complete, flatten
    from score_lib.runs.history import OF_A_MACHINE

    config = complete(FLAGS.config)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
        settle_threads()
    options = {"--mode": FLAGS.mode, "--eval_folder": FLAGS.eval_folder, **flatten(config)}
    shared = {name: value for name, value in options.items() if name not in OF_A_MACHINE}
    with distributed.joined(device):
        distributed.check_same(shared)
        MODES[FLAGS.mode](run_lib)


def _check(run_lib) -> None:
    findings = run_lib.check(FLAGS.config, FLAGS.workdir or "")
    if any(finding.state == "wrong" for finding in findings):
        sys.exit(1)


def _reproduce(run_lib) -> None:
    records = run_lib.reproduce(FLAGS.config, FLAGS.workdir)
    if any(record["verdict"].startswith("outside") for record in records):
        sys.exit(1)


@contextlib.contextmanager
def briefly_interrupted() -> Iterator[None]:
    """Context in which Ctrl-C shows no traceback, also while modules are imported."""
    try:
        yield
    except KeyboardInterrupt:
        sys.tracebacklimit = 1000 if FLAGS.is_parsed() and FLAGS.traceback else 0
        raise


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; an unknown option ends it with one message."""
    try:
        program, *others = app.parse_flags_with_usage(argv)
        if others:
            raise LookupError(f"{' '.join(others)!r} (options start with --)")
        return [program]
    except BrokenPipeError:  # the reader of --help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = error.args[0]
        if isinstance(reason, Exception):  # ml_collections wraps some errors
            reason = reason.args[0]
        message = " ".join(str(reason).splitlines())
        print(f"FATAL Flags parsing error: no such option: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    # From the start: imports take a while.  Training handles signals itself, to save a checkpoint
    # first; other modes stop at once.
    with briefly_interrupted(), StopSignals() as stop, stop.at_once():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is the parent
            stop_with_parent()
        choose_waiting()  # before a config, or a mode, imports PyTorch
        flags.mark_flags_as_required(["config", "mode"])
        app.run(main, flags_parser=parse_flags)
