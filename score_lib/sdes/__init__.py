"""Forward processes.  The door is `sde_lib`.

- `process`: the interface, and the time reversal
- `linear`: processes with a linear drift
- `published`: VE, VP and sub-VP; from a config to a process
"""
