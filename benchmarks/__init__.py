"""Measurements: time as a ratio to something measured in the same process."""

from score_lib.base.threads import choose_waiting

choose_waiting()  # before a benchmark imports PyTorch
