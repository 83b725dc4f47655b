"""NCSN, and NCSN with techniques of NCSNv2: 1 largest noise scale, 2 number of noise scales,
4 sampler settings that follow from them, 5 exponential moving average.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
