"""Everything that is written to disk or read from it: whole or not at all, and never trusted.

- `files`: atomic writes, arrays without pickle; `lock`: one run per folder
- `checkpoints`, `writer`: training states, written in the background
- `logs`, `reports`, `pictures`: messages and numbers, tables, grids of images
"""
