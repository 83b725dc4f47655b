"""Download a public data set and prepare it for random access.

    python -m score_lib.data.prepare NAME [FOLDER]

NAME is the name in tensorflow-datasets: cifar10, svhn_cropped, celeb_a, lsun/church_outdoor.
This imports TensorFlow, so training runs it in a separate process.
"""

import argparse
import os


def main() -> None:
    """Download and prepare the data set that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name in tensorflow-datasets, such as cifar10")
    parser.add_argument("folder", nargs="?", help="its data directory (default: its own)")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow would take all memory of the GPUs
    import tensorflow_datasets as tfds

    builder = tfds.builder(options.name, data_dir=options.folder, file_format="array_record")
    builder.download_and_prepare()


if __name__ == "__main__":
    main()
