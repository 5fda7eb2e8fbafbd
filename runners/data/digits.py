"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that needs no download.

The images are in the order in which they were collected from 13 writers. The split is fixed and stratified by digit:
1,297 images for training and 500 for testing. Both parts contain every writer, as is usual for this data set.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from runners.config import PUBLISHED, DatasetConfig
from runners.errors import UserError

TEST_IMAGES = 500
INK_LEVELS = 16
"""A pixel of an image is the number of inked pixels in a 4 x 4 block: 0 to 16."""


def read(config: DatasetConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read the digits.

    Args:
        config: `version` is published; the data set has no other options.

    Returns:
        Training (1,297) and test set (500): images uint8 [N, 1, 8, 8] from 0 to 255, labels int64 [N].

    Raises:
        UserError: another version is wanted.
    """
    if config.version != PUBLISHED:
        raise UserError(
            f"dataset.version={config.version}: the digits are scikit-learn's, and there is no other version"
        )
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / INK_LEVELS)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    # A fixed split: the seed of a run does not change its test images.
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])
