"""Experiments with the variance-exploding SDE."""
