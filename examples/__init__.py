"""Runnable programs: `digits` trains, samples and evaluates on a CPU in minutes."""
