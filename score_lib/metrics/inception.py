"""The two Inception networks of published results.

Both descend from one network of 2015 but resize images differently, so features of one cannot be
compared with statistics of the other.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from score_lib.disk.files import file_digest, printable
from score_lib.disk.records import load_verified
from score_lib.metrics.extractors import Extractor, as_rgb, register_extractor
from score_lib.metrics.fidelity import (
    answered,
    exact,
    fidelity,
    optional,
    weights_file,
    weights_of,
)

TFGAN_URL = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_V3_URL = "https://tfhub.dev/google/imagenet/inception_v3/feature_vector/4"
_SIZE = 299
_SPATIAL_CHANNELS = 7


@register_extractor
class FidelityInception(Extractor):
    """torch-fidelity's port of the FID network.  [Heusel et al. 2017]

    Features are the output of the last pooling layer, (B, 2048).  Class scores, (B, 1008), omit the
    bias of the last layer, as in the published Inception Score.

    Spatial features are the first 7 channels of the map of 17 x 17 that the layer "mixed_6/conv"
    of the original network gives, (B, 2023).  [Nash et al. 2021, sFID; Dhariwal and Nichol 2021]

    The weights are torch-fidelity's file; "" downloads it to PyTorch's hub folder.
    """

    name = "inception"
    resize = f"bilinear to {_SIZE} x {_SIZE}, aligned as in TensorFlow 1"
    has_spatial = True

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        path = weights_file(weights, _fidelity().URL_INCEPTION_V3, "Inception")
        self.device = torch.device(device)
        self.network = _fidelity_network(path).to(self.device)
        self.digest = file_digest(path)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        x = as_rgb(images).movedim(-1, 1).contiguous().to(self.device)
        with exact():
            return self._with_map(x) if self.with_spatial else self.network(x)

    def _with_map(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, class scores and spatial features."""
        # torch-fidelity's name of "mixed_6/conv", which its forward does not give out.
        layer, maps = self.network.Mixed_6d.branch1x1, []
        hook = layer.register_forward_hook(lambda module, given, output: maps.append(output))
        try:
            pool_3, logits = self.network(x)
        finally:
            hook.remove()
        # In TensorFlow's order, the channel last.
        return pool_3, logits, maps[0][:, :_SPATIAL_CHANNELS].movedim(1, -1).flatten(1)


def _fidelity_network(path: pathlib.Path) -> torch.nn.Module:
    library, outputs = _fidelity(), ["2048", "logits_unbiased"]
    with weights_of(path, "torch-fidelity's Inception network", library.URL_INCEPTION_V3):
        # torch-fidelity unpickles the file, which can run code; a safe load refuses such files.
        load_verified(path)
        return library.FeatureExtractorInceptionV3(
            "inception", outputs, feature_extractor_weights_path=str(path)
        )


def _fidelity():
    return fidelity("feature_extractor_inceptionv3", "inception")


@register_extractor
class TFGANInception(Extractor):
    """TF-GAN's Inception network, through TensorFlow Hub, on the CPU.

    Images keep their size, as in the published code, if the model takes images of any size.
    Otherwise they are resized as in TF-GAN's examples.

    The weights are a URL or the folder of a SavedModel; "" is TF-GAN's URL.
    """

    name = "inception_tfgan"

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        handle = weights or TFGAN_URL
        self.tf = _tensorflow()
        self.model = _hub_model(handle)
        self.digest = _folder_digest(_hub().resolve(handle))
        self.resizes_itself = self._takes_any_size()
        fixed = f"bilinear to {_SIZE} x {_SIZE}, not antialiased"
        self.resize = "by the model itself" if self.resizes_itself else fixed

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tf.cast(as_rgb(images).cpu().numpy(), self.tf.float32)
        if not self.resizes_itself:
            x = self.tf.image.resize(x, (_SIZE, _SIZE), method="bilinear")
        outputs = self.model((x - 127.5) / 127.5)
        if not isinstance(outputs, Mapping) or not {"pool_3", "logits"} <= outputs.keys():
            found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                "the TensorFlow model must return a dictionary with 'pool_3' and 'logits', as "
                f"TF-GAN's does, not {found}"
            )
        return tuple(
            torch.from_numpy(outputs[key].numpy()).flatten(1) for key in ("pool_3", "logits")
        )

    def _takes_any_size(self) -> bool:
        # An image this small fails unless the model resizes it: the network pools too often.
        try:
            self.model(self.tf.zeros((1, 8, 8, 3)))
        except (ValueError, TypeError, self.tf.errors.OpError):
            return False
        return True


def get_inception_model(inceptionv3: bool = False):
    """The Inception network of the published code, as loaded by TensorFlow Hub.

    A function of a TensorFlow batch (B, H, W, 3).  TF-GAN's network takes values in [-1, 1] and
    returns {"pool_3", "logits"}.  With `inceptionv3`, the network for images of 256 px and more:
    values in [0, 1], result (B, 2048).  For uint8 PyTorch tensors use `get_extractor` instead.
    """
    _tensorflow()
    return _hub_model(INCEPTION_V3_URL if inceptionv3 else TFGAN_URL)


def run_inception_distributed(
    input_tensor, inception_model, num_batches: int = 1, inceptionv3: bool = False
) -> dict[str, Tensor | None]:
    """Features and class scores of uint8 images, by the published call.

    Args:
        input_tensor: (B, H, W, C) uint8; a tensor or an array.
        inception_model: an `Extractor`, or the network of `get_inception_model`.
        num_batches: parts that are processed one after the other.
        inceptionv3: whether that network is the one for large images, without class scores.
    Returns:
        "pool_3" (B, F), and "logits" (B, K) or None, float32 on the CPU.
    """
    images = torch.as_tensor(np.asarray(input_tensor))
    compute = inception_model
    if not isinstance(inception_model, Extractor):
        compute = functools.partial(_hub_outputs, inception_model, inceptionv3)
    parts = [compute(part) for part in images.tensor_split(num_batches) if len(part)]
    pool_3, logits = ([part[name] for part in parts] for name in ("pool_3", "logits"))
    has_logits = not inceptionv3 and logits[0] is not None
    return {"pool_3": torch.cat(pool_3), "logits": torch.cat(logits) if has_logits else None}


def _hub_outputs(model: Callable, inceptionv3: bool, images: Tensor) -> dict[str, Tensor | None]:
    if images.dtype != torch.uint8:
        raise ValueError(f"features are computed from uint8 images, not from {images.dtype}")
    x = _tensorflow().cast(images.numpy(), _tensorflow().float32)
    outputs = model(x / 255) if inceptionv3 else model((x - 127.5) / 127.5)
    named = {"pool_3": outputs} if inceptionv3 else outputs
    found = {name: torch.from_numpy(values.numpy()).flatten(1) for name, values in named.items()}
    return {"pool_3": found["pool_3"], "logits": found.get("logits")}


def _hub_model(handle: str):
    try:
        with answered():
            return _hub().load(handle)
    except (OSError, ValueError, RuntimeError, _tensorflow().errors.OpError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise OSError(
            f"the Inception network cannot be loaded from {handle} ({reason}): download the model "
            "on another machine, unpack it, and name its folder with "
            "--config.eval.extractor_weights=FOLDER"
        ) from error


def _tensorflow():
    """TensorFlow without GPUs, whose memory it would take from PyTorch."""
    tensorflow = optional("tensorflow", "inception_tfgan", "TensorFlow", "-r requirements.txt")
    # Fails if TensorFlow is already initialised.
    with contextlib.suppress(RuntimeError):
        tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def _hub():
    return optional("tensorflow_hub", "inception_tfgan", "TensorFlow Hub", "-r requirements.txt")


def _folder_digest(folder: str | os.PathLike) -> str:
    """A short hash of the files in a folder: their names and contents."""
    root = pathlib.Path(folder)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(file for file in root.rglob("*") if file.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()
