"""The rooms behind the doors at the top level.  Imports point down this list only:

- `runs`: modes of `main.py`, which join everything below
- `inverse`: constraints on samples, and the latent space
- `samplers`, `losses`, `likelihood`: the methods; beside them `data` and `metrics`, leaf tools
- `sdes`, and the packages `models` and `op`: processes and networks; `scores` and
  `parametrization` join the two
- `options`: every option of a config; `disk`: files; `base`: tools
"""
