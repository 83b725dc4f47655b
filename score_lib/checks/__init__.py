"""Checks of processes, samplers and likelihoods against exact answers.  The door is `checks`.

- `finding`: the result of a check
- `exact`: distributions whose scores are known at all times
- `process`: a process and its conventions
- `sampling`: samplers, correctors, and methods of restoration
- `likelihood`: log-likelihoods
- `network`: the cost of a network
"""
