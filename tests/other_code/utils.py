"""The project's own module of this name, which comes first on the path."""

import argparse

from score_lib.disk.checkpoints import restore_checkpoint, save_checkpoint  # noqa: F401


def as_namespace(options):
    """Nested dictionaries as nested namespaces."""
    converted = {k: as_namespace(v) if isinstance(v, dict) else v for k, v in options.items()}
    return argparse.Namespace(**converted)
