"""Images of every kind as batches of tensors, in an order that can be resumed exactly.

A *source* gives examples by number, as uint8, the same ones on every call (`datasets.sources`).
A *stream* turns a source into shuffled, flipped, dequantised batches (`datasets.stream`).
`get_dataset` builds both from a config.  `read_inputs` and `read_mask` read what a user hands in
for editing.
"""

from score_lib.data import digits, images, public, tfrecords  # noqa: F401  (they register)
from score_lib.data.inputs import Inputs, read_inputs, read_mask
from score_lib.data.loading import (
    DatasetInfo,
    get_data_inverse_scaler,
    get_data_scaler,
    get_dataset,
)
from score_lib.data.sources import DataError, MemorySource, Source, Subset, register_dataset
from score_lib.data.stream import ImageStream

__all__ = [
    "DataError",
    "DatasetInfo",
    "ImageStream",
    "Inputs",
    "MemorySource",
    "Source",
    "Subset",
    "get_data_inverse_scaler",
    "get_data_scaler",
    "get_dataset",
    "read_inputs",
    "read_mask",
    "register_dataset",
]
