"""Measurements: time as a ratio to something measured in the same process."""
