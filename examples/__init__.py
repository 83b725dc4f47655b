"""Runnable programs: `digits` trains, samples and evaluates on a CPU in minutes."""

from score_lib.base.threads import wait_without_spinning

wait_without_spinning()  # before a program imports PyTorch
