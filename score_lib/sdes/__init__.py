"""Forward processes.  The door is `sde_lib`.

- `process`: the interface, the time reversal, and processes with a linear drift
- `coefficients`: those of time alone, from methods that map data
- `published`: VE, VP and sub-VP; from a config to a process
- `chain`: the discrete chain as Gaussians
- `tables`: those that a process makes when they are first looked up
- `snr`: noise levels whatever the scale, and their times
- `foreign`: processes written for the published code
- `times`: times of training from tables, by their density or their noise level
"""
