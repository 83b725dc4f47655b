"""NCSNv2: all its techniques together."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
