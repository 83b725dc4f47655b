"""The options that a run was trained with, `config_history.jsonl`, and those that may change.

One JSON object a line: {"step": S, "config": {...}} at the start of a run, also with "start" if it
started from other weights, and {"step": S, "changed": {"optim.eps": [old, new]}} where it was
resumed after S steps with other options.
Options that change no weight are left out, so that only the training decides on the file.
"""

import json
import logging
import os
import pathlib
import sys

from ml_collections import ConfigDict

from score_lib.base.profiles import profile_name
from score_lib.disk.files import printable, text_digest, write_text
from score_lib.disk.fit import CheckpointError
from score_lib.disk.logs import step_of
from score_lib.options import Config, complete, flatten, from_json

# Nor do they change a figure of given weights.
CHANGES_NO_WEIGHT = {
    "device",
    "data.num_workers",
    # They decide once, and are recorded beside the config.
    "model.weights",
    "model.weights_except",
    "training.n_iters",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_freq",
    "training.snapshot_freq_for_preemption",
    "training.snapshot_sampling",
    "training.keep_meta_checkpoints",
    "training.metrics_freq",
    "training.metrics_sampler",
    "training.metrics_samples",
    "training.posthoc_freq",
    "training.n_jitted_steps",
    "training.wandb",
}
_SECTIONS_OF_OTHER_MODES = ("sampling", "eval", "control", "dequantizer", "export")
# A network's output means something for these values only; so it does for those of `model`, which
# describe the network and the process, apart from those below.
_OF_THE_OUTPUT = {
    "data.centered",
    "training.condition",
    "training.condition_factor",
    "training.condition_operator",
    "training.continuous",
    "training.objective",
    "training.sde",
}
_OF_THE_STATE = _OF_THE_OUTPUT | {"data.category", "data.dataset", "data.key", "data.standardize"}
# Options that name the data, and those by which the same data are other examples: held out, or with
# other values.
_OF_THE_DATA = ("dataset", "category", "key")
PLACES_OF_DATA = ("path", "data_dir", "tfrecords_path")
# Options that each machine of a run may have for itself.
OF_A_MACHINE = {"device", "data.num_workers", *(f"data.{name}" for name in PLACES_OF_DATA)}
_OF_THE_EXAMPLES = {"data.background", "data.levels", "data.range", "data.split"}
_OF_THE_SHAPE = {"data.image_size", "data.image_width", "data.shape"}
_FREE = {
    "model.checkpoint_activations",
    "model.dropout",
    "model.ema_halflife",
    "model.ema_rampup",
    "model.ema_rate",
    "model.ema_rates",
    "model.weights",
    "model.weights_except",
}

Changes = dict[str, list]  # dotted name of an option -> [old, new]


def trained_config(path: str | os.PathLike, contents: dict) -> ConfigDict | None:
    """The config inside a checkpoint, complete; None if there is none, as in published ones.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not contents.get("config"):
        return None
    try:
        return from_json(contents["config"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(str(error))
        raise CheckpointError(f"{path} holds a config that cannot be read ({reason})") from error


def training_options(trained: ConfigDict, present: Config) -> Config:
    """The options that weights were trained with, and the present ones of other modes."""
    config = complete(trained)
    for section in _SECTIONS_OF_OTHER_MODES:
        config[section] = present[section]
    config.device = present.device_name
    return config


def check_same_run(path: pathlib.Path, old: ConfigDict, new: ConfigDict) -> None:
    """Refuse to resume where the checkpoint's state means nothing with the config's options.

    Raises:
        CheckpointError: names those options.
    """
    if found := told(_differing(old, new, _OF_THE_STATE | _of_the_examples(old, new), _FREE)):
        raise CheckpointError(
            f"{path} cannot be resumed with {found}: set the old values, or choose another "
            "--workdir"
        )


def check_same_profiles(path: pathlib.Path, contents: dict, new: ConfigDict) -> None:
    """Refuse profiles that a checkpoint lacks: they would not count its steps.

    Raises:
        CheckpointError: names them.
    """
    stored = contents.get("averages")
    stored = stored if isinstance(stored, dict) else {}
    wanted = {profile_name(s): s for s in new.training.posthoc_profiles}
    if missing := [s for name, s in wanted.items() if name not in stored]:
        raise CheckpointError(
            f"{path} cannot be resumed with training.posthoc_profiles = "
            f"{tuple(new.training.posthoc_profiles)}: it does not hold {missing}, and a profile "
            "counts all steps from the first. Leave these out, or choose another --workdir"
        )


def check_same_output(path: str | os.PathLike, old: ConfigDict, new: ConfigDict) -> None:
    """Refuse to sample or evaluate where the network's output would be read wrongly, or where the
    data that it was trained on would be split or scaled in another way; warn of another shape.

    Raises:
        CheckpointError: names the options.
    """
    if found := told(different_output(old, new)):
        raise CheckpointError(
            f"{path} was trained with other options, and its output or its data would be read "
            f"wrongly with {found}: use the config that it was trained with"
        )
    of_shape = {key: change for key, change in changes(old, new).items() if key in _OF_THE_SHAPE}
    if of_shape:  # which networks of any size, or of sets of any number of points, take
        logging.warning("%s was trained on data of another shape: %s", path, told(of_shape))


def different_output(old: ConfigDict, new: ConfigDict) -> Changes:
    """The options that differ and decide what the network's output means, or how the data that it
    was trained on are split and scaled."""
    free = _FREE | {"model.num_scales"} if knows_all_times(new) else _FREE
    named = _OF_THE_OUTPUT | _of_the_examples(old, new)
    if not new.data.path:  # the levels of a published set are known, and may be left to it
        named -= {"data.levels"}
    return _differing(old, new, named, free)


def knows_all_times(config: Config) -> bool:
    """Whether the chain of a network's process is free to change: the network knows all times, and
    the length of the chain is not the unit of them."""
    return config.training.continuous and not config.model.rescale_timesteps


def check_guidance(path: str | os.PathLike, old: ConfigDict | None, new: ConfigDict) -> None:
    """Refuse guidance by a network that has never seen its condition dropped.

    Args:
        old: the config that it was trained with, if it is known.
    Raises:
        CheckpointError: says so.
    """
    scale = new.sampling.guidance_scale
    if old is not None and scale != 1 and not old.training.condition_dropout:
        raise CheckpointError(
            f"{path} was trained with training.condition_dropout = 0, so that it does not know the "
            f"unconditional score, which sampling.guidance_scale = {scale} needs: set the scale to "
            "1, or train on with training.condition_dropout above 0"
        )


def same_data(old: ConfigDict, new: ConfigDict) -> bool:
    """Whether two configs name the same data; other data may be split and scaled in other ways."""
    return all(old.data[name] == new.data[name] for name in _OF_THE_DATA) and all(
        _same_place(old.data[name], new.data[name]) for name in PLACES_OF_DATA
    )


def _same_place(old: str, new: str) -> bool:
    """Whether two paths name the same place, perhaps by a link, or from another folder."""
    if not (old and new):
        return old == new
    old, new = os.path.expanduser(old), os.path.expanduser(new)
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    # It is not known where a run with a relative path was started: places called alike count as
    # the same, since held-out examples must not be those of the training.
    tail = os.path.normpath(old)
    ends = (path(new).endswith(os.sep + tail) for path in (os.path.abspath, os.path.realpath))
    return not os.path.isabs(old) and any(ends)


def _of_the_examples(old: ConfigDict, new: ConfigDict) -> set[str]:
    """The options by which examples of the same data may differ; none where the data do."""
    if not same_data(old, new):
        return set()
    # 0 is 256 levels; continuous values are told apart by their units.
    levels = {config.data.levels or 256 for config in (old, new)}
    return _OF_THE_EXAMPLES if len(levels) > 1 else _OF_THE_EXAMPLES - {"data.levels"}


def _differing(old: ConfigDict, new: ConfigDict, named: set[str], free: set[str]) -> Changes:
    """The options of a set and of the model, but for the free ones, that differ."""
    return {
        key: change
        for key, change in changes(old, new).items()
        if key in named or (key.startswith("model.") and key not in free)
    }


def changes(old: ConfigDict, new: ConfigDict) -> Changes:
    """The options of training that differ."""
    return _changes(_flat(old), _flat(new))


def told(changed: Changes) -> str:
    """Changes in words; "" if there are none."""
    return ", ".join(f"{key} = {new!r} instead of {old!r}" for key, (old, new) in changed.items())


def record_config(
    workdir: pathlib.Path,
    step: int,
    config: ConfigDict,
    old: ConfigDict | None,
    applied: Changes,
    start: dict | None,
) -> None:
    """Write the history of a run that starts or resumes, and log the options that changed.

    Records from the present step on are replaced, so that a run that was stopped leaves the same
    file as one that was not.

    Args:
        workdir: folder of the run.
        step: steps made so far.
        config: the present one.
        old: the config that the present state was trained with, if it is known.
        applied: options that differed in the restored state itself.
        start: the weights that the run started from, if it did, see `load_start`.
    """
    path = _history_of(workdir)
    first = {"step": step, "config": _trained_by(old or config)}
    records = _earlier(path, step) or [first | ({"start": start} if start else {})]
    trained_with = _begun_with(records[0])
    for record in records[1:]:
        trained_with |= {key: after for key, (_, after) in record["changed"].items()}
    if changed := applied | _changes(trained_with, _flat(config)):
        records.append({"step": step, "changed": changed})
    for key, (before, after) in changed.items():
        logging.warning("from step %d on, %s = %r instead of %r", step, key, after, before)
    write_text(path, "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def changed_between(workdir: pathlib.Path, first: int, last: int) -> bool:
    """Whether options changed after a step, and before another one."""
    return any(record["step"] > first for record in _earlier(_history_of(workdir), last)[1:])


def began_alike(workdir: pathlib.Path, config: ConfigDict, start: dict | None) -> bool:
    """Whether the recorded run in a folder began as one of a config and of such a start would."""
    first, *_ = _earlier(_history_of(workdir), sys.maxsize) or [{"step": None}]
    return (
        first["step"] == 0
        and (first.get("start") or {}) == (start or {})
        and not _changes(_begun_with(first), _flat(config))
    )


def beginning_of(workdir: pathlib.Path) -> str:
    """A short hash of how the recorded run in a folder began; "" if that is not known."""
    first, *_ = _earlier(_history_of(workdir), sys.maxsize) or [{"step": None}]
    return text_digest(json.dumps(first, sort_keys=True)) if first["step"] == 0 else ""


def run_digest(config: ConfigDict) -> str:
    """A short hash of the options that decide on the weights of a run."""
    return text_digest(json.dumps(_trained_by(config), sort_keys=True))


def _history_of(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "config_history.jsonl"


def _earlier(path: pathlib.Path, step: int) -> list[dict]:
    """Records before a step; none where they do not begin with a config."""
    if not path.exists():
        return []
    # Undecodable bytes are not a record.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    first, *others = [json.loads(line) for line in lines if step_of(line) < step] or [{}]
    if not _is_config(first.get("config")):
        return []
    return [first, *(record for record in others if _is_change(record.get("changed")))]


def _begun_with(record: dict) -> dict[str, object]:
    """The options of a first record: those that are newer than it had their defaults."""
    return _flat(complete(record["config"]))


def _is_config(value: object) -> bool:
    try:
        return isinstance(value, dict) and bool(value) and bool(complete(value))
    except ValueError:  # a name with a dot, or a section that is none
        return False


def _is_change(value: object) -> bool:
    pairs = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)


def _trained_by(config: ConfigDict) -> dict:
    """The options that count, in their sections and of JSON's types."""
    found = json.loads(config.to_json_best_effort())
    for section in _SECTIONS_OF_OTHER_MODES:
        del found[section]
    # The cooldown of the learning rate ends with the last step.
    counts = {"training.n_iters"} if config.optim.cooldown else set()
    for key in CHANGES_NO_WEIGHT - counts:
        section, _, name = key.rpartition(".")
        del (found[section] if section else found)[name]
    return found


def _flat(config: ConfigDict) -> dict[str, object]:
    return flatten(ConfigDict(_trained_by(config)))


def _changes(old: dict[str, object], new: dict[str, object]) -> Changes:
    """The options that differ, by name."""
    keys = old.keys() | new.keys()
    # It counts in one of them alone where the cooldown was switched on or off, which is told.
    keys -= {"training.n_iters"} - (old.keys() & new.keys())
    return {
        key: [old.get(key), new.get(key)] for key in sorted(keys) if old.get(key) != new.get(key)
    }
