"""Bytes that training needs, counted without running it, and the largest batch that fits.

On the meta device tensors have shapes and lifetimes but no data, so a whole step (forward, loss, backward) takes
seconds for any network and batch. A storage counts from the operation that creates it until its last reference is
dropped; the peak of the step is the largest sum of live storages. Memory that one operation allocates and frees
internally (a convolution's workspace) is not counted. The usual way is to run the step and read the allocator's peak.

    training = weights + optimiser + images + peak of a step (gradients included)

This is piecewise linear in the batch, so a few counts find the largest batch that fits a budget.

Saved bytes have a formula. A K-bit codec saves for an activation [M, C]

    C ceil(M / (8 / K))   packed codes
    36 C                  nine per-channel vectors
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blpa.codec import Codec
from blpa.kernels import Norm

MIB, GIB = 2**20, 2**30

CODES = "codes, or 8-bit floats"
VECTORS = "per-channel vectors"
FULL_PRECISION = "saved at full precision"
GRADIENTS = "gradients of the weights"
TEMPORARY = "temporary"
SAVED = (CODES, VECTORS, FULL_PRECISION)
"""Kinds of bytes that are saved for the backward pass."""
KINDS = (*SAVED, GRADIENTS, TEMPORARY)
"""Kinds of bytes of a step."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages created while this mode is active.

    Attributes:
        live_bytes: bytes alive now.
        peak_bytes: largest live_bytes so far.
        kinds: live bytes by kind; TEMPORARY unless marked.
        kinds_at_peak: kinds at the peak.
        timeline: live_bytes after each operation.
    """

    only_counts = True
    """It keeps no tensor, so a tensor may be written over while it is active (coded/fusion.py)."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live_bytes = 0
        self.peak_bytes = 0
        self.kinds: Counter[str] = Counter()
        self.kinds_at_peak: dict[str, int] = {}
        self.timeline: list[int] = []
        self._counted: dict[int, str] = {}
        # Shapes, strides and dtypes of the results of operations on the meta device.
        self._results: dict[Hashable, list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return true, so that compiled code runs compiled; by default PyTorch would run its source instead."""
        return True

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude tensors that existed before."""
        for tensor in tensors:
            self._counted[tensor.untyped_storage()._cdata] = "ignored"

    def kind_of(self, tensor: Tensor) -> str:
        """Return the kind of a tensor's storage; "ignored" if it existed before."""
        return self._counted.get(tensor.untyped_storage()._cdata, "ignored")

    def is_counted(self, tensor: Tensor) -> bool:
        """Return whether a tensor's storage was created while this mode was active."""
        return self.kind_of(tensor) != "ignored"

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Set the kind of a counted tensor."""
        storage = tensor.untyped_storage()
        before = self.kind_of(tensor)
        if before != "ignored":
            self.kinds[before] -= storage.nbytes()
            self.kinds[kind] += storage.nbytes()
            self._counted[storage._cdata] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that it creates."""
        if func is torch.ops.aten.add.Tensor and _is_sum_of_gradients(args):
            func = torch.ops.aten.add_.Tensor
        elif func is torch.ops.aten.view.default and args[0].is_meta and _in_backward():
            # A compiled graph views gradients by strides that convolutions have on other devices.
            func = torch.ops.aten.reshape.default
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.timeline.append(self.live_bytes)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or on the meta device repeat the result of an equal operation.

        PyTorch computes the shapes of many operations in Python, which takes a hundred times as long as creating a
        tensor, and a deep network repeats few operations. Operations that return a view or an argument always run.
        """
        returns = func._schema.returns
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        makes_tensors = returns and all(str(value.type) == "Tensor" and not value.alias_info for value in returns)
        if not makes_tensors or not all(tensor.is_meta for tensor in given):  # data on another device can decide shapes
            return func(*args, **kwargs)
        key = func, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items()))
        found = self._results.get(key)
        if found is None:
            result = func(*args, **kwargs)
            made = list(result) if isinstance(result, tuple | list) else [result]
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            if all(
                tensor is None
                or (type(tensor) is Tensor and tensor.is_meta and tensor.untyped_storage()._cdata not in storages)
                for tensor in made
            ):
                self._results[key] = [one if one is None else (one.shape, one.stride(), one.dtype) for one in made]
            return result
        tensors = [one and torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in found]
        return tensors[0] if len(returns) == 1 else tuple(tensors)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted[key] = TEMPORARY
        self.live_bytes += nbytes
        self.kinds[TEMPORARY] += nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.kinds_at_peak = dict(self.kinds)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self.kinds[self._counted.pop(key)] -= nbytes
        self.live_bytes -= nbytes


def _is_sum_of_gradients(args: tuple[Any, ...]) -> bool:
    """Return whether autograd adds two gradients of one tensor: in place, unless a mode like LiveBytes is active."""
    first, second = args[:2]
    return _in_backward() and first.is_meta and isinstance(second, Tensor) and first.shape == second.shape


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()  # recomputation records


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, type(value)
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else (type(value), value)


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Emulate torch.autocast in bfloat16 for the meta device, which PyTorch does not support.

    Convolutions and linear layers get bfloat16 operands; autocast changes nothing else in a residual network. Keep it
    active in the backward pass, which recomputes the layers of a checkpointed segment.
    """

    def in_bfloat16(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            return function(*(value.bfloat16() if isinstance(value, Tensor) else value for value in args))

        return call

    before = F.conv2d, F.linear
    F.conv2d, F.linear = in_bfloat16(F.conv2d), in_bfloat16(F.linear)
    try:
        yield
    finally:
        F.conv2d, F.linear = before


@dataclass(frozen=True)
class PartBytes:
    """Bytes that one part of a network, such as a block, saves for the backward pass.

    Attributes:
        input_shape: [N, C, H, W] of its input.
        output_shape: [N, C, H, W] of its output.
        kinds: saved bytes by kind: CODES, VECTORS and FULL_PRECISION.
    """

    input_shape: torch.Size
    output_shape: torch.Size
    kinds: dict[str, int]


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one training step allocates besides weights, optimiser state and its input.

    Attributes:
        peak_bytes: largest number of live bytes, gradients of the weights included.
        forward_bytes: live bytes after the forward pass: all saved tensors, the logits and the loss.
        kinds_at_peak: bytes at the peak by kind: KINDS.
        timeline: live bytes after each operation.
        forward_operations: number of operations of the forward pass.
        saved_by_part: bytes that each part saves.
    """

    peak_bytes: int
    forward_bytes: int
    kinds_at_peak: dict[str, int]
    timeline: list[int]
    forward_operations: int
    saved_by_part: dict[str, PartBytes]


def step_bytes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> StepBytes:
    """Count the bytes of one forward and backward pass.

    Args:
        model: on the meta device, without gradients. On another device the step runs, with eager kernels only.
        images: [N, C, H, W] on the same device.
        labels: class indices [N].
        bf16: forward pass under autocast in bfloat16; the logits are cast to float32.
        parts: modules of the model, by name, called one after the other, whose saved bytes are listed.

    Returns:
        The peak, what is alive after each operation, and what each part saves.
    """
    counter = LiveBytes()
    counter.ignore([images, labels, *model.parameters(), *model.buffers()])

    def mark_saved(tensor: Tensor) -> Tensor:
        is_code = tensor.element_size() == 1  # ours, or a float8 copy
        # An activation of nine rows is no Norm: it requires a gradient.
        is_vectors = tensor.dim() == 2 and tensor.shape[0] == len(Norm._fields) and not tensor.requires_grad
        counter.mark(tensor, CODES if is_code else VECTORS if is_vectors else FULL_PRECISION)
        return tensor.detach()  # an output saved by its own function would keep itself alive

    before: dict[str, int] = {}
    saved_by_part: dict[str, PartBytes] = {}

    def entered(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.update({kind: counter.kinds[kind] for kind in SAVED})

    def left(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kinds = {kind: counter.kinds[kind] - before[kind] for kind in SAVED}
        saved_by_part.setdefault(name, PartBytes(inputs[0].shape, output.shape, kinds))  # ignore recomputation

    handles = [
        handle
        for name, part in parts.items()
        for handle in (
            part.register_forward_pre_hook(entered),
            part.register_forward_hook(lambda _, inputs, output, name=name: left(name, inputs, output)),
        )
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(lambda parameter: counter.mark(parameter.grad, GRADIENTS))
        for parameter in model.parameters()
    ]
    is_meta = images.is_meta
    with (
        counter,
        torch.autograd.graph.saved_tensors_hooks(mark_saved, lambda tensor: tensor),
        meta_autocast() if bf16 and is_meta else nullcontext(),
    ):
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 and not is_meta else nullcontext():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        del logits
        forward_bytes, forward_operations = counter.live_bytes, len(counter.timeline)
        loss.backward()
    for handle in handles:
        handle.remove()
    return StepBytes(
        counter.peak_bytes, forward_bytes, counter.kinds_at_peak, counter.timeline, forward_operations, saved_by_part
    )


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that training needs.

    Attributes:
        weight_bytes: parameters and buffers.
        optimiser_bytes: state of the optimiser.
        input_bytes: images and labels.
        step: bytes that a step allocates besides.
        host_bytes: bytes moved to the host's memory, not part of the total.
    """

    weight_bytes: int
    optimiser_bytes: int
    input_bytes: int
    step: StepBytes
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes needed at the peak of a step."""
        return self.weight_bytes + self.optimiser_bytes + self.input_bytes + self.step.peak_bytes


def training_bytes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> TrainingBytes:
    """Count the bytes of training by stochastic gradient descent with momentum, one value per parameter.

    Args:
        model: as in step_bytes; so are images and labels.
        images: [N, C, H, W].
        labels: class indices [N].
        bf16: as in step_bytes; weights and momentum are float32.
        parts: as in step_bytes.

    Returns:
        The bytes of weights, optimiser, images and step.
    """
    parameters = list(model.parameters())
    return TrainingBytes(
        weight_bytes=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        optimiser_bytes=sum(parameter.nbytes for parameter in parameters),
        input_bytes=images.nbytes + labels.nbytes,
        step=step_bytes(model, images, labels, bf16=bf16, parts=parts),
    )


def largest_batch(total_bytes: Callable[[int], int], budget_bytes: int) -> int:
    """Find the largest batch whose training fits a budget; it and the next larger one are counted.

    Args:
        total_bytes: maps a batch to the bytes of training; increasing, nearly linear.
        budget_bytes: available bytes.

    Returns:
        The batch; 0 if not even one sample fits.
    """
    fits, too_large = (1, total_bytes(1)), (0, 0)
    if fits[1] > budget_bytes:
        return 0
    step = 63  # small batches have another slope, since other tensors are the largest
    while too_large[0] - fits[0] != 1:
        guess = fits[0] + step
        if too_large[0]:
            guess = min(guess, too_large[0] - 1)
        counted = total_bytes(guess)
        slope = max((counted - fits[1]) / (guess - fits[0]), 1.0)
        if counted <= budget_bytes:
            fits = guess, counted
        else:
            too_large = guess, counted
        step = max(1, int((budget_bytes - fits[1]) / slope))
    return fits[0]


def saved_bytes(rows: int, channels: int, codec: Codec | None, *, element_bytes: int = 4) -> int:
    """Compute the bytes that a batch norm + ReLU saves for backward.

    Args:
        rows: M = N H W.
        channels: C.
        codec: of the saved codes; None for one full-precision tensor.
        element_bytes: bytes per element of the activation.

    Returns:
        The bytes.
    """
    vector_bytes = len(Norm._fields) * max(4, element_bytes) * channels  # arithmetic is in float32 at least
    value_bytes = rows * element_bytes if codec is None else codec.packed_rows(rows)
    return value_bytes * channels + vector_bytes
