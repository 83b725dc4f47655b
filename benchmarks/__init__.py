"""Measurements: time as a ratio to something measured in the same process."""

from score_lib.base.threads import wait_without_spinning

wait_without_spinning()  # before a benchmark imports PyTorch
