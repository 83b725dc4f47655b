"""Runs: a config in a folder.  The door is `run_lib`.

- `setup`: the objects that a config describes, and the one way to draw samples
- `train`, `samples`, `evaluate`, `statistics`, `control`: one mode of `main.py` each
- `rounds`, `measures`, `heldout`: an evaluation's files, its figures, its data
"""
