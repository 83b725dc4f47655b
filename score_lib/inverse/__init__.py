"""Inverse problems, guidance and the latent space.  The door is `controllable_generation`.

- `operators`: the interface of linear measurements; `measurements`: those there are; `rescaled`:
  of data in other units
- `restoration`: constraints by a measurement; `equations`: its linear equations
- `conditions`: guidance by a classifier, sampling from noisy data
- `published`: samplers with the published signatures
- `latent`: encoding, decoding and interpolating along the probability flow
"""
