"""Offloading: a baseline of stock layers that saves activations in host memory.

    pack      activation on the GPU -> pinned host memory
    unpack    pinned host memory -> the GPU, when the backward pass needs it

It works as torch.autograd.graph.save_on_cpu(pin_memory=True), with four improvements:

- parameters and small tensors, such as batch norm statistics, stay on the GPU;
- copies preserve the layout (save_on_cpu returns channels-last activations as NCHW);
- no copy waits for the device;
- pinned host memory is reused by the next step, since pinning takes longer than the step. So the copies can be captured
  in a CUDA graph, which cannot allocate that memory.

As in save_on_cpu, a tensor that two functions save is moved twice. All copies are on the stream of the step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """Moves the activations of one network.

    Attributes:
        bytes: bytes on the host now.
        peak_bytes: the most bytes on the host at once.
    """

    smallest_bytes = 2**20
    """Smaller tensors stay on the device."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._unused: dict[tuple[object, ...], list[Tensor]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """Return the context in which the forward pass must run for its saved tensors to be moved."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Moved":
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.nbytes < self.smallest_bytes:
            return tensor.detach()  # else an output saved by its own function keeps itself alive
        return _Moved(tensor, self)

    def _unpack(self, packed: "Tensor | _Moved") -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.back()

    def _take(self, like: Tensor) -> Tensor:
        """Take pinned host memory of the shape, layout and dtype of a tensor, unused or new."""
        unused = self._unused.get(_kind(like))
        if unused:
            return unused.pop()
        if like.is_cuda:
            _check_host_memory(like.nbytes)
        return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def _give_back(self, host: Tensor) -> None:
        self._unused.setdefault(_kind(host), []).append(host)

    def _count(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def offload(network: nn.Module) -> Offload:
    """Make the forward pass of a network save its activations on the host.

    Args:
        network: changed in place; its parameters, buffers and their names do not change.

    Returns:
        The object that moves the activations.
    """
    forward = _OffloadedForward(network)
    network.forward = forward
    return forward.offload


def peak_bytes(network: nn.Module) -> int:
    """Return the most bytes that a network has had on the host at once; 0 where nothing is offloaded."""
    return network.forward.offload.peak_bytes if isinstance(network.forward, _OffloadedForward) else 0


class _OffloadedForward:
    """A bound method that copy.deepcopy binds to the copy."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.offload = Offload()

    def __call__(self, *args: Any) -> Any:
        with self.offload.hooks():
            return type(self.network).forward(self.network, *args)


class _Moved:
    """One activation on the host; its memory is reused once nothing refers to it.

    The stream orders the next copy into that memory after the copy out of it. On the meta device there is no memory.
    """

    host: Tensor | None

    def __init__(self, tensor: Tensor, offload: Offload) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.offload, self.host, self.nbytes = offload, None, 0
        if not tensor.is_meta:
            self.host = offload._take(tensor)
            self.host.copy_(tensor.detach(), non_blocking=True)
        self.nbytes = tensor.nbytes
        offload._count(self.nbytes)

    def back(self) -> Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return tensor if self.host is None else tensor.copy_(self.host, non_blocking=True)

    def __del__(self) -> None:
        self.offload._count(-self.nbytes)
        if self.host is not None:
            self.offload._give_back(self.host)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _check_host_memory(nbytes: int) -> None:
    """Raise before the system kills the process for lack of memory.

    Raises:
        RuntimeError: the host is out of memory.
    """
    taken = 1 << max(nbytes - 1, 0).bit_length()  # PyTorch pins powers of two
    left = host_bytes_left()
    if taken > left:
        raise RuntimeError(f"host out of memory: {taken} bytes are to be pinned and {left} are left")


def host_bytes_left(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that this process may still take, of the machine or its container.

    Args:
        root: root of the system's files.
    """
    (available,) = [
        int(line.split()[1]) * 1024
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("MemAvailable:")
    ]
    group = root / "sys/fs/cgroup"
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="utf-8"))
            return min(available, int(limit) - used)
    return available
