"""Score networks and classifiers, their layers, and the moving average of their weights.

Importing the package registers the networks: `models.utils.get_model(name)` gives their classes.
"""

from . import adm_configured, ddpm, mlp, ncsnpp, ncsnv2, set_transformer, wideresnet
