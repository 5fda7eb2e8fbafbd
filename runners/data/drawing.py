"""What is drawn at random for training: generators without a state that persists, and the order of the images."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from runners.config import DatasetConfig


def make_generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """Make a generator seeded by the first 8 bytes of the sha256 of "purpose seed index": independent of all others."""
    digest = hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: below 2 ** 63


def chosen(count: int, config: DatasetConfig, *, seed: int, start: int) -> Iterator[tuple[int, Tensor]]:
    """Choose the images of each iteration: a random order for every epoch, whose last, partial batch is dropped.

    Args:
        count: number of training images, at least `config.batch_size`.
        config: `batch_size` and `iterations`.
        seed: seed of the order.
        start: the iteration to begin at; the first one is 1.

    Yields:
        Iteration, up to and including `config.iterations`, and numbers of images, int64 [batch].
    """
    batches_per_epoch = count // config.batch_size
    order = torch.empty(0)
    for iteration in range(start, config.iterations + 1):
        epoch, batch = divmod(iteration - 1, batches_per_epoch)
        if batch == 0 or iteration == start:
            order = torch.randperm(count, generator=make_generator("order", seed, epoch))
        yield iteration, order[batch * config.batch_size :][: config.batch_size]
