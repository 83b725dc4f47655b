"""The published networks of guided diffusion (ADM) and of improved diffusion."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
