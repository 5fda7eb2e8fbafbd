"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that needs no download.

The images are those of 13 writers, in the order they were collected. They are split once and for all, in equal parts of
every digit, 1,297 to train on and 500 to test on: both parts see every writer, as in the tables of the field.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from runners.config import DatasetConfig

TEST_IMAGES = 500
INK_LEVELS = 16
"""An image counts the inked pixels in 4 x 4 blocks: 0 to 16."""


def read(config: DatasetConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read the digits.

    Args:
        config: not looked at, for there is nothing to choose.

    Returns:
        Training (1,297) and test set (500): images uint8 [N, 1, 8, 8] from 0 to 255, labels int64 [N].
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / INK_LEVELS)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    # A split for good: the seed of a run moves its weights, not the images it is tested on.
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])
