"""Crops and resizing, against TensorFlow's."""

import numpy as np
import pytest
import torch
from dataset_helpers import random_images, smooth_image

import datasets
from score_lib.data import preprocess


def batch_of(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def test_center_crop_takes_the_middle():
    image = torch.arange(7 * 9).reshape(1, 1, 7, 9)
    assert torch.equal(preprocess.center_crop(image, 4, 4), image[..., 1:5, 2:6])


def test_constant_images_stay_constant():
    image = torch.full((1, 3, 218, 178), 77, dtype=torch.uint8)
    for result in (
        preprocess.celeba(image, 64),
        preprocess.lsun(image, 128),
        preprocess.fit(image, 32, 48),
    ):
        assert (result == 77).all()
    # Truncation may reduce the value by one level, as in TensorFlow.
    assert preprocess.lsun(image, 64).unique().tolist() in ([77], [76, 77])


def test_lsun_at_its_own_size_is_only_cropped():
    image = batch_of(smooth_image(256, 341))
    assert torch.equal(preprocess.lsun(image, 256), image[..., 42:298])


def test_fit_crops_to_the_aspect_ratio():
    image = torch.zeros(1, 1, 60, 100, dtype=torch.uint8)
    image[..., 30:70] = 200  # the part that a ratio of 3 : 2, height to width, keeps
    assert (preprocess.fit(image, 6, 4) == 200).all()
    assert preprocess.fit(image.mT, 4, 6).shape == (1, 1, 4, 6)
    assert preprocess.fit(image, 60, 100) is image


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
def test_celeba_equals_tensorflow(tf, size):
    image = smooth_image(218, 178)
    cropped = image[39:179, 19:159]
    expected = tf.image.resize(cropped, (size, size), antialias=True).numpy()
    found = preprocess.celeba(batch_of(image), size)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 0.501  # only the rounding differs


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(256, 341), (500, 256), (300, 451), (256, 256)])
def test_lsun_at_128_equals_tensorflow(tf, height, width):
    image = smooth_image(height, width)
    short = min(height, width)
    shape = [int(tf.round(side * 128 / short)) for side in (height, width)]
    shrunk = tf.image.resize(image, shape, antialias=True).numpy()
    top, left = ((side - 128) // 2 for side in shape)
    expected = shrunk[top : top + 128, left : left + 128]
    found = preprocess.lsun(batch_of(image), 128)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 0.501


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(256, 341), (375, 500), (257, 256)])
@pytest.mark.parametrize("size", [64, 256])
def test_lsun_equals_tensorflow(tf, height, width, size):
    image = smooth_image(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    expected = tf.image.resize(square, (size, size), method="bicubic", antialias=True)
    expected = tf.cast(tf.clip_by_value(expected, 0, 255), tf.uint8).numpy().astype(int)
    found = preprocess.lsun(batch_of(image), size)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


@pytest.mark.slow
def test_float_images_equal_tensorflow(tf):
    image = random_images(16, 16, 3)
    source = datasets.MemorySource(batch_of(image))
    (batch,) = datasets.ImageStream(source, 1, evaluation=True)
    expected = tf.image.convert_image_dtype(image, tf.float32).numpy()
    found = batch["image"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-7)
