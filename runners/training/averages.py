"""Running averages of batch norms where several processes train one network.

Each process updates its own, by the samples that it sees. An evaluation and a saved network take the mean of all
processes' averages. The mean of exponential averages is the exponential average of the means, so it does not matter
when it is taken, but for rounding. It is never written back: a checkpoint holds the averages of every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from runners.training.world import World

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class RunningAverages:
    """The running averages of a network on its device, and their means over all processes.

    Args:
        model: trained by all processes.
        world: the processes.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
        self._norms: list[Any] = [norm for norm in norms if norm.running_mean is not None]
        # At the same addresses in every evaluation: a captured one reads what is there.
        self._means = [] if world.is_alone else [own.clone() for own in self._own()]

    @contextmanager
    def means(self) -> Iterator[None]:
        """Give the network the means in place of this process's own averages."""
        if self.world.is_alone:
            yield
            return
        own = self._own()
        sums = torch.cat(own).double()
        distributed.all_reduce(sums)
        for mean, total in zip(self._means, sums.split([len(average) for average in own]), strict=True):
            mean.copy_(total / self.world.size)
        self._use(self._means)
        try:
            yield
        finally:
            self._use(own)

    def of_all(self) -> Tensor | None:
        """Return those of each process [N, averages] in the first process; None in the others, and if it is alone."""
        return None if self.world.is_alone else self.world.gather_to_first(torch.cat(self._own()).cpu())

    def load(self, of_all: Tensor) -> None:
        """Take this process's own averages from what `of_all` returned.

        Those of another number of processes are left: all begin with the means, which the network has.
        """
        if len(of_all) != self.world.size:
            return
        own = self._own()
        for average, saved in zip(own, of_all[self.world.rank].split([len(one) for one in own]), strict=True):
            average.copy_(saved)

    def _own(self) -> list[Tensor]:
        return [average for norm in self._norms for average in (norm.running_mean, norm.running_var)]

    def _use(self, averages: list[Tensor]) -> None:
        for norm, mean, var in zip(self._norms, averages[::2], averages[1::2], strict=True):
            norm.running_mean, norm.running_var = mean, var
