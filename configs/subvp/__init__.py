"""Experiments with the sub-VP SDE."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
