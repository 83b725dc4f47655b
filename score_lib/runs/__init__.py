"""Runs: a config in a folder.  The door is `run_lib`.

- `setup`: the objects that a config describes, and the one way to draw samples; `trained`: with
  trained weights; `start`: weights to begin with
- `conditions`, `units`: what a network is told, and the unit of its likelihoods
- `train`, `samples`, `evaluate`, `control`, `statistics`, `check`, `reproduce`, `export`,
  `dequantizer`: one mode of `main.py` each
- `averages`, `history`, `quality`: of training: averaged weights, changes of the config, figures;
  `courses`, `examples`: checkpoints of other courses, records of the data
- `rounds`, `measures`, `accuracy`, `comparisons`, `heldout`: an evaluation's files, figures, data;
  `refusals`: told before its work; `published`, `nearest`: figures of the paper, and the
  experiment that a config is nearest to
- `trial`, `estimates`: of a check: what steps cost, and so the whole run
- `tasks`, `image_tasks`, `latent_tasks`: of control; `publish`, `cards`: of an export
"""
