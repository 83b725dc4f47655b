"""Sampling: the reverse process from noise to data.  The door is `sampling`.

- `loop`: the one sampling loop, from pair of times to pair of times
- `predictors`, `correctors`: the published steps; `pc` puts them together
- `accuracy`: whether a number of steps is enough
- `ode`: the probability flow by RK45; `adaptive`: the reverse SDE with adaptive steps
- `solvers`: DDIM, Heun, DPM-Solver++; `grids`: the times that they visit
- `constraints`: the interface of inverse problems and guidance
- `configured`: from a config to a sampler
"""
