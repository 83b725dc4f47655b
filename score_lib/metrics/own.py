"""A user's own network as an extractor: `eval.extractor = "module:function"`."""

import contextlib
import hashlib
import importlib
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from score_lib.base.weights import parts_to_hash
from score_lib.disk.files import file_digest, printable
from score_lib.metrics.extractors import Extractor


class OwnExtractor(Extractor):
    """Features from a user's function.

    `function(device)`, with `weights=FILE` if `eval.extractor_weights` names one, returns a
    callable: from images (b, H, W, C) uint8, on the device, to features (b, F), or to a dictionary
    of "pool_3" (b, F) and perhaps "logits" (b, K).  The callable may have the attributes `resize`,
    `batch_size` and `digest` of `Extractor`.  A `torch.nn.Module` is put into
    evaluation mode.  Without `digest` the callable is identified by the source of its module, its
    state if it is a `torch.nn.Module`, and the file of weights.

    Args:
        place: "module:function"; it is imported now.
    Raises:
        ValueError: it cannot be imported or called, or gives no callable; says why.
    """

    distance = "fd"

    def __init__(self, place: str, weights: str = "", device: torch.device | str = "cpu"):
        self.name, self.device = place, torch.device(device)
        module, function = _imported(place)
        try:
            self.network = function(self.device, **({"weights": weights} if weights else {}))
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"eval.extractor = {place!r} failed: {_reason(error)}") from error
        if not callable(self.network):
            raise ValueError(
                f"eval.extractor = {place!r} must return a callable, from images (B, H, W, C) "
                f"uint8 to features (B, F), not {type(self.network).__name__}"
            )
        if isinstance(self.network, torch.nn.Module):
            # An exported program is as it was exported, and refuses to be asked.
            with contextlib.suppress(NotImplementedError):
                self.network.eval()
        # A method of such a name is none of them: its text is another in each process.
        self.resize = self._told("resize", str, "its own")
        self.batch_size = self._told("batch_size", int, self.batch_size)
        if self.batch_size < 1:
            raise ValueError(
                f"eval.extractor = {place!r} gives batch_size = {self.batch_size}, which should "
                "be 1 or more"
            )
        digest = str(self._told("digest", str | int, ""))
        self.digest = digest or _digest(module, self.network, weights)

    def _told(self, name: str, kind: type, default: str | int) -> str | int:
        """An attribute of the user's callable, if it has one of this kind."""
        value = getattr(self.network, name, default)
        return value if isinstance(value, kind) else default

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.network(images.to(self.device))
        named = found if isinstance(found, Mapping) else {"pool_3": found}
        pool_3, logits = named.get("pool_3"), named.get("logits")
        for name, values in {"pool_3": pool_3, "logits": logits}.items():
            if name in named and not _are_rows(values, len(images)):
                shape = getattr(values, "shape", type(values).__name__)
                raise ValueError(
                    f"eval.extractor = {self.name!r} must give floating-point {name} of shape "
                    f"({len(images)}, F) for {len(images)} images, not {printable(str(shape))}"
                )
        if pool_3 is None:
            raise ValueError(
                f"eval.extractor = {self.name!r} must give features, or a dictionary with "
                f"'pool_3', not one with {printable(str(sorted(map(str, named))))}"
            )
        return torch.as_tensor(pool_3), None if logits is None else torch.as_tensor(logits)


def _imported(place: str) -> tuple[ModuleType, Callable]:
    """The module and the function of "module:function"."""
    name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a module is a program: it may raise anything
        raise ValueError(
            f"eval.extractor = {place!r}: the module {name!r} cannot be imported: {_reason(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"eval.extractor = {place!r}: {name} has no function {attribute!r}")
    return module, function


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"


def _are_rows(values, count: int) -> bool:
    if not isinstance(values, Tensor | np.ndarray):
        return False
    values = torch.as_tensor(values)
    return values.dim() == 2 and len(values) == count and values.is_floating_point()


def _digest(module: ModuleType, network: Callable, weights: str) -> str:
    """A short hash of the source, the state of a `torch.nn.Module`, and the file of weights."""
    digest = hashlib.blake2b(digest_size=8)
    source = getattr(module, "__file__", None)
    digest.update(pathlib.Path(source).read_bytes() if source else b"")
    if isinstance(network, torch.nn.Module):
        for part in parts_to_hash(network.state_dict()):
            digest.update(part)
    known = file_digest(weights) if pathlib.Path(weights).is_file() else weights
    digest.update(known.encode())
    return digest.hexdigest()
