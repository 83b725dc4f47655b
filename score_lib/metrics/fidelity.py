"""Networks of torch-fidelity, and files of weights that are downloaded at most once."""

import contextlib
import importlib
import logging
import pathlib
import socket
from collections.abc import Iterator

import torch
from torch import Tensor

from score_lib.disk.files import printable

SILENCE = 30.0  # seconds to wait for a server
# Operators are forgotten together with the library object that declared them.
_LIBRARIES: list[torch.library.Library] = []


def fidelity(module: str, extractor: str):
    """The module `torch_fidelity.{module}`, for an extractor.

    Raises:
        ImportError: torch-fidelity is not installed.
    """
    import_torchvision()  # as torch-fidelity does
    return optional(f"torch_fidelity.{module}", extractor, "torch-fidelity", "torch-fidelity")


def import_torchvision() -> None:
    """Import torchvision, if it is installed.

    Where it was built for CUDA and PyTorch was not, its compiled part cannot be loaded, and the
    import fails for lack of two operators that only that part defines.  We use neither: they are
    declared then.  Beside the compiled part, that would abort the process.
    """
    with contextlib.suppress(ImportError):
        try:
            import torchvision
        except RuntimeError:
            if hasattr(torch.ops.torchvision, "nms"):
                raise
            for name in ("nms", "qnms"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _LIBRARIES.append(library)
            import torchvision  # noqa: F401


def optional(module: str, extractor: str, package: str, install: str):
    """A module of a package that only this extractor needs.

    Raises:
        ImportError: the package is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the extractor {extractor!r} needs {package} ({error}): pip install {install}"
        ) from error


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Context in which a server that says nothing for `SILENCE` is an error, an OSError: libraries
    that download by themselves wait for it without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def downloaded(url: str, name: str) -> pathlib.Path:
    """The file of weights from a URL, in PyTorch's hub folder; it is downloaded if it is missing.

    Args:
        name: of the network, for messages.
    Raises:
        OSError: there is no network, or no place for the file.
    """
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.exists():
        return path
    logging.info("downloading the %s weights to %s", name, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with answered():
            torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise OSError(
            f"the {name} weights cannot be downloaded from {url} to {path} ({error}): copy "
            "that file here and name it with --config.eval.extractor_weights=FILE"
        ) from error
    return path


def weights_file(weights: str, url: str, name: str) -> pathlib.Path:
    """The file that `eval.extractor_weights` names, or the `downloaded` one for "".

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(weights) if weights else downloaded(url, name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of {name} weights at {path}")
    return path


@contextlib.contextmanager
def weights_of(path: pathlib.Path, network: str, url: str) -> Iterator[None]:
    """Context that reads a file of weights; errors in it become a ValueError that names the file.

    Args:
        network: in words, for the message.
        url: where such files are.
    """
    try:
        yield
    except Exception as error:  # damaged files make readers raise errors of nearly any type
        reason = printable(" ".join(str(error).split()), 120)
        raise ValueError(
            f"{path} does not hold the weights of {network} ({reason}): download, for example, "
            f"{url}"
        ) from error


def resized(images: Tensor, side: int, extractor: str) -> Tensor:
    """Images (B, C, H, W) of grey levels, float32, resized as torch-fidelity does.

    The filter is bilinear without antialiasing, aligned as in TensorFlow 1.
    """
    library = fidelity("interpolate_compat_tensorflow", extractor)
    return library.interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(side, side), align_corners=False
    )


def exact() -> contextlib.AbstractContextManager:
    """A context without TF32 on a GPU, which would change distances in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
