"""Runnable programs: `digits` trains, samples and evaluates on a CPU in minutes."""

from score_lib.base.threads import choose_waiting

choose_waiting()  # before a program imports PyTorch
