"""The published calls for data: batches of arrays with channels last, and crops of one image."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from score_lib.data.loading import DatasetInfo, get_streams
from score_lib.data.preprocess import center_crop, resize, shrink
from score_lib.data.stream import ImageStream

Image = np.ndarray | Tensor


def get_dataset(
    config,
    uniform_dequantization: bool = False,
    evaluation: bool = False,
    *,
    num_workers: int = 0,
) -> tuple["Batches", "Batches", DatasetInfo]:
    """Training batches, held-out batches and description of the configured data set.

    Batches are {"image": (B, H, W, C) float32 in [0, 1], "label": (B,)}, arrays of NumPy; see
    `get_streams` for the order of examples and for tensors with channels first.

    Args:
        num_workers: processes that decode.  With some, the calling script needs the usual guard
            `if __name__ == "__main__"`.
    """
    options = {"num_workers": num_workers, "worker_init": None}
    train, test, info = get_streams(config, uniform_dequantization, evaluation, **options)
    return Batches(train), Batches(test), info


class Batches:
    """The batches of a stream as arrays; images have their channels last."""

    def __init__(self, stream: ImageStream):
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[dict[str, "Array"]]:
        for batch in self.stream:
            examples = batch["image"]
            if examples.dim() == 4:
                batch["image"] = examples.movedim(1, -1).contiguous()
            yield {key: values.numpy().view(Array) for key, values in batch.items()}


class Array(np.ndarray):
    """An array with the methods of a TensorFlow tensor that user code calls."""

    def numpy(self) -> np.ndarray:
        """A plain array of the same memory."""
        return np.asarray(self)

    _numpy = numpy


def crop_resize(image: Image, resolution: int) -> Image:
    """The central square of an image (h, w, C), resized (bicubic): (resolution, resolution, C).

    Grey levels are in 0 ... 255; the result is uint8, truncated as in the published code.
    """
    side = min(image.shape[:2])
    square = center_crop(_channels_first(image), side, side)
    return _like(image, resize(square, resolution, resolution, "bicubic").byte())


def resize_small(image: Image, resolution: int) -> Image:
    """An image (h, w, C) whose shorter side is resized to `resolution`; float32."""
    return _like(image, shrink(_channels_first(image), resolution))


def central_crop(image: Image, size: int) -> Image:
    """The middle of an image (h, w, C): (size, size, C)."""
    return _like(image, center_crop(_channels_first(image), size, size))


def _channels_first(image: Image) -> Tensor:
    return torch.as_tensor(image).movedim(-1, 0)[None]


def _like(image: Image, result: Tensor) -> Image:
    """(1, C, h, w) as an image of the kind of another."""
    result = result[0].movedim(0, -1).contiguous()
    return result if isinstance(image, Tensor) else result.numpy()
