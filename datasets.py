"""Data sets of every kind as batches of tensors, in an order that can be resumed exactly.

Behind this door: `score_lib.data`.
"""

from score_lib.data.loading import (
    DatasetInfo,
    Inputs,
    get_data_inverse_scaler,
    get_data_scaler,
    get_dataset,
    read_inputs,
    read_mask,
)
from score_lib.data.sources import DataError, MemorySource, Source, Subset, register_dataset
from score_lib.data.stream import ImageStream
