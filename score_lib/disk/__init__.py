"""Everything that is written to disk, whole or not at all, and everything read from it, untrusted.

- `files`: atomic writes, one run per folder; `arrays`: .npz without pickle
- `checkpoints`, `records`, `fit`: training states, their verification and comparison; `writer`: in
  the background
- `logs`, `reports`, `pictures`: messages and numbers, tables, grids of images; `drawings`: pictures
  of other samples
"""
