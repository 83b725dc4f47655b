"""Inverse problems, guidance and the latent space.  The door is `controllable_generation`."""
