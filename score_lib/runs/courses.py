"""Checkpoints in the folder of a run that its present course does not lead to.

A run that resumes from a predecessor of its checkpoint may find files of later steps.  With the
same options it comes to them again; with others they are of a course that is abandoned, and would
pass for its own.  So would the last one of a run that was extended, and those numbered by another
`training.snapshot_freq`.  None is removed: they are set aside, under names that tell their steps.
"""

import logging
import pathlib

from score_lib.disk.checkpoints import glance
from score_lib.disk.files import set_aside
from score_lib.disk.fit import CheckpointError
from score_lib.runs.history import changed_between, changes, trained_config
from score_lib.runs.start import BEST

# The checkpoint of a run that ends between two numbered ones.
LAST = pathlib.Path("checkpoints", "checkpoint_last.pth")


def set_abandoned_aside(workdir: pathlib.Path, config, state: dict) -> None:
    """Set checkpoints of later steps aside, unless the run comes to the same ones again.

    Args:
        state: "step", and perhaps "start", of the run, which goes on from there with the config.
    """
    for path in [*workdir.glob("checkpoints/checkpoint_*.pth"), workdir / BEST]:
        contents = glance(path)
        later = (_step_of(contents) or 0) > state["step"]
        if later and not _comes_again(workdir, path, contents, config, state):
            set_aside(path, f"step_{contents['step']}")


def _comes_again(
    workdir: pathlib.Path, path: pathlib.Path, contents: dict, config, state: dict
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
    return not between and not changes(trained, config)


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


def is_in_best(workdir: pathlib.Path, best: dict) -> bool:
    """Whether `BEST` is the checkpoint of a measurement."""
    return glance(workdir / BEST).get("best") == best


def _step_of(contents: dict) -> int | None:
    step = contents.get("step")
    return step if isinstance(step, int) else None
