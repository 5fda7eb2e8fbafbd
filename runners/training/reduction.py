"""The mean of all processes' gradients, computed while the backward pass still runs.

    backward pass      gradient ready -> into its bucket -> bucket full -> all-reduce begins
    before the update  all have ended -> divided by the number of processes

Gradients share buckets of 25 MiB or a little more, in the reverse order of the parameters, about the order in which
they become ready. So the first buckets travel during the rest of the backward pass.

PyTorch's DistributedDataParallel does the same, but regroups its buckets after its first step, by the order in which
gradients came. From three processes up a sum then has another order, so a run that was stopped and resumed ends with
other bits. Here the buckets never change. There is no warm-up either, so a step can be captured as a CUDA graph.

Each process sends, and receives, 2 (N - 1) / N times the bytes of the gradients, the least that an all-reduce can.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel's: large enough that latency does not matter, small enough that the last one ends soon."""


class GradientReducer:
    """Gives every parameter of a network, on each process, the mean of the processes' gradients.

    Args:
        model: the same network on all processes; its parameters keep their device, dtype and memory format. The same
            parameters have gradients on all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buckets = [_Bucket(parameters) for parameters in grouped(model.parameters())]
        self._unsent: list[_Bucket] = []
        for bucket in self.buckets:
            for parameter in bucket.places:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._add, bucket))

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Reduce the gradients while the backward pass inside computes them, and wait for the means.

        Gradients of earlier backward passes, to which this one adds, are part of it.
        """
        self._unsent = list(self.buckets)
        for bucket in self.buckets:
            bucket.missing = set(bucket.places)
        yield
        for bucket in self._unsent:  # the loss does not depend on one of its parameters
            bucket.send()
        self._unsent = []
        for bucket in self.buckets:
            bucket.receive()

    def _add(self, bucket: "_Bucket", parameter: nn.Parameter) -> None:
        """Take a gradient into its bucket, and send full buckets in their order, which is the same on all processes."""
        if not self._unsent:  # outside of `reduced`
            return
        bucket.add(parameter)
        while self._unsent and not self._unsent[0].missing:
            self._unsent.pop(0).send()


def reducer_of(model: nn.Module) -> GradientReducer | None:
    """Return the reducer of a network that a group of processes trains; None without a group."""
    return GradientReducer(model) if distributed.is_available() and distributed.is_initialized() else None


class _Bucket:
    """Gradients that are sent together.

    Args:
        parameters: of one device and dtype.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.gradients = parameters[0].detach().new_zeros(sum(sizes))
        # A dense tensor has each element once, in any memory format, and a gradient that of its parameter.
        self.places = {
            parameter: part.as_strided(parameter.shape, parameter.stride())
            for parameter, part in zip(parameters, self.gradients.split(sizes), strict=True)
        }
        self.missing: set[nn.Parameter] = set()
        """Parameters whose gradient is not in the bucket yet."""
        self._work: Any = None

    def add(self, parameter: nn.Parameter) -> None:
        """Move the gradient of a parameter into the bucket."""
        assert parameter.grad is not None
        parameter.grad = self.places[parameter].copy_(parameter.grad)
        self.missing.discard(parameter)

    def send(self) -> None:
        """Begin to add up the gradients of all processes."""
        for parameter in list(self.missing):
            if parameter.grad is None:
                self.places[parameter].zero_()
            else:
                self.add(parameter)
        self._work = distributed.all_reduce(self.gradients, async_op=True)

    def receive(self) -> None:
        """Wait for the sum, and divide it by the number of processes."""
        self._work.wait()
        self.gradients.div_(distributed.get_world_size())


def grouped(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters that learn into buckets, the last parameter first."""
    groups: list[list[nn.Parameter]] = []
    for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
        is_full = not groups or sum(other.nbytes for other in groups[-1]) >= BUCKET_BYTES
        if is_full or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
        groups[-1].append(parameter)
    return groups
