"""Images held on the training device as bytes, and augmented there in whole batches.

A data set is small enough to live where it is used (CIFAR is 180 MB as uint8), so there are no worker processes: a
batch is an index into a tensor. What the network is given of an image x is, as METHOD.md section 5 says,

    x / 255 - mean(x / 255)        the mean over all pixels and channels of that image

then, in training, padded with zeros (the image's own mean, that is), cropped to its size again and mirrored or not.
Crop and mirroring are nothing but a choice of rows and of columns, so a whole batch takes one gather.

No generator lives longer than it is used: the order of the images is a function of (seed, epoch), their augmentation
one of (seed, iteration), so that a run can start at any iteration.

Adding a data set: a file here with a `read` like the others, a line in `load`, and a YAML.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blpa.config import DatasetConfig


@dataclass(frozen=True)
class Split:
    """The images of a training or of a test set."""

    images: Tensor
    """uint8 [N, C, H, W], on the training device, channels last in memory."""
    labels: Tensor
    """int64 [N], on the training device."""


@dataclass(frozen=True)
class ImageData:
    """A data set."""

    train: Split
    test: Split


def load(config: DatasetConfig, device: torch.device) -> ImageData:
    """Read a data set and put it on the training device.

    Args:
        config: which one, where it lies, and what it is expected to look like.
        device: where the images are to be held.

    Raises:
        ValueError: no such data set; a folder that lacks it, or holds it damaged; images other than `config` says, or
            fewer than a batch.
    """
    if config.name in ("cifar10", "cifar100"):
        from blpa.data import cifar

        train, test = cifar.read(config.name, config.root, download=config.download)
    elif config.name == "digits":
        from blpa.data import digits

        train, test = digits.read()
    else:
        raise ValueError(f"dataset.name={config.name}: no such data set; it is one of cifar10, cifar100, digits")

    for images, labels in (train, test):
        found = {"image_channels": images.shape[1], "image_size": images.shape[2], "classes": int(labels.max()) + 1}
        for key, value in found.items():
            if getattr(config, key) != value:
                raise ValueError(f"dataset.{key}={getattr(config, key)}: {config.name} has {value}")
    if config.batch_size > len(train[1]):
        raise ValueError(f"dataset.batch_size={config.batch_size}: the training set has {len(train[1])} images")
    return ImageData(_on(device, *train), _on(device, *test))


def _on(device: torch.device, images: Tensor, labels: Tensor) -> Split:
    return Split(images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device))


def batches(split: Split, config: DatasetConfig, *, seed: int, start: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Go through the training set in a random order, epoch after epoch; the last, partial batch of each is dropped.

    Args:
        split: at least `config.batch_size` images.
        config: the recipe.
        seed: of the order and of the augmentation.
        start: the iteration to begin at; the first of all is 1.

    Yields:
        Iteration, images (float32 [N, C, H, W], normalised and augmented, channels last) and labels (int64 [N]), up to
        and with `config.iterations`.
    """
    batches_per_epoch = len(split.labels) // config.batch_size
    order = torch.empty(0)
    for iteration in range(start, config.iterations + 1):
        epoch, batch = divmod(iteration - 1, batches_per_epoch)
        if batch == 0 or iteration == start:
            order = torch.randperm(len(split.labels), generator=_generator("order", seed, epoch))
            order = order.to(split.labels.device)
        chosen = order[batch * config.batch_size :][: config.batch_size]
        draws = _generator("augmentation", seed, iteration)
        yield iteration, augment(normalise(split.images[chosen]), config, generator=draws), split.labels[chosen]


def _generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """Seed a generator by the first 8 bytes of the sha256 of "purpose seed index", so that no two are related."""
    digest = hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: below 2 ** 63


def normalise(images: Tensor) -> Tensor:
    """Bytes to what the network is given: x / 255, less the mean of each image.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        float32 [N, C, H, W], channels last in memory.
    """
    scaled = images.to(torch.float32, memory_format=torch.channels_last) / 255
    return scaled - scaled.mean(dim=(1, 2, 3), keepdim=True)


def augment(images: Tensor, config: DatasetConfig, *, generator: torch.Generator) -> Tensor:
    """Crop each image at random out of its zero-padded self, and mirror half of them.

    Args:
        images: float32 [N, C, H, W], normalised.
        config: `augmentation` per-image draws for each image; per-batch, as the authors' code does, draws one crop for
            the whole batch and mirrors its first half, always; none returns the images as they are. `crop_padding` is
            in pixels; `flip` false never mirrors.
        generator: a CPU generator, so that the draws are the same whatever the device.

    Returns:
        float32 [N, C, H, W], channels last in memory, on the device of `images`.

    Raises:
        ValueError: no such augmentation.

    Source: METHOD.md section 5; He et al. 2016 for the padding and the crop.
    """
    batch, _, height, width = images.shape
    if config.augmentation == "none":
        return images
    if config.augmentation == "per-image":
        corner = torch.randint(2 * config.crop_padding + 1, (2, batch, 1), generator=generator)
        mirrored = torch.randint(2, (batch, 1), generator=generator) == 1
    elif config.augmentation == "per-batch":
        corner = torch.randint(2 * config.crop_padding + 1, (2, 1, 1), generator=generator).expand(2, batch, 1)
        mirrored = torch.arange(batch)[:, None] < batch // 2
    else:
        raise ValueError(f"dataset.augmentation={config.augmentation}: it is one of per-image, per-batch, none")

    rows = corner[0] + torch.arange(height)
    columns = corner[1] + torch.arange(width)
    if config.flip:
        columns = torch.where(mirrored, columns.flip(1), columns)
    # A few kilobytes from unpinned memory: staged at once, so the host does not wait for the device.
    rows, columns = (index.to(images.device, non_blocking=True) for index in (rows, columns))
    image = torch.arange(batch, device=images.device)
    padded = F.pad(images, [config.crop_padding] * 4)
    # Indices on both sides of a slice put the sliced dimension last: [N, H, W, C], which is channels last already.
    cropped = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
