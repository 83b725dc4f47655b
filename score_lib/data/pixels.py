"""From stored values to grey levels of 0 to 255: bit depths, backgrounds, numbers of channels."""

import functools
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.data.sources import DataError, log_once

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Tags of TIFF 6.0, and values of them.
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _EXTRA, _SAMPLE_FORMAT = 258, 262, 277, 284, 338, 339
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2
# Tag of EXIF.
_ORIENTATION = 274


class Unsuited(DataError):
    """Whole images that the config gives no way to convert to 256 levels."""


class Pixels(NamedTuple):
    """How stored values are meant: the options of `data` with these names.

    Attributes:
        range: stored values of black and white; () where they are 0 and 255.
        background: colour behind transparent pixels; "" if there should be none.
        levels: number of grey levels of uint8; 0: 256.
    """

    range: tuple[float, ...] = ()
    background: str = ""
    levels: int = 0

    def check(self) -> "Pixels":
        """These options, if they are sound.

        Raises:
            DataError: names the option.
        """
        if self.range and (len(self.range) != 2 or self.range[0] == self.range[1]):
            raise DataError(
                f"data.range={tuple(self.range)} must be the stored values of black and of white, "
                f"such as (0, 4095)"
            )
        if self.range and self.fewer_levels:
            raise DataError(
                f"data.range={tuple(self.range)} scales stored values to 256 grey levels, but "
                f"data.levels={self.levels}: set data.levels=0, or leave data.range out if the "
                f"stored values are bytes of 0 to {self.levels - 1}"
            )
        if self.background:
            _color(self.background)
        return self

    @property
    def fewer_levels(self) -> bool:
        """Whether stored values are other than 256 grey levels."""
        return self.levels not in (0, 256)

    def bounds(self, dtype: np.dtype) -> tuple[float, float]:
        """The smallest and the largest value that is allowed."""
        if self.range:
            return min(self.range), max(self.range)
        return (0, 1) if np.issubdtype(dtype, np.floating) else (0, (self.levels or 256) - 1)

    def check_values(self, where: str, values: np.ndarray) -> None:
        """Refuse values that are out of bounds.

        Raises:
            Unsuited: names the first of them.
        """
        low, high = self.bounds(values.dtype)
        if values.dtype == np.uint8 and self.range and not (low >= 0 and high <= 255):
            raise Unsuited(
                f"{where} holds uint8, but data.range={tuple(self.range)} is meant for others: "
                f"black and white of uint8 are in 0 ... 255 (beside images of more bits, save it "
                f"with as many)"
            )
        # Negated, so that nan is outside.
        outside = ~((values >= low) & (values <= high))
        if outside.any():
            raise Unsuited(f"{where} holds {values[outside][0]}, {self._why_outside(values)}")

    def _why_outside(self, values: np.ndarray) -> str:
        if self.range:
            return (
                f"outside of data.range={tuple(self.range)}: set it to the stored values of black "
                f"and white; these {values.dtype.name} go from {values.min()} to {values.max()}"
            )
        if values.dtype == np.uint8:
            return f"but data.levels={self.levels} allows 0 to {self.levels - 1}"
        return (
            "but floats outside [0, 1] are not accepted as they are: set data.range to the stored "
            "values of black and white, such as data.range=-1,1"
        )

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Values in `range` as uint8."""
        black, white = self.range
        levels = (values.astype(np.float64) - black) * 255 / (white - black)
        return np.round(levels).astype(np.uint8)


def need_range(where: str, dtype: np.dtype, largest: float) -> Unsuited:
    """The error for values whose black and white are not known."""
    if np.issubdtype(dtype, np.floating):
        high = white = f"{largest:.6g}"
    else:  # white is often the largest number of as many bits
        high, white = int(largest), max(1, (1 << int(largest).bit_length()) - 1)
    return Unsuited(
        f"{where} holds {dtype.name} with values up to {high}, and which are black and white is "
        f"not known: set data.range to these two, for instance data.range=0,{white}"
    )


def to_bytes(image, where: str, channels: int, pixels: Pixels) -> Tensor:
    """A Pillow image as (1, C, h, w) uint8, turned upright.

    Args:
        image: as it was opened, not yet loaded.
        where: its name, for messages.
    Raises:
        Unsuited: its values or its transparency need an option that is not set.
    """
    from PIL import Image

    stored = _stored_mode(image)
    several_wide = _check_tiff(image, where, channels, pixels) > 8 or stored.endswith(";16B")
    _scale_transparent_level(image, stored)
    image = _upright(image)
    if is_deep(image):
        image = Image.fromarray(_scaled(image, where, pixels))
        pixels = pixels._replace(range=())
    elif several_wide:
        raise Unsuited(
            f"{where} has more than 8 bits in each of several channels, and Pillow reads only 8 of "
            f"them: save it with 8 bits, or save all images as an .npy and set data.range"
        )
    if channels != 4:
        image = _opaque(image, where, pixels.background)
    array = np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
    if channels == 4 and pixels.fewer_levels:
        raise Unsuited(
            f"{where} has an opacity of 256 levels, which does not go with data.levels="
            f"{pixels.levels}: save all images as an .npy of uint8, with an opacity of 0 to "
            f"{pixels.levels - 1}, or choose data.num_channels=3"
        )
    colors = array[..., :3]  # not the opacity
    if pixels.range or pixels.levels:
        pixels.check_values(where, colors)
    if pixels.range:
        colors[:] = pixels.scale(colors)
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def is_deep(image) -> bool:
    """Whether a Pillow image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def _scaled(image, where: str, pixels: Pixels) -> np.ndarray:
    """The uint8 levels (h, w) of an image of more than 8 bits."""
    values = np.asarray(image)
    if "transparency" in image.info:
        raise Unsuited(f"{where} has more than 8 bits and a transparent colour: save it with 8")
    if not pixels.range:
        raise need_range(where, values.dtype, values.max())
    pixels.check_values(where, values)
    log_once("images of more than 8 bits are rounded to 256 grey levels")
    return pixels.scale(values)


def _stored_mode(image) -> str:
    """Pillow's name for the layout of pixels in the file, such as "RGB;16B"; "" if unknown."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _scale_transparent_level(image, stored: str) -> None:
    """Scale the transparent level of a gray PNG as Pillow scales its pixels: from 2 or 4 bits."""
    most = {"L;2": 3, "L;4": 15}.get(stored)
    level = image.info.get("transparency")
    if most and level is not None and level <= most:
        image.info["transparency"] = level * (255 // most)


def _upright(image):
    """An image as its EXIF says that it is seen.

    `ImageOps.exif_transpose` writes the whole EXIF anew, and fails where an entry is odd.
    """
    from PIL.Image import Transpose

    image.load()
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(image.getexif().get(_ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _check_tiff(image, where: str, channels: int, pixels: Pixels) -> int:
    """The largest number of bits of a value in a TIFF file; 0 for other files.

    Raises:
        Unsuited: Pillow would read its values as others than it says they are.
    """
    if image.format != "TIFF":
        return 0
    if getattr(image, "n_frames", 1) > 1:
        log_once("of TIFF files with several pages the first is read")
    bits, kinds = (image.tag_v2.get(tag) or (1,) for tag in (_BITS, _SAMPLE_FORMAT))
    if max(bits) == 8 and _SIGNED in kinds:
        raise Unsuited(f"{where} holds signed values of 8 bits: save it with unsigned ones")
    if _is_misread(image):
        raise Unsuited(f"{where} is compressed in a way that Pillow misreads: save it uncompressed")
    samples, read = image.tag_v2.get(_SAMPLES, 1), len(image.getbands())
    if channels == 4 and image.mode in ("L", "RGB") and samples > read:
        raise Unsuited(
            f"{where} has {samples} values for each pixel, of which it calls none an opacity and "
            f"only {read} are read: set data.num_channels={read}, or save all images as an .npy"
        )
    falls = bool(pixels.range) and pixels.range[0] > pixels.range[1]
    if is_deep(image) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and not falls:
        raise Unsuited(
            f"{where} says that its smallest value is white: set data.range to the stored values "
            f"of black and white, such as data.range=65535,0"
        )
    return max(bits)


def _is_misread(image) -> bool:
    """Whether Pillow gives other values than a compressed TIFF file holds.

    It swaps the bytes of all but unsigned values of 16 bits though libtiff has swapped them, and
    takes the opacity for 0, or colours for weighted by it, where each channel is a plane.
    """
    if not image.tile or image.tile[0][0] != "libtiff":
        return False
    swapped = image.tag_v2.prefix == b"MM" and not _stored_mode(image).endswith("16N")
    planes = image.tag_v2.get(_PLANES) == _SEPARATE
    no_tag = image.mode == "RGBA" and _EXTRA not in image.tag_v2
    return (is_deep(image) and swapped) or (planes and (no_tag or image.mode == "LA"))


def _opaque(image, where: str, background: str):
    """The image in front of the background, if any of its pixels is transparent."""
    from PIL import Image

    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image
    if not background:
        raise Unsuited(
            f"{where} has transparent pixels, and data.background is '': set it to the colour "
            f"behind them, as in data.background=white, or keep the transparency with "
            f"data.num_channels=4"
        )
    behind = Image.new("RGBA", image.size, (*_color(background), 255))
    return Image.alpha_composite(behind, image)


@functools.cache
def _color(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour name or "#rrggbb"."""
    from PIL import ImageColor

    try:
        if not re.fullmatch(r"[A-Za-z]+|#[0-9a-fA-F]{6}", name):
            raise ValueError
        return ImageColor.getrgb(name)
    except ValueError as error:
        raise DataError(
            f"data.background={name!r} must be the name of a colour, such as white, or #rrggbb"
        ) from error
