"""Experiments: `ve/`, `vp/`, `subvp/`, `edm/` and `adm/` hold one file each, of `data` and `parts`.

A folder `configs` of yours elsewhere on the path holds further ones: `configs/ve/mine.py` there is
`configs.ve.mine`.  If it comes first and has an `__init__.py`, that file needs the lines below.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
