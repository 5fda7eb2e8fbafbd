"""Data sets: images stored on the training device as bytes, and augmented there in whole batches.

A data set fits the memory of the training device (CIFAR is 180 MB as uint8), so there are no worker processes: a batch
is an index into a tensor. The network's input for an image x is (Chakrabarti and Moseley 2019, section 4)

    x / 255 - mean(x / 255)        the mean over all pixels and channels of that image

In training it is then padded with zeros (the image's own mean), cropped to its original size and mirrored or not. Crop
and mirroring select rows and columns, so a whole batch takes one gather.

The only random part of a batch is a table of four integers per image: its number, first row, first column, and whether
it is mirrored. The host draws the table and the device makes the batch from it, so equal draws give equal batches on
every device. No generator state persists: the order of the images is a function of (seed, epoch), their augmentation
one of (seed, iteration), so a run can start at any iteration.

To add a data set, write a module with a `read` like those here, and a YAML file that names it.
"""

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.config import DatasetConfig
from runners.errors import UserError


@dataclass(frozen=True)
class Split:
    """The images of a training or of a test set."""

    images: Tensor
    """uint8 [N, C, H, W], on the training device, channels last in memory."""
    labels: Tensor
    """int64 [N], on the training device."""

    def draws(self, config: DatasetConfig, *, seed: int, start: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Draw the images in a random order, epoch after epoch; the last, partial batch of each epoch is dropped.

        Args:
            config: the recipe; `config.batch_size` is at most the number of images.
            seed: seed of order and augmentation.
            start: the iteration to begin at; the first one is 1.

        Yields:
            Iteration, up to and including `config.iterations`, and its draws, int64 [batch, 4] on the CPU. A row is the
            number of an image and its row from draw_crops.

        Raises:
            UserError: the augmentation is unknown.
        """
        batches_per_epoch = len(self.labels) // config.batch_size
        order = torch.empty(0)
        for iteration in range(start, config.iterations + 1):
            epoch, batch = divmod(iteration - 1, batches_per_epoch)
            if batch == 0 or iteration == start:
                order = torch.randperm(len(self.labels), generator=_generator("order", seed, epoch))
            chosen = order[batch * config.batch_size :][: config.batch_size]
            crops = draw_crops(len(chosen), config, generator=_generator("augmentation", seed, iteration))
            yield iteration, torch.cat([chosen[:, None], crops], dim=1)

    def batch(self, draws: Tensor, config: DatasetConfig) -> tuple[Tensor, Tensor]:
        """Make a batch from its draws, without waiting for the device.

        Args:
            draws: as `draws` yields them, on the training device.
            config: the recipe.

        Returns:
            Images (float32 [batch, C, H, W], normalised and augmented, channels last) and labels (int64 [batch]).
        """
        chosen = draws[:, 0]
        return crop(normalise(self.images[chosen]), draws[:, 1:], config), self.labels[chosen]


@dataclass(frozen=True)
class ImageData:
    """A data set."""

    train: Split
    test: Split


def load(config: DatasetConfig, device: torch.device) -> ImageData:
    """Read a data set and copy it to the training device.

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
    train, test = reader.read(config)
    for images, labels in (train, test):
        if (images.dtype, labels.dtype) != (torch.uint8, torch.int64) or labels.shape != images.shape[:1]:
            raise UserError(f"dataset.reader={config.reader}: images are uint8 [N, C, H, W], and labels int64 [N]")
        if not len(labels) or labels.min() < 0:
            raise UserError(f"dataset.reader={config.reader}: there are no images, or labels below 0")
        _, channels, *size = images.shape
        found = {"image_channels": channels, "image_size": max(size), "classes": int(labels.max()) + 1}
        for key, value in found.items():
            if getattr(config, key) != value:
                raise UserError(f"dataset.{key}={getattr(config, key)}: {config.name} has {value}")
    if config.batch_size > len(train[1]):
        raise UserError(f"dataset.batch_size={config.batch_size}: the training set has {len(train[1])} images")
    return ImageData(_on(device, *train), _on(device, *test))


def _on(device: torch.device, images: Tensor, labels: Tensor) -> Split:
    return Split(images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device))


def _generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """Make a generator seeded by the first 8 bytes of the sha256 of "purpose seed index": independent of all others."""
    digest = hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: below 2 ** 63


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
