"""ImageNet (Russakovsky et al. 2015), and any other data set of image files in class folders.

The files are not downloaded: image-net.org gives ImageNet to those who ask. Layouts: runners/image_files/listing.py.
"""

import sys
from pathlib import Path

from runners.config import PUBLISHED, DatasetConfig
from runners.data import ImageData
from runners.data.image_files import ImageFiles
from runners.errors import UserError
from runners.image_files import decoding, listing
from runners.image_files.workers import Workers, usual_workers

PUBLISHED_CLASSES, PUBLISHED_IMAGES = 1000, (1_281_167, 50_000)
"""Of ImageNet, the training and the test set; those that its challenge calls validation images are the test set."""


def read(config: DatasetConfig) -> ImageData:
    """List the images of a data set in files; a number of ImageNet's images other than the published one is printed.

    Args:
        config: `root`, where the files lie; `classes`, of which fewer than there are take the first ones; `workers`
            and `decoder`. `version` is published, or the name of the user's own files, whose number is not printed.

    Raises:
        UserError: there is no such data set, or the decoder is not installed.
    """
    if config.train_sides is None:
        raise UserError("dataset.train_sides=null: a data set of image files gives it; `defaults: [imagenet]` does")
    decoding.check_decoder(str(config.decoder))
    try:
        found = listing.find(Path(config.root), config.classes)
    except UserError as error:
        raise UserError(f"dataset.root={config.root}: {error}") from error.__cause__
    counts = tuple(len(files.paths) for files in found)
    published = ("imagenet", PUBLISHED, PUBLISHED_CLASSES)
    if (config.name, config.version, config.classes) == published and counts != PUBLISHED_IMAGES:
        line = "imagenet: {:,} training and {:,} test images; {:,} and {:,} were published"
        print(line.format(*counts, *PUBLISHED_IMAGES), file=sys.stderr)
    workers = Workers(usual_workers() if config.workers is None else config.workers)
    train, test = (ImageFiles(files, workers) for files in found)
    return ImageData(train, test)
