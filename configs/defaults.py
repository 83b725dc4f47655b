"""The values that every experiment starts from, and all experiments by name."""

import importlib
import pathlib

from ml_collections import ConfigDict

from score_lib.options import complete

FOLDERS = ("ve", "vp", "subvp", "edm", "adm")


def base() -> ConfigDict:
    """Every option that has a default, at its default."""
    return complete({})


def experiments() -> list[str]:
    """Names of all experiments, such as "ve/cifar10_ncsnpp_continuous"."""
    root = pathlib.Path(__file__).parent
    files = [file for folder in FOLDERS for file in (root / folder).rglob("*.py")]
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    return sorted(name for name in names if not name.endswith("/__init__"))


def load(name: str) -> ConfigDict:
    """The config of an experiment, by its name as in `experiments`."""
    return importlib.import_module("configs." + name.replace("/", ".")).get_config()
