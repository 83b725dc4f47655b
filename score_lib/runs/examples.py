"""The examples that a network was trained on, and those held out from it, as its checkpoints record
them: "examples", one table for each state of the data, the latest last, of part -> `examples_text`.

Files or rows that are added or removed later move others from one part to the other.
"""

import logging

from ml_collections import ConfigDict

from score_lib.base import distributed
from score_lib.base.tensors import data_shape
from score_lib.data.sources import Source
from score_lib.disk.files import printable
from score_lib.runs.heldout import examples_text
from score_lib.runs.history import same_data
from score_lib.runs.setup import Run

# Examples of each part that are read: few enough for any start.
_READ = 100
OTHERS = "other examples than in training"

Examples = dict[str, str]


def present_examples(train: Source, test: Source) -> Examples:
    """The record of both parts as they are now.

    Raises:
        DataError: one of the examples that are read is damaged.
        ValueError: processes have different ones.
    """
    sources = {"train": train, "test": test}
    found = {part: examples_text(source, _READ) for part, source in sources.items()}
    for part, text in found.items():
        distributed.agreed(text, f"{part} data")
    return found


def record_examples(run: Run, present: Examples, old: ConfigDict | None) -> None:
    """Put the present examples into the state of a run that starts or resumes.

    Args:
        run: with its state restored.
        present: see `present_examples`.
        old: in the main process, the config that the state was trained with, if it is known.
    """

    def together() -> list[Examples]:
        if old is None or not _comparable(old, run.config):
            return [present]
        earlier = records_of(run.state["examples"])
        for part in _differing(earlier[-1:], present):
            logging.warning(
                "the %s part of %s has %s, where before step %d it had %s: some may have moved "
                "from one part to the other",
                part, run.config.data.dataset, present[part], run.state["step"],
                printable(str(earlier[-1].get(part))),
            )  # fmt: skip
        return [*(record for record in earlier if record != present), present]

    run.state["examples"] = distributed.on_main(together)


def held_out_text(run: Run, test: Source) -> str:
    """`OTHERS` where the held-out examples are not those of training, which is logged; else "".

    Args:
        run: with a checkpoint loaded.
        test: the held-out part of the data as it is now.
    """
    earlier = records_of(run.state.get("examples"))
    if not earlier or run.trained is None or not _comparable(run.trained, run.config):
        return ""

    def compared() -> str:
        present = {"test": examples_text(test, _READ)}
        if not _differing(earlier, present):
            return ""
        logging.warning(
            "the held-out part of %s has %s: some of its %s may have been trained on, as training "
            "held out %s",
            run.config.data.dataset, OTHERS, present["test"],
            printable(" and ".join(str(record.get("test")) for record in earlier)),
        )  # fmt: skip
        return OTHERS

    return distributed.on_main(compared)


def _comparable(old: ConfigDict, new: ConfigDict) -> bool:
    """Whether the same data would be read in the same way: resizing gives other examples."""
    return same_data(old, new) and data_shape(old) == data_shape(new)


def _differing(earlier: list[Examples], present: Examples) -> list[str]:
    """The parts that differ from any of the records."""
    return [p for p in present if any(record.get(p) != present[p] for record in earlier)]


def records_of(found: object) -> list[Examples]:
    """The records in a file; those that are none are left out."""
    found = found if isinstance(found, list) else []
    return [record for record in found if isinstance(record, dict)]
