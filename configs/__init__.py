"""Experiments: `ve/`, `vp/` and `subvp/` hold one file each, composed from `data` and `parts`."""
