"""Images held on the training device as bytes, and augmented there in whole batches.

A data set is small enough to live where it is used (CIFAR is 180 MB as uint8), so there are no worker processes: a
batch is an index into a tensor. What the network is given of an image x is, as METHOD.md section 5 says,

    x / 255 - mean(x / 255)        the mean over all pixels and channels of that image

then, in training, padded with zeros (the image's own mean, that is), cropped to its size again and mirrored or not.
Crop and mirroring are nothing but a choice of rows and of columns, so a whole batch takes one gather.

All that is random about a batch is a table of four whole numbers an image: which, from which row and column, mirrored
or not. The host draws it, and the device makes the batch of it, so the same draws give the same batch wherever it is
made. No generator lives longer than it is used: the order of the images is a function of (seed, epoch), their
augmentation one of (seed, iteration), so that a run can start at any iteration.

To add a data set: a module with a `read` like those here, and a YAML file that names it.
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
        """Go through the images in a random order, epoch after epoch; the last, partial batch of each is dropped.

        Args:
            config: the recipe; there are at least `config.batch_size` images.
            seed: of the order and of the augmentation.
            start: the iteration to begin at; the first of all is 1.

        Yields:
            Iteration, up to and with `config.iterations`, and its draws, int64 [batch, 4] on the CPU: a row is the
            number of the image and what draw_crops draws for it.

        Raises:
            UserError: no such augmentation.
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
            draws: what `draws` yields, on the training device.
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
    """Read a data set and put it on the training device.

    Args:
        config: which one, where it lies, and what it is expected to look like.
        device: where the images are to be held.

    Raises:
        UserError: no such reader; a folder that lacks the data set, or holds it damaged; images other than `config`
            says, or fewer than a batch.
    """
    try:
        reader = importlib.import_module(config.reader)
    except ImportError as error:
        raise UserError(f"dataset.reader={config.reader}: cannot be imported ({error})") from error
    train, test = reader.read(config)
    for images, labels in (train, test):
        found = {"image_channels": images.shape[1], "image_size": images.shape[2], "classes": int(labels.max()) + 1}
        for key, value in found.items():
            if getattr(config, key) != value:
                raise UserError(f"dataset.{key}={getattr(config, key)}: {config.name} has {value}")
    if config.batch_size > len(train[1]):
        raise UserError(f"dataset.batch_size={config.batch_size}: the training set has {len(train[1])} images")
    return ImageData(_on(device, *train), _on(device, *test))


def _on(device: torch.device, images: Tensor, labels: Tensor) -> Split:
    return Split(images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device))


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


def draw_crops(count: int, config: DatasetConfig, *, generator: torch.Generator) -> Tensor:
    """Draw where each image is cropped out of its zero-padded self, and whether it is mirrored.

    Args:
        count: images.
        config: `augmentation` per-image draws for each image; per-batch, as the authors' code does, draws one crop for
            the whole batch and mirrors its first half, always; none takes every image as it is. `crop_padding` is in
            pixels; `flip` false never mirrors.
        generator: a CPU generator, so that the draws are the same whatever the device.

    Returns:
        int64 [count, 3]: first row and column in the padded image, and 1 where it is mirrored.

    Raises:
        UserError: no such augmentation.

    Source: METHOD.md section 5; He et al. 2016 for the padding and the crop.
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
    """Crop each image out of its zero-padded self to its size again, and mirror some.

    Args:
        images: float32 [N, C, H, W], normalised.
        crops: what draw_crops drew for them, on their device.
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
