"""Everything that is written to disk, whole or not at all, and everything read from it, untrusted.

- `files`: atomic writes; `arrays`: .npz without pickle; `lock`: one run per folder
- `checkpoints`, `records`, `fit`: training states, their verification and comparison; `writer`: in
  the background
- `logs`, `reports`, `pictures`: messages and numbers, tables, grids of images
"""
