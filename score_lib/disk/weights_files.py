"""Weights to start from, in any layout: checkpoints, weights alone, averages alone, safetensors."""

import fnmatch
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from score_lib.base.weights import without_wrapper
from score_lib.disk.checkpoints import contents_of_file, read_plain
from score_lib.disk.fit import CheckpointError, check_weights

_TABLE = "sigmas"  # of noise levels, see `models.utils.get_sigmas`
_HINT = (
    "Name in model.weights_except those that should stay as initialised, or use the config that "
    "the file was trained with"
)


def read_weights(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict:
    """The contents of a file with weights, as `read_checkpoint` gives them.

    The file may also hold averages alone: {"ema": ...}, or the average itself with its
    "shadow_params".  There is no "model" then.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, or holds no weights.
    """
    loaded = read_plain(path, device, mapped=True)
    if isinstance(loaded, dict) and "model" not in loaded:
        if "shadow_params" in loaded:
            return {"ema": loaded}
        if isinstance(loaded.get("ema"), dict):
            return loaded
    return contents_of_file(path, loaded)


def weights_by_name(path: str | os.PathLike, contents: dict, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a file under the network's names: the average, where the file holds one.

    Averages are lists of the trainable parameters.  Where the file has no other weights, frozen
    parameters and buffers are missing.  Only the table of noise levels, which the network makes
    from its config, may be missing, and stays.

    Args:
        path: for messages.
        contents: see `read_weights`.
        model: the network that the weights are for.
    Raises:
        CheckpointError: the average cannot be assigned to the weights beside it, or is not of all.
    """
    own, average = model.state_dict(), contents.get("ema")
    untrained = {name for name, p in model.named_parameters() if not p.requires_grad}
    untrained |= {name for name, _ in model.named_buffers()}
    tables = {_TABLE: own[_TABLE]} if _TABLE in own else {}
    stored = without_wrapper(_table(path, contents.get("model", {})), own)
    # Averages are in the network's order, which the names of a file need not be in.
    are_same = stored.keys() | tables.keys() == own.keys() | tables.keys()
    order = own if are_same else stored or own
    names = [name for name in order if name not in untrained]
    weights = tables | stored
    if average is None:
        return weights
    if not isinstance(average, dict) or "shadow_params" not in average:
        averaged = without_wrapper(_table(path, average), own)
        _check_averaged(path, averaged, [name for name in names if name in own and name in stored])
        return weights | averaged
    tensors = average["shadow_params"]
    if not isinstance(tensors, list | tuple) or len(tensors) != len(names):
        number = len(tensors) if isinstance(tensors, list | tuple) else 0
        raise CheckpointError(
            f"{path} averages {number} parameters, where {len(names)} have names: use the config "
            "that it was trained with, or a file of weights alone"
        )
    return weights | dict(zip(names, tensors, strict=True))


def tell_rounded(path: str | os.PathLike, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Warn of random frequencies in less than float32: the phases of high ones are lost.

    Args:
        weights: of the network, checked.
    """
    random = {name for name, p in model.named_parameters() if not p.requires_grad}
    random |= {name for name, _ in model.named_buffers()} - {_TABLE}
    for name in sorted(random & weights.keys()):
        dtype = weights[name].dtype
        if dtype.is_floating_point and dtype.itemsize < 4:
            logging.warning(
                "%s holds %s in %s: rounded frequencies change the output more than rounded "
                "weights do; use a file that has them in float32, as exports here do",
                path, name, str(dtype).removeprefix("torch."),
            )  # fmt: skip


def _check_averaged(path: str | os.PathLike, averaged: dict, names: list[str]) -> None:
    """Refuse a table of averages that lacks names, for which weights beside it would serve."""
    if missing := [name for name in names if name not in averaged]:
        raise CheckpointError(
            f"{path} averages {len(names) - len(missing)} of {len(names)} weights, and its table "
            f"'ema' lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}: use a "
            "file with all of them, or one of weights alone"
        )


def completed(
    path: str | os.PathLike, weights: dict[str, Tensor], model: nn.Module, excepted: Sequence[str]
) -> dict[str, Tensor]:
    """A state dict of the network: weights of a file, and its own where patterns match.

    Args:
        path: for messages.
        weights: by the network's names.
        excepted: patterns of names, as of files: "label_emb.*".
    Raises:
        CheckpointError: other weights are missing, superfluous or of another shape, or a pattern
            matches nothing.
    """
    own = model.state_dict()
    names, left = own.keys() | weights.keys(), set()
    for pattern in excepted:
        if not (found := fnmatch.filter(names, pattern)):
            raise CheckpointError(
                f"model.weights_except names {pattern!r}, which matches no weight of the network "
                f"or of {path}: they are called like {next(iter(own))!r}"
            )
        left.update(found)
    chosen = {name: value for name, value in weights.items() if name not in left}
    chosen |= {name: own[name] for name in own if name in left}
    check_weights(path, chosen, model, hint=_HINT)
    return chosen


def _table(path: str | os.PathLike, weights: object) -> dict:
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} holds weights without names: a {type(weights).__name__}")
    return weights
