"""The rooms behind the doors at the top level.  Imports point down this list only:

- `runs`: modes of `main.py`, which join everything below
- `checks`: of processes, samplers and likelihoods
- `inverse`: constraints on samples, and the latent space; `dequantization`: noise of grey levels
- `samplers`, `losses`, `likelihood`, `elbo`, `vlb`: the methods; `exchange`: files of other
  libraries; beside them `data` and `metrics`, leaf tools
- `sdes`, and the packages `models` and `op`: processes and networks; `scores` and
  `parametrization` join the two
- `options`, with `option_table`, `option_kinds`, `option_conflicts`: every option of a config;
  `disk`: files; `base`: tools
"""
