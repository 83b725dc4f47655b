"""Sampling: the reverse process from noise to data.  The door is `sampling`.

- `loop`: the one sampling loop, and the constraints on what it samples
- `steps`: the published predictors and correctors; `pc` puts them together; `accuracy`: whether
  a number of steps is enough
- `adaptive`: the probability flow by RK45, the reverse SDE with adaptive steps
- `solvers`: DDIM, Heun, DPM-Solver++; `grids`: the times that they visit
- `chain`: DDPM and DDIM on the integer steps of a discrete chain; `respacing`: which of them
- `configured`: from a config to a sampler
"""
