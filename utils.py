"""Published names of the functions that save and restore checkpoints.

Behind this door: `score_lib.disk.checkpoints`.
"""

from score_lib.disk.checkpoints import restore_checkpoint, save_checkpoint
