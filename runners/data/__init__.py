"""Data sets: tables of draws on the host, from which the training device makes batches.

A data set that fits the memory of the training device is stored there as bytes (CIFAR is 180 MB), so there are no
worker processes: a batch is an index into a tensor. One of image files is decoded by worker processes (image_files.py).
The rest of this file is about data sets in memory. The network's input for an image x is (Chakrabarti and Moseley 2019,
section 4)

    x / 255 - mean(x / 255)        the mean over all pixels and channels of that image

In training it is then padded with zeros (the image's own mean), cropped to its original size and mirrored or not. Crop
and mirroring select rows and columns, so a whole batch takes one gather.

The only random part of a batch is a table of four integers per image: its number, first row, first column, and whether
it is mirrored. The host draws the table and the device makes the batch from it, so equal draws give equal batches on
every device. No generator state persists: the order of the images is a function of (seed, epoch), their augmentation
one of (seed, iteration), so a run can start at any iteration.

To add a data set, write a module with a `read` like those here, and a YAML file that names it.
"""

import importlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.config import DatasetConfig
from runners.data.drawing import chosen, make_generator
from runners.errors import UserError

ALL = slice(None)


class Images(Protocol):
    """A training or a test set, wherever its images are."""

    def __len__(self) -> int:
        """Return the number of images."""

    def to(self, device: torch.device) -> "Images":
        """Return the set for a training device."""

    def inputs(
        self, config: DatasetConfig, *, seed: int, start: int = 1, rows: slice = ALL
    ) -> Generator[tuple[int, tuple[Tensor, ...]]]:
        """Draw the images in a random order, epoch after epoch; the last, partial batch of each epoch is dropped.

        Args:
            config: the recipe; `config.batch_size` is at most the number of images.
            seed: seed of order and augmentation.
            start: the iteration to begin at; the first one is 1.
            rows: those of each batch that this process trains on; the draws are the same whichever they are.

        Yields:
            Iteration, up to and including `config.iterations`, and what `batch` makes its batch from: tensors on the
            CPU whose first dimension is the image, of the same shapes and types in every iteration. They are valid
            until the next but one are asked for.

        Raises:
            UserError: the augmentation is unknown, or an image cannot be read.
        """

    def batch(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[Tensor, Tensor]:
        """Make a batch on the training device, without waiting for it.

        Args:
            inputs: as `inputs` yields them, or the same rows of all of them, on the training device.
            config: the recipe.

        Returns:
            Images (float32 [batch, C, H, W], normalised and augmented, channels last) and labels (int64 [batch]).
        """

    def batches(self, config: DatasetConfig, *, is_final: bool, which: slice = ALL) -> Generator[tuple[Tensor, ...]]:
        """Yield what `views` makes images from, `config.eval_batch_size` images at a time; the last may be fewer.

        Args:
            config: the recipe.
            is_final: whether the evaluation is the last one of a training, which may be more thorough.
            which: the batches that this process evaluates.
        """

    def views(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[list[Tensor], Tensor]:
        """Make the views of some images; an evaluation takes the mean of their logits.

        Args:
            inputs: as `batches` yields them, on the training device.
            config: the recipe.

        Returns:
            Views, each float32 [batch, C, H, W], normalised and channels last; and labels, int64 [batch].
        """

    @property
    def seconds_waited(self) -> float | None:
        """Seconds for which this process has waited for images; None where they are on the device."""

    @property
    def listing(self) -> str | None:
        """What tells the list of images from any other; None where the configuration does."""


@dataclass(frozen=True)
class Split:
    """The images of a training or of a test set, in memory; its methods are those of Images."""

    images: Tensor
    """uint8 [N, C, H, W], on the training device, channels last in memory."""
    labels: Tensor
    """int64 [N], on the training device."""

    seconds_waited = None
    listing = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """Copy the images to a device."""
        return Split(self.images.contiguous(memory_format=torch.channels_last).to(device), self.labels.to(device))

    def inputs(
        self, config: DatasetConfig, *, seed: int, start: int = 1, rows: slice = ALL
    ) -> Generator[tuple[int, tuple[Tensor, ...]]]:
        """Draw the training images: one tensor, int64 [batch, 4], an image's number and its row from draw_crops."""
        for iteration, images in chosen(len(self), config, seed=seed, start=start):
            crops = draw_crops(len(images), config, generator=make_generator("augmentation", seed, iteration))
            yield iteration, (torch.cat([images[:, None], crops], dim=1)[rows],)

    def batch(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[Tensor, Tensor]:
        """Make a batch of training images."""
        (draws,) = inputs
        images = draws[:, 0]
        return crop(normalise(self.images[images]), draws[:, 1:], config), self.labels[images]

    def batches(self, config: DatasetConfig, *, is_final: bool, which: slice = ALL) -> Generator[tuple[Tensor, ...]]:
        """Yield images and labels, in order; the last evaluation of a training is like any other."""
        size = config.eval_batch_size
        yield from zip(self.images.split(size)[which], self.labels.split(size)[which], strict=True)

    def views(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[list[Tensor], Tensor]:
        """Return the images themselves, normalised, as the only view."""
        images, labels = inputs
        return [normalise(images)], labels


@dataclass(frozen=True)
class ImageData:
    """A data set."""

    train: Images
    test: Images


def load(config: DatasetConfig, device: torch.device) -> ImageData:
    """Read a data set, for a training device.

    Args:
        config: the reader, the folder, and the expected number and size of images and classes.
        device: the training device.

    Raises:
        UserError: there is no such reader; the data set is missing or damaged; its images do not match `config`, or
            are fewer than a batch.
    """
    try:
        reader = importlib.import_module(config.reader)
    except (ImportError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"dataset.reader={config.reader}: cannot be imported ({error})") from error
    if not hasattr(reader, "read"):
        raise UserError(f"dataset.reader={config.reader}: the module has no read(config)")
    found = reader.read(config)
    data = found if isinstance(found, ImageData) else _in_memory(found, config)
    if config.batch_size > len(data.train):
        raise UserError(f"dataset.batch_size={config.batch_size}: the training set has {len(data.train)} images")
    return ImageData(data.train.to(device), data.test.to(device))


def _in_memory(found: Any, config: DatasetConfig) -> ImageData:
    """Check the images that a reader has returned: ((images, labels), (images, labels)) for training and test."""
    if config.train_sides is not None:
        raise UserError(f"dataset.train_sides={config.train_sides}: {config.reader} reads no image files")
    for images, labels in found:
        if (images.dtype, labels.dtype) != (torch.uint8, torch.int64) or labels.shape != images.shape[:1]:
            raise UserError(f"dataset.reader={config.reader}: images are uint8 [N, C, H, W], and labels int64 [N]")
        if not len(labels) or labels.min() < 0:
            raise UserError(f"dataset.reader={config.reader}: there are no images, or labels below 0")
        _, channels, *size = images.shape
        expected = {"image_channels": channels, "image_size": max(size), "classes": int(labels.max()) + 1}
        for key, value in expected.items():
            if getattr(config, key) != value:
                raise UserError(f"dataset.{key}={getattr(config, key)}: {config.name} has {value}")
    train, test = (Split(*images_and_labels) for images_and_labels in found)
    return ImageData(train, test)


def normalise(images: Tensor) -> Tensor:
    """Normalise bytes to the network's input: x / 255, minus the mean of each image.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        float32 [N, C, H, W], channels last in memory.
    """
    scaled = images.to(torch.float32, memory_format=torch.channels_last) / 255
    return scaled - scaled.mean(dim=(1, 2, 3), keepdim=True)


def draw_crops(count: int, config: DatasetConfig, *, generator: torch.Generator) -> Tensor:
    """Draw the crop of each zero-padded image, and whether it is mirrored.

    Args:
        count: number of images.
        config: `augmentation` per-image draws for each image; per-batch, as in the authors' code, draws one crop for
            the whole batch and always mirrors its first half; none changes no image. `crop_padding` is in pixels;
            `flip` false never mirrors.
        generator: a CPU generator, so that the draws do not depend on the device.

    Returns:
        int64 [count, 3]: first row and column in the padded image, and 1 where it is mirrored.

    Raises:
        UserError: the augmentation is unknown.

    Source: Chakrabarti and Moseley 2019, section 4; He et al. 2016 for the padding and the crop.
    """
    corners = 2 * config.crop_padding + 1
    if config.augmentation == "none":
        return torch.tensor([[config.crop_padding, config.crop_padding, 0]]).expand(count, 3)
    if config.augmentation == "per-image":
        corner = torch.randint(corners, (2, count), generator=generator)
        mirrored = torch.randint(2, (count,), generator=generator)
    elif config.augmentation == "per-batch":
        corner = torch.randint(corners, (2, 1), generator=generator).expand(2, count)
        mirrored = (torch.arange(count) < count // 2).long()
    else:
        raise UserError(f"dataset.augmentation={config.augmentation}: it is one of per-image, per-batch, none")
    return torch.stack([*corner, mirrored * config.flip], dim=1)


def crop(images: Tensor, crops: Tensor, config: DatasetConfig) -> Tensor:
    """Pad each image with zeros, crop it to its original size, and mirror some.

    Args:
        images: float32 [N, C, H, W], normalised.
        crops: their rows from draw_crops, on the same device.
        config: `crop_padding`, in pixels.

    Returns:
        float32 [N, C, H, W], channels last in memory.
    """
    batch, _, height, width = images.shape
    device = images.device
    row, column, mirrored = crops[:, :, None].unbind(1)
    across = torch.arange(width, device=device)
    rows = row + torch.arange(height, device=device)
    columns = column + torch.where(mirrored == 1, across.flip(0), across)
    image = torch.arange(batch, device=device)
    padded = F.pad(images, [config.crop_padding] * 4)
    # Indices on both sides of a slice put the sliced dimension last: [N, H, W, C], which is channels last already.
    cropped = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
