"""Training, evaluation, sampling, control, exports, statistics, checks: the modes of `main.py`.

Behind this door: `score_lib.runs`.
"""

from score_lib.runs.check import check
from score_lib.runs.control import control
from score_lib.runs.dequantizer import train_dequantizer
from score_lib.runs.evaluate import evaluate
from score_lib.runs.export import write_averages
from score_lib.runs.publish import export
from score_lib.runs.reproduce import reproduce
from score_lib.runs.samples import sample
from score_lib.runs.setup import Run, setup
from score_lib.runs.statistics import fid_stats
from score_lib.runs.train import train
from score_lib.runs.trained import from_checkpoint, restored
