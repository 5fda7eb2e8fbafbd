"""Small data sets of image files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from support import make

from runners.config import DatasetConfig

TRAIN, VAL = {"cat": 5, "ant": 4, "bee": 3}, {"ant": 2, "bee": 2, "cat": 3}
"""Images of each class; the label of a class is its place among the sorted names."""


def image(number: int, width: int = 15, height: int = 12) -> Image.Image:
    """An image with neighbouring pixels alike, as in photographs, unlike those of other numbers."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write(file: Path, number: int) -> None:
    """Write an image; each second one is upright."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image(number, *((15, 12) if number % 2 else (10, 14))).save(file)


def write_folders(root: Path, train: Mapping[str, int] = TRAIN, val: Mapping[str, int] = VAL) -> Path:
    """Write class folders, and return the root."""
    number = 0
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            for file in range(count):
                write(root / split / name / f"{name}_{file}.png", number)
                number += 1
    return root


def config(folder: Path, **values: Any) -> DatasetConfig:
    """A data set of crops of 8x8 from short sides of 9 to 12."""
    recipe: dict[str, Any] = {
        "name": "imagenet",
        "reader": "runners.data.imagenet",
        "root": str(folder),
        "classes": 3,
        "image_channels": 3,
        "crop_padding": 0,
        "flip": True,
        "train_sides": [9, 12],
        "colour": True,
        "check_side": 10,
        "check_images": 4,
        "test_side": 9,
        "test_crops": 10,
        "decoder": "pillow",
        "workers": 0,
        "batch_size": 5,
        "eval_batch_size": 3,
        "iterations": 7,
        "schedule": [[1.0, 0.1]],
    }
    found = make().dataset
    for key, value in {**recipe, **values}.items():
        assert hasattr(found, key), key
        setattr(found, key, value)
    return found
