"""Runs: a config in a folder.  The door is `run_lib`."""
