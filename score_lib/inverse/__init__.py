"""Inverse problems, guidance and the latent space.  The door is `controllable_generation`.

- `operators`: linear measurements; `separable`, `masks`: those there are
- `measured`: constraints by a measurement; `consistency`, `posterior`: methods
- `classes`: guidance by a classifier; `editing`: sampling from noisy data
- `published`: samplers with the published signatures
- `configured`: from a config to an operator or a method
- `latent`: encoding, decoding and interpolating along the probability flow
"""
