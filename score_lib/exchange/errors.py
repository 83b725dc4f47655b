"""The error of files of other libraries."""

from score_lib.disk.fit import CheckpointError


class ExchangeError(CheckpointError):
    """A model of another library cannot be read, or one of ours not be written for it.

    The message is one sentence that says why.
    """
