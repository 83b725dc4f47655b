"""Experiments trained as in EDM (Karras et al. 2022)."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
