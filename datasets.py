"""Data sets of every kind as batches of tensors, in an order that can be resumed exactly.

Behind this door: `score_lib.data`.
"""

from score_lib.data.inputs import Inputs, read_inputs, read_mask
from score_lib.data.loading import (
    DatasetInfo,
    get_data_inverse_scaler,
    get_data_scaler,
    get_streams,
)
from score_lib.data.published import central_crop, crop_resize, get_dataset, resize_small
from score_lib.data.sources import DataError, MemorySource, Source, Subset, register_dataset
from score_lib.data.stream import ImageStream
