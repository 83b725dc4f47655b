"""Files in the folder of a run that its present course does not lead to.

A run that resumes from a predecessor of its checkpoint may find files of later steps.  With the
same options and data it comes to them again; with others they are of a course that is abandoned,
and would pass for its own.  So would the last checkpoint of a run that was extended, and those
numbered by another `training.snapshot_freq`.  None is removed: they are set aside.
"""

import logging
import math
import pathlib
from collections.abc import Iterator

from score_lib.disk import snapshots
from score_lib.disk.checkpoints import glance
from score_lib.disk.files import set_aside, write_text
from score_lib.disk.fit import CheckpointError
from score_lib.disk.logs import METRICS, step_of
from score_lib.runs.examples import Examples, records_of
from score_lib.runs.history import began_alike, changed_between, changes, trained_config
from score_lib.runs.start import BEST, Resumed

# The checkpoint of a run that ends between two numbered ones.
LAST = pathlib.Path("checkpoints", "checkpoint_last.pth")


def set_abandoned_aside(
    workdir: pathlib.Path, config, state: dict, resumed: Resumed, present: Examples
) -> None:
    """Set files of later steps aside, unless the run comes to the same ones again.

    Checkpoints tell their course.  Snapshots of averages, samples and metrics do not: they are of
    that of the checkpoint at which training resumes, or, where it begins anew, of the recorded one.

    Args:
        state: "step", and perhaps "start" and "examples", of the run, which goes on from there with
            the config.
        resumed: the checkpoint that it was restored from, if there was one.
        present: the examples of the data as they are now.
    """
    step, same = state["step"], _resumes_alike(workdir, config, state, resumed, present)
    for path in [*workdir.glob("checkpoints/checkpoint_*.pth"), workdir / BEST]:
        contents = glance(path)
        later = (_step_of(contents) or 0) > step
        if later and not _comes_again(workdir, path, contents, config, state, present):
            set_aside(path, f"step_{contents['step']}")
            same = False
    for path, other in _later(workdir, step):
        if not same or changed_between(workdir, step, other):
            set_aside(path, "abandoned")
    _keep_metrics(workdir, step, same)


def _resumes_alike(
    workdir: pathlib.Path, config, state: dict, resumed: Resumed, present: Examples
) -> bool:
    """Whether a run goes on as it did, or begins anew as it had begun."""
    if resumed.path is None:
        return began_alike(workdir, config, state.get("start"))
    alike = resumed.config is not None and not changes(resumed.config, config)
    return alike and same_examples(state, present)


def _later(workdir: pathlib.Path, step: int) -> Iterator[tuple[pathlib.Path, int]]:
    """Snapshots of averages, and samples, of later steps than one."""
    found = {stored.path: stored.step for stored in snapshots.find(workdir)}
    for folder in workdir.glob("samples/iter_*"):
        if (number := folder.name.removeprefix("iter_")).isdecimal():
            found[folder] = int(number)
    return ((path, other) for path, other in found.items() if other > step)


def _keep_metrics(workdir: pathlib.Path, step: int, same: bool) -> None:
    """Keep a copy of the metrics if records of another course are about to be dropped."""
    path = workdir / METRICS
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    steps = [found for line in text.splitlines() if step < (found := step_of(line)) < math.inf]
    if steps and (not same or changed_between(workdir, step, max(steps))):
        set_aside(path, "abandoned")
        write_text(path, text)


def _comes_again(
    workdir: pathlib.Path,
    path: pathlib.Path,
    contents: dict,
    config,
    state: dict,
    present: Examples,
) -> bool:
    """Whether a run comes to the same checkpoint of a later step: it was made as it would be now.

    That is taken for granted where the file does not tell, as those of others do not.
    """
    try:
        trained = trained_config(path, contents)
    except CheckpointError:
        return True
    if trained is None:
        return True
    if (contents.get("start") or {}) != (state.get("start") or {}):
        return False
    between = changed_between(workdir, state["step"], contents["step"])
    return not between and not changes(trained, config) and same_examples(contents, present)


def same_examples(contents: dict, present: Examples) -> bool:
    """Whether a state was trained last on the present examples; True if it does not tell."""
    return all(record == present for record in records_of(contents.get("examples"))[-1:])


def set_other_step_aside(path: pathlib.Path, step: int) -> None:
    """Set a checkpoint aside if it is of another step."""
    if (found := _step_of(glance(path))) not in (None, step):
        set_aside(path, f"step_{found}")


def kept_best(workdir: pathlib.Path, step: int, best: dict) -> dict:
    """The best measurement of a run that resumes after a step, if its weights are still there.

    They may be the present ones, or in `BEST`, or those of a later step that the run comes to
    again; else the search for the best begins anew, and {} is returned.
    """
    if not best or best["step"] == step:
        return best
    found = glance(workdir / BEST)
    if found.get("best") == best or (_step_of(found) or 0) > step:
        return best
    logging.warning(
        "the checkpoint of the best %s so far, %.4f at step %d, is no longer in %s, which begins "
        "anew", best["figure"], best["value"], best["step"], BEST,
    )  # fmt: skip
    return {}


def _step_of(contents: dict) -> int | None:
    step = contents.get("step")
    return step if isinstance(step, int) else None
