"""Bytes that a training step needs, counted without running it.

On the meta device tensors have shapes and lifetimes but no data, so a whole step (forward, loss, backward) takes
seconds for any network and batch. Every storage is counted from the operation that makes it until its last reference
goes; the most that is alive at once is the step's peak. What a single operation allocates and frees inside itself (a
convolution's workspace) is not seen.

Bytes kept have a formula. A unit whose activation is [M, C], with a K-bit code, keeps

    C ceil(M / (8 / K))   packed codes
    36 C                  nine per-channel vectors
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blpa.codec import Code
from blpa.kernels import Norm

MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active and still alive.

    Attributes:
        live_bytes: alive now.
        peak_bytes: the most that were alive at once.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live_bytes = 0
        self.peak_bytes = 0
        self._counted: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors out that were there before."""
        for tensor in tensors:
            self._counted.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self.live_bytes -= nbytes


@dataclass(frozen=True)
class StepBytes:
    """What one training step allocates beyond weights, optimiser state and its input.

    Attributes:
        peak_bytes: the most alive at once, gradients of the weights included.
        forward_bytes: alive when the forward pass has ended: all that is kept, the logits and the loss.
    """

    peak_bytes: int
    forward_bytes: int


def step_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> StepBytes:
    """Count one forward and backward pass.

    Args:
        model: on the meta device, its gradients None (on another device the step runs, with eager kernels only).
        images: [N, C, H, W] on the same device.
        labels: class indices [N].
    """
    counter = LiveBytes()
    counter.ignore([images, labels, *model.parameters(), *model.buffers()])
    with counter:
        loss = F.cross_entropy(model(images), labels)
        forward_bytes = counter.live_bytes
        loss.backward()
    return StepBytes(counter.peak_bytes, forward_bytes)


def kept_bytes(rows: int, channels: int, code: Code | None, *, element_bytes: int = 4) -> int:
    """Bytes one unit keeps for the backward pass.

    Args:
        rows: M = N H W.
        channels: C.
        code: the code, or None for one full-precision tensor.
        element_bytes: bytes of an element of the activation.
    """
    vector_bytes = len(Norm._fields) * max(4, element_bytes) * channels  # arithmetic is in float32 at least
    value_bytes = rows * element_bytes if code is None else code.packed_rows(rows)
    return value_bytes * channels + vector_bytes
