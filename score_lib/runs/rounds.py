"""The rounds of an evaluation: files that are computed once.

An evaluation that was killed resumes at the first missing round and ends with the same figures.
Several processes share the rounds; each round is made by one process, so their number changes no
figure.  They exchange rounds through the folder, which all of them must see.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from score_lib.base import distributed
from score_lib.data.loading import check_levels, get_streams
from score_lib.data.sources import Source, log_once
from score_lib.disk.arrays import load_arrays, save_arrays
from score_lib.disk.files import file_digest, printable, text_digest, write_text
from score_lib.metrics.stats import Statistics
from score_lib.options import complete, flatten
from score_lib.runs.examples import held_out_text
from score_lib.runs.heldout import examples_text
from score_lib.runs.history import CHANGES_NO_WEIGHT, PLACES_OF_DATA
from score_lib.runs.setup import Run

# Options that choose which rounds are made, as `enable_*` do, or are made of the rounds, and do not
# change their contents.  An average is in the names of its rounds, and in their fingerprint, as the
# contents of a dequantizer are; an extractor is the basis of its rounds.
_NOT_IN_FINGERPRINT = (
    "begin_ckpt",
    "end_ckpt",
    "checkpoint",
    "dequantizer",
    "ema",
    "extractor",
    "extractor_weights",
    "stats",
    "figures",
    "wait_minutes",
    "bpd_num_repeats",
    "stats_format",
    "suggest_noise_scales",
)
# Of other sections; weights are in the fingerprint themselves, and `examples.json` tells the data,
# wherever they are.
_OTHERS = CHANGES_NO_WEIGHT | {
    "model.checkpoint_activations",
    "sampling.num_samples",
    *(f"data.{name}" for name in PLACES_OF_DATA),
}
# Advice where rounds do not fit.
_ADVICE = "choose another --eval_folder (of --mode eval), or remove it"
# Sections of other modes.
_OTHER_MODES = ("control.", "export.", "optim.")


@dataclasses.dataclass
class Job:
    """The evaluation of one checkpoint.

    Attributes:
        run: with the checkpoint's averaged weights in place.
        folder: of the results.
        label: number or name of the checkpoint, part of file names.
        fingerprint: of the checkpoint and the options; rounds with another one are not reused.
        workdir: folder of the run, where statistics of the data may be.
        compared: the parts of the data that `check_data` has compared, for all jobs of a folder.
        held_out: the `held_out_text` of the data; None until `check_held_out` looks.
        statistics: of the data, once `refusals.check_samples` has read them.
    """

    run: Run
    folder: pathlib.Path
    label: str
    fingerprint: str
    workdir: pathlib.Path | None = None
    compared: set[str] = dataclasses.field(default_factory=set)
    held_out: str | None = None
    statistics: Statistics | None = None

    def check_data(self, split: str, *, labels: bool = True) -> None:
        """Refuse data that do not belong to the network, or are others than earlier rounds are of.

        Args:
            split: the part of the data that rounds are made of, "train" or "test".
            labels: whether a network that knows classes is told those of the data.
        Raises:
            ValueError: the labels are not those that it has learned, the data have changed since
                earlier rounds in the folder, or differ from those of another process, or
                `data.levels` is to be set.
        """
        info = get_streams(self.run.config, evaluation=True)[2]
        check_levels(self.run.config, info)
        if labels:
            self.run.check_labels(info)
        if split not in self.compared:
            found = distributed.agreed(examples_text(info.sources[split]), f"{split} data")
            of = self.folder, split, info.name, found, bool(self.compared)
            distributed.on_main(lambda: _check_examples(*of))
            self.compared.add(split)
        if split == "test":
            self.check_held_out(info.sources[split])

    def check_held_out(self, source: Source) -> None:
        """Look whether the held-out part of the data is that of the training."""
        if self.held_out is None:
            self.held_out = held_out_text(self.run, source)

    def round(
        self, name: str, compute: Callable[[], dict[str, np.ndarray]], basis: str = ""
    ) -> dict:
        """The arrays of a round: from its file, or computed and written there, by this process.

        Args:
            basis: in words, what the arrays depend on beside the fingerprint, such as an
                extractor.  A round of another basis is made again, and the log says so.
        Raises:
            ValueError: the file is damaged, or belongs to another evaluation.
        """
        path = self.folder / name
        arrays, found = self._read(path) if path.exists() else ({}, None)
        if found == basis:
            return arrays
        if found is not None:
            # One line for all of a folder's.
            earlier = printable(found) or "an older version"
            log_once(f"{path.parent}: rounds made with {earlier} are made again with {basis}")
        self._write(path, compute(), basis)
        # Read back even if just written: a resumed evaluation then sees the same numbers.
        return self._read(path)[0]

    def rounds(self, count: int, make: Callable[[int], dict]) -> list[dict]:
        """[make(k) for k in range(count)], shared among processes; `make` calls `round`."""
        found = {number: make(number) for number in distributed.share(range(count))}
        distributed.barrier()
        # Those of other processes are read from their files.
        return [found[k] if k in found else make(k) for k in range(count)]

    def joint_round(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict:
        """The arrays of a round that all processes compute together, see `round`."""
        path = self.folder / name
        if not distributed.on_main(path.exists):
            arrays = compute()
            distributed.on_main(lambda: self._write(path, arrays))
        return self._read(path)[0]

    def _write(self, path: pathlib.Path, arrays: dict[str, np.ndarray], basis: str = "") -> None:
        record = {"fingerprint": self.fingerprint} | ({"basis": basis} if basis else {})
        save_arrays(path, **{name: np.array(text) for name, text in record.items()}, **arrays)

    def _read(self, path: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
        """The arrays of a round, and its basis."""
        arrays = load_arrays(path)
        if str(arrays.pop("fingerprint", "")) != self.fingerprint:
            raise ValueError(
                f"{path} was made with other options, another checkpoint or another version of "
                f"this program: {_ADVICE}"
            )
        basis = str(arrays.pop("basis", ""))
        return arrays, basis


def fingerprint(config, *checkpoints: pathlib.Path, average: str = "") -> str:
    """A short hash of everything that rounds depend on: checkpoints, the average, and options."""
    text = json.dumps(_relevant(config.to_json_best_effort()))
    return text_digest(text + "".join(map(file_digest, checkpoints)) + average)


def check_folder(config, folder: pathlib.Path) -> None:
    """Refuse a folder with rounds that were made with other options.

    Raises:
        ValueError: names the options, or says that the folder's own config is damaged.
    """
    path = folder / "config.json"
    if not path.exists() or not has_rounds(folder):
        return
    ours = _relevant(config.to_json_best_effort())
    try:
        text = path.read_text(encoding="utf-8")
        theirs = _relevant(text)
        # Options that are newer than the folder had their defaults, and are not told.
        full = _relevant(complete(json.loads(text)).to_json_best_effort())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, so that the options of the results beside it are unknown: "
            f"{_ADVICE}"
        ) from error
    if ours != theirs:
        keys = ours.keys() | full.keys()
        differing = sorted(key for key in keys if ours.get(key) != full.get(key))
        differing = differing or ["version of this program"]
        shown = ", ".join(differing[:8]) + (", ..." if len(differing) > 8 else "")
        raise ValueError(f"{folder} holds an evaluation with another {shown}: {_ADVICE}")


def has_rounds(folder: pathlib.Path) -> bool:
    """Whether a folder holds rounds of an evaluation."""
    return any(folder.rglob("*.npz"))


def _check_examples(folder: pathlib.Path, split: str, name: str, found: str, goes_on: bool) -> None:
    """Refuse a part of the data that differs from its record in `examples.json`, or record it.

    Args:
        name: of the data set.
        found: the part's `examples_text`.
        goes_on: this evaluation has recorded another part; else a record without rounds is of none.
    """
    path = folder / "examples.json"
    recorded = _recorded(path) if goes_on or has_rounds(folder) else {}
    earlier = recorded.get(split, found)
    if earlier != found:
        raise ValueError(
            f"{folder} holds an evaluation of {printable(str(earlier))}, and the {split} part of "
            f"{name} now has {found}: {_ADVICE}"
        )
    if split not in recorded:
        write_text(path, json.dumps(recorded | {split: found}, indent=2) + "\n")


def _recorded(path: pathlib.Path) -> dict:
    """The data that the rounds beside a file are of, by their part."""
    if not path.exists():
        logging.info("the rounds in %s do not record their data, and may be of others", path.parent)
        return {}
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, so that the data of the results beside it are unknown: {_ADVICE}"
        ) from error


def _relevant(config_json: str) -> dict[str, object]:
    """The options that rounds depend on, by dotted name, sorted."""
    flat = flatten(ConfigDict(json.loads(config_json)))
    left_out = {*_OTHERS, *(f"eval.{name}" for name in _NOT_IN_FINGERPRINT)}
    return {
        key: flat[key]
        for key in sorted(flat.keys() - left_out)
        if ".enable_" not in key and not key.startswith(_OTHER_MODES)
    }
