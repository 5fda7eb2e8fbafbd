"""A data set of image files: worker processes decode and crop to bytes, and the device does the rest.

    draws -> decode, resize, crop (workers, a few batches ahead) -> uint8 -> colours, mirror, normalise (device)

All that is random is a table of draws, a function of (seed, iteration) as for images in memory: the number of the
image, its short side, the place of its crop, whether it is mirrored, its changes of colour. So neither the number of
workers nor a resumed run changes a bit. Seeds are a departure from the authors' code, whose draws are unseeded.

An evaluation takes the test images in one fixed random order, since the files are listed class by class: with the
statistics of each batch (eval_statistics=batch), a batch of one class would be normalised by its own class.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runners.config import DatasetConfig
from runners.data import ALL, colour
from runners.data.drawing import chosen, make_generator
from runners.image_files import decoding
from runners.image_files.listing import Files
from runners.image_files.workers import Workers

Crops = np.ndarray[Any, Any]
Job = tuple[Any, ...]
"""Arguments of a function that makes crops: paths first."""

JOB_IMAGES = 16
"""Crops that a worker makes at a time, to be sent back together: 2 MB, and about 20 ms of work."""
BATCHES_AHEAD = 2
"""Batches that are decoded before they are asked for, or more jobs where there are more workers."""


@dataclass
class ImageFiles:
    """The images of a training or of a test set, in files; its methods are those of runners.data.Images."""

    files: Files
    workers: Workers
    """Shared by training and test set."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The training device."""

    @property
    def seconds_waited(self) -> float | None:
        """Seconds for which this process has waited for images of either set."""
        return self.workers.seconds_waited

    @functools.cached_property
    def listing(self) -> str:
        """Number of images, and digits of the sha256 of their names and labels."""
        digest = hashlib.sha256()
        for path, label in zip(self.files.paths, self.files.labels, strict=True):
            digest.update(f"{path}\0{label}\0".encode("utf-8", "surrogateescape"))
        return f"{len(self)} images, {digest.hexdigest()[:8]}"

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files.paths)

    def to(self, device: torch.device) -> "ImageFiles":
        """Return the set for a training device; the images stay where they are."""
        return replace(self, device=device)

    def inputs(
        self, config: DatasetConfig, *, seed: int, start: int = 1, rows: slice = ALL
    ) -> Generator[tuple[int, tuple[Tensor, ...]]]:
        """Decode and crop the training images.

        Yields:
            Iteration; crops uint8 [batch, 3, size, size], channels last; labels int64 [batch]; and changes float32
            [batch, 5]: 1 where the image is mirrored, then those of colour.draw_changes.
        """
        drawn, for_numbers, for_jobs = itertools.tee(self._drawn(config, seed=seed, start=start, rows=rows), 3)
        crop = partial(decoding.training_crops, size=config.image_size, decoder=str(config.decoder))
        jobs = (self._jobs(images, JOB_IMAGES, places) for _, images, places, _ in for_jobs)
        labels = torch.tensor(self.files.labels)
        with closing(self._joined(crop, jobs)) as crops:
            batches = ((next(crops), labels[images], changes) for _, images, _, changes in drawn)
            yield from zip((iteration for iteration, *_ in for_numbers), self._pinned(batches), strict=True)

    def batch(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[Tensor, Tensor]:
        """Change the colours of training images, mirror and normalise them."""
        crops, labels, changes = inputs
        images = _scaled(crops)
        if config.colour:
            images = colour.changed(images, changes[:, 1:])
        images = torch.where(changes[:, :1, None, None] == 1, images.flip(3), images)
        return colour.standardised(images), labels

    def batches(self, config: DatasetConfig, *, is_final: bool, which: slice = ALL) -> Generator[tuple[Tensor, ...]]:
        """Decode and crop the test images, in a fixed random order.

        Args:
            config: the last evaluation takes all images, at `test_side` and with `test_crops`; others take the centre
                of the first `check_images`, at `check_side`.
            is_final: whether the evaluation is the last one.
            which: the batches to yield.

        Yields:
            Crops uint8 [batch, 1 or 6, 3, size, size], as decoding.test_crops makes them, and labels int64 [batch].
        """
        order = torch.randperm(len(self), generator=make_generator("test order", 0, 0))
        order = order if is_final else order[: config.check_images]
        side, count = (config.test_side, 6 if config.test_crops == 10 else 1) if is_final else (config.check_side, 1)
        parts = order.split(config.eval_batch_size)[which]
        crop = partial(
            decoding.test_crops, side=int(side or 0), size=config.image_size, count=count, decoder=str(config.decoder)
        )
        jobs = (self._jobs(images, JOB_IMAGES // count) for images in parts)
        labels = torch.tensor(self.files.labels)
        with closing(self._joined(crop, jobs)) as crops:
            yield from self._pinned((found, labels[images]) for images, found in zip(parts, crops, strict=True))

    def views(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[list[Tensor], Tensor]:
        """Normalise the views of each image."""
        crops, labels = inputs
        return [colour.standardised(_scaled(view)) for view in views(crops)], labels

    def _drawn(
        self, config: DatasetConfig, *, seed: int, start: int, rows: slice
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield each iteration, the numbers of its images, and what `draw` returns for them."""
        for iteration, images in chosen(len(self), config, seed=seed, start=start):
            drawn = draw(len(images), config, generator=make_generator("augmentation", seed, iteration))
            places, changes = (table[rows] for table in drawn)
            yield iteration, images[rows], places, changes

    def _jobs(self, images: Tensor, size: int, *tables: Tensor) -> list[Job]:
        """Cut images, and tables with a row for each, into jobs: paths, and rows of the tables."""
        parts = zip(*(table.split(size) for table in (images, *tables)), strict=True)
        return [(self._paths(numbers), *(rows.tolist() for rows in others)) for numbers, *others in parts]

    def _paths(self, images: Tensor) -> list[str]:
        return [str(self.files.folder / self.files.paths[image]) for image in images.tolist()]

    def _joined(self, crop: Callable[..., Crops], batches: Iterable[list[Job]]) -> Generator[Tensor]:
        """Join the crops that the workers make of the jobs of each batch, [batch, ..., 3, size, size]."""
        batches, counted = itertools.tee(batches)
        jobs = itertools.chain.from_iterable(batches)
        first = len(next(counted, []))
        with closing(self.workers.results(crop, jobs, ahead=BATCHES_AHEAD * first)) as results:
            for count in itertools.chain([first], map(len, counted)):
                if parts := list(itertools.islice(results, count)):
                    yield torch.from_numpy(np.concatenate(parts)).movedim(-1, -3)

    def _pinned(self, batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """On CUDA copy each batch into one of two pinned buffers: the device reads one while the host fills the other.

        A buffer is filled again when the device has ended all that was launched with its batch, so the host is at most
        two steps ahead.
        """
        if self.device.type != "cuda":
            yield from batches
            return
        buffers: list[tuple[Tensor, ...]] = []
        ends: dict[int, torch.cuda.Event] = {}
        for number, batch in enumerate(batches):
            turn = number % 2
            if turn in ends:
                ends[turn].synchronize()
            if len(buffers) <= turn:
                buffers.append(tuple(torch.empty_like(part).pin_memory() for part in batch))
            filled = tuple(buffer[: len(part)] for buffer, part in zip(buffers[turn], batch, strict=True))
            for to, part in zip(filled, batch, strict=True):
                to.copy_(part)
            yield filled
            ends[turn] = torch.cuda.Event()
            ends[turn].record()


def draw(count: int, config: DatasetConfig, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw how each image is cropped and changed.

    Args:
        count: number of images.
        config: `train_sides`; `augmentation` none takes the centre at `check_side`, and changes nothing; `flip` false
            never mirrors.
        generator: a CPU generator, so that the draws do not depend on the device.

    Returns:
        Places (int64 [count, 3]: short side in pixels, both of `train_sides` included; top and left, as training_crops
        takes them) and changes (float32 [count, 5], as `inputs` yields them).
    """
    if config.augmentation == "none":
        middle = 1 << decoding.DRAWN_BITS - 1
        unchanged = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]])
        return torch.tensor([[config.check_side, middle, middle]]).expand(count, 3), unchanged.repeat(count, 1)
    smallest, largest = config.train_sides or []
    side = torch.randint(smallest, largest + 1, (1, count), generator=generator)
    place = torch.randint(1 << decoding.DRAWN_BITS, (2, count), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator) * config.flip
    changes = colour.draw_changes(count, generator=generator)
    return torch.cat([side, place]).T, torch.cat([mirrored, changes], dim=1)


def views(crops: Tensor) -> list[Tensor]:
    """Return the views of some images, in the order of torchvision's TenCrop.

    Args:
        crops: [N, 1 or 6, 3, size, size], as decoding.test_crops makes them.

    Returns:
        The centre; or corners and centre, and those of the mirror image. The authors mirror the crops: their tenth
        view, the centre, is a pixel aside where the margins are odd.
    """
    if crops.shape[1] == 1:
        return [crops[:, 0]]
    top_left, top_right, bottom_left, bottom_right, centre, mirrored_centre = crops.unbind(1)
    mirrored = top_right, top_left, bottom_right, bottom_left, mirrored_centre
    return [top_left, top_right, bottom_left, bottom_right, centre, *(crop.flip(3) for crop in mirrored)]


def _scaled(crops: Tensor) -> Tensor:
    """Return bytes as float32 from 0 to 1, channels last."""
    return crops.to(torch.float32, memory_format=torch.channels_last).div_(255)
