"""Everything that is written to disk, whole or not at all, and everything read from it, untrusted.

- `files`: atomic writes, one run per folder; `arrays`: .npz without pickle
- `checkpoints`, `records`, `fit`: training states, their verification and comparison; `writer`: in
  the background; `snapshots`: averages beside them
- `weights_files`: weights to start from, in any layout; `safetensors_files`: one of these
- `logs`, `reports`, `pictures`: messages and numbers, tables, grids of images; `drawings`: pictures
  of other samples; `wandb_log`: Weights & Biases
"""
