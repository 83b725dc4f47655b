"""Score networks and classifiers, their layers, and the moving average of their weights.

`models.utils.get_model(name)` gives a network class by its registered name; the modules that define
networks are imported when one is first asked for.
"""
