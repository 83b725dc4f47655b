"""The networks of DDPM, as in its paper."""
