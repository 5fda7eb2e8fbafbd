"""Activations that wait in the host's memory from the forward pass to the backward pass: a baseline on stock layers.

    pack      activation on the GPU -> pinned memory of the host
    unpack    pinned memory -> the GPU, when the backward pass asks for it

As torch.autograd.graph.save_on_cpu(pin_memory=True), and different in four ways that a user would want:

- parameters stay on the GPU, and so does what is small, such as the statistics of batch norm;
- copies keep their layout (save_on_cpu would hand channels-last activations back as NCHW);
- no copy waits for the device;
- memory of the host that was pinned once is used again by the next step, as pinning takes longer than the step. So a
  CUDA graph can record the copies: it makes none of that memory itself.

What two functions save is moved twice, as there. All copies are on the stream of the step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """Moves the activations of one network.

    Attributes:
        bytes: on the host now.
        peak_bytes: the most that were there at once.
    """

    smallest_bytes = 2**20
    """What has fewer stays on the device."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._unused: dict[tuple[object, ...], list[Tensor]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """A context for the forward pass, in which autograd saves through this."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Moved":
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.nbytes < self.smallest_bytes:
            return tensor.detach()  # an output that its own function saved would hold itself alive
        return _Moved(tensor, self)

    def _unpack(self, packed: "Tensor | _Moved") -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.back()

    def _take(self, like: Tensor) -> Tensor:
        """Pinned memory of the host for a tensor of some shape, layout and dtype."""
        unused = self._unused.get(_kind(like))
        if unused:
            return unused.pop()
        if like.is_cuda:
            _refuse_more_than_there_is(like.nbytes)
        return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def _give_back(self, host: Tensor) -> None:
        self._unused.setdefault(_kind(host), []).append(host)

    def _count(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def offload(network: nn.Module) -> Offload:
    """Have the forward pass of a network move what it saves to the host.

    Args:
        network: its parameters, buffers and their names stay as they are.

    Returns:
        What moves the activations.
    """
    forward = _OffloadedForward(network)
    network.forward = forward
    return forward.offload


def peak_bytes(network: nn.Module) -> int:
    """The most bytes that a network has had on the host at once; 0 where nothing is offloaded."""
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
    """One activation on the host, whose memory is the next one's when nothing refers to it any more.

    The next copy into it waits its turn on the stream, behind the copy out of it. On the meta device it has no memory.
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


def _refuse_more_than_there_is(nbytes: int) -> None:
    """Raise before the system ends the process for memory that it promised and does not have.

    Raises:
        RuntimeError: the host is out of memory.
    """
    taken = 1 << max(nbytes - 1, 0).bit_length()  # PyTorch pins powers of two
    left = host_bytes_left()
    if taken > left:
        raise RuntimeError(f"host out of memory: {taken} bytes are to be pinned and {left} are left")


def host_bytes_left(root: Path = Path("/")) -> int:
    """Bytes that this process may still take of the host's memory: the machine's, or its container's.

    Args:
        root: where the system's files are.
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
