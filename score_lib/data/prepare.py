"""Get a public data set: its authors' files, or prepared by tensorflow-datasets.

    python -m score_lib.data.prepare NAME [FOLDER] [--tfds]

For fashion_mnist and mnist: puts the authors' files into FOLDER, by default data/NAME, where
`data.path` reads them: copied from where a package of the system has them, or downloaded.  Their
hashes are verified.

For other names in tensorflow-datasets, such as cifar10, svhn_cropped, celeb_a and
lsun/church_outdoor, or with --tfds: downloads the data set and prepares it for random access.  This
imports TensorFlow, so training runs it in a separate process.
"""

import argparse
import os
import pathlib

from score_lib.base.mistakes import brief_mistakes
from score_lib.data.archives import ADDRESSES
from score_lib.data.downloads import fetch
from score_lib.data.public import builder_of


@brief_mistakes()
def main() -> None:
    """Get the data set that the command line names; a mistake ends it with one message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name in tensorflow-datasets, such as cifar10")
    parser.add_argument("folder", nargs="?", help="folder for the data")
    parser.add_argument("--tfds", action="store_true", help="prepare it by tensorflow-datasets")
    options = parser.parse_args()
    if options.tfds or options.name.upper() not in ADDRESSES:
        prepare(options.name, options.folder)
        return
    folder = pathlib.Path(options.folder or f"data/{options.name}")
    fetch(options.name.upper(), folder)
    print(f"{options.name} is in {folder}, as published: --config.data.path={folder}")


def prepare(name: str, folder: str | None) -> None:
    """Download and prepare a data set of tensorflow-datasets; None is its own folder.

    Raises:
        DataError: tensorflow-datasets is missing, or has no such data set.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow would take all memory of the GPUs
    builder_of(name, folder or "", file_format="array_record").download_and_prepare()


if __name__ == "__main__":
    main()
