"""Training, evaluation, sampling, control and statistics: what `main.py` runs.

Behind this door: `score_lib.runs`.
"""

from score_lib.runs.control import control
from score_lib.runs.modes import evaluate, fid_stats, sample, train
from score_lib.runs.setup import Run, restored, setup

__all__ = ["Run", "control", "evaluate", "fid_stats", "restored", "sample", "setup", "train"]
