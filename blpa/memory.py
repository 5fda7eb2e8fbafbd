"""Bytes that training needs, counted without running it, and the largest batch that fits.

On the meta device tensors have shapes and lifetimes but no data, so a whole step (forward, loss, backward) takes
seconds for any network and batch. Every storage is counted from the operation that makes it until its last reference
goes; the most that is alive at once is the step's peak. What a single operation allocates and frees inside itself (a
convolution's workspace) is not seen.

Whole training steps need, besides what a step allocates, the weights, the optimiser's state and the images:

    training = weights + optimiser + images + peak of a step (gradients included)

which grows with the batch by straight lines, so the largest batch that fits a budget takes a few counts to find.

Bytes kept have a formula. A unit whose activation is [M, C], with a K-bit code, keeps

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

from blpa.codec import Code
from blpa.kernels import Norm

MIB, GIB = 2**20, 2**30

CODES = "codes, or 8-bit floats"
VECTORS = "per-channel vectors"
FULL_PRECISION = "kept at full precision"
GRADIENTS = "gradients of the weights"
PASSING = "passing: read once and freed"
KEPT = (CODES, VECTORS, FULL_PRECISION)
"""What is kept for the backward pass."""
KINDS = (*KEPT, GRADIENTS, PASSING)
"""What the bytes of a step are."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active and still alive.

    Attributes:
        live_bytes: alive now.
        peak_bytes: the most that were alive at once.
        kinds: bytes alive now of each kind; what `mark` has not named is passing.
        kinds_at_peak: the same when the most were alive.
        timeline: live_bytes after each operation.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live_bytes = 0
        self.peak_bytes = 0
        self.kinds: Counter[str] = Counter()
        self.kinds_at_peak: dict[str, int] = {}
        self.timeline: list[int] = []
        self._counted: dict[int, str] = {}
        # Shapes, strides and dtypes of the tensors that an operation on the meta device made.
        self._results: dict[Hashable, list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Run compiled code as compiled code; else PyTorch would quietly run the source instead."""
        return True

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors out that were there before."""
        for tensor in tensors:
            self._counted[tensor.untyped_storage()._cdata] = "ignored"

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor that is counted is."""
        storage = tensor.untyped_storage()
        before = self._counted.get(storage._cdata, "ignored")
        if before != "ignored":
            self.kinds[before] -= storage.nbytes()
            self.kinds[kind] += storage.nbytes()
            self._counted[storage._cdata] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages it made."""
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.timeline.append(self.live_bytes)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or on the meta device make what the same operation made before.

        For many operations PyTorch finds out the shapes in Python, which takes a hundred times as long as an empty
        tensor, and a deep network repeats few operations. What returns a view or an argument runs as it is.
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
        self._counted[key] = PASSING
        self.live_bytes += nbytes
        self.kinds[PASSING] += nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.kinds_at_peak = dict(self.kinds)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self.kinds[self._counted.pop(key)] -= nbytes
        self.live_bytes -= nbytes


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, type(value)
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else (type(value), value)


@contextmanager
def meta_autocast() -> Iterator[None]:
    """What torch.autocast in bfloat16 does to tensors of the meta device, for which PyTorch has none.

    Convolutions and linear layers get bfloat16 operands. They are all that autocast changes in a residual network:
    batch norm, ReLU, pooling, padding and sums keep the dtype they are given. It is for the backward pass as well,
    which recomputes the layers of a checkpointed segment.
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
    """What the forward pass of one part of a network, such as a block, leaves for the backward pass.

    Attributes:
        input_shape: [N, C, H, W] of what it read.
        output_shape: [N, C, H, W] of what it put out.
        kinds: bytes kept, of the kinds CODES, VECTORS and FULL_PRECISION.
    """

    input_shape: torch.Size
    output_shape: torch.Size
    kinds: dict[str, int]


@dataclass(frozen=True)
class StepBytes:
    """What one training step allocates beyond weights, optimiser state and its input.

    Attributes:
        peak_bytes: the most alive at once, gradients of the weights included.
        forward_bytes: alive when the forward pass has ended: all that is kept, the logits and the loss.
        kinds_at_peak: the peak's bytes by what they are: KINDS.
        timeline: bytes alive after each operation.
        forward_operations: how many of them belong to the forward pass.
        kept_by_part: what the forward pass of each part left for the backward pass.
    """

    peak_bytes: int
    forward_bytes: int
    kinds_at_peak: dict[str, int]
    timeline: list[int]
    forward_operations: int
    kept_by_part: dict[str, PartBytes]


def step_bytes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> StepBytes:
    """Count one forward and backward pass.

    Args:
        model: on the meta device, its gradients None (on another device the step runs, with eager kernels only).
        images: [N, C, H, W] on the same device.
        labels: class indices [N].
        bf16: the forward pass is under autocast in bfloat16; the logits are float32 all the same.
        parts: modules of the model, called one after the other, whose kept bytes are told apart.
    """
    counter = LiveBytes()
    counter.ignore([images, labels, *model.parameters(), *model.buffers()])

    def saved(tensor: Tensor) -> Tensor:
        is_code = tensor.element_size() == 1  # ours, or a float8 copy
        # Activations of nine images have as many rows, but all of them require a gradient.
        is_vectors = tensor.dim() == 2 and tensor.shape[0] == len(Norm._fields) and not tensor.requires_grad
        counter.mark(tensor, CODES if is_code else VECTORS if is_vectors else FULL_PRECISION)
        return tensor.detach()  # an output that its own function saved would hold itself alive

    before: dict[str, int] = {}
    kept_by_part: dict[str, PartBytes] = {}

    def entered(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.update({kind: counter.kinds[kind] for kind in KEPT})

    def left(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kinds = {kind: counter.kinds[kind] - before[kind] for kind in KEPT}
        kept_by_part.setdefault(name, PartBytes(inputs[0].shape, output.shape, kinds))  # not of a recomputation

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
        torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor),
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
        counter.peak_bytes, forward_bytes, counter.kinds_at_peak, counter.timeline, forward_operations, kept_by_part
    )


@dataclass(frozen=True)
class TrainingBytes:
    """What whole training steps need.

    Attributes:
        weight_bytes: parameters and buffers.
        optimiser_bytes: what the optimiser keeps between steps.
        input_bytes: images and labels.
        step: what a step allocates besides.
        host_bytes: what it moves to the host's memory, which is no part of the total.
    """

    weight_bytes: int
    optimiser_bytes: int
    input_bytes: int
    step: StepBytes
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The most that is needed at once."""
        return self.weight_bytes + self.optimiser_bytes + self.input_bytes + self.step.peak_bytes


def training_bytes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> TrainingBytes:
    """Count one training step by stochastic gradient descent with momentum, whose state is a copy of the parameters.

    Args:
        model: as step_bytes; so are images and labels.
        images: [N, C, H, W].
        labels: class indices [N].
        bf16: as step_bytes; weights and momentum are float32.
        parts: as step_bytes.
    """
    parameters = list(model.parameters())
    return TrainingBytes(
        weight_bytes=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        optimiser_bytes=sum(parameter.nbytes for parameter in parameters),
        input_bytes=images.nbytes + labels.nbytes,
        step=step_bytes(model, images, labels, bf16=bf16, parts=parts),
    )


def largest_batch(total_bytes: Callable[[int], int], budget_bytes: int) -> int:
    """The largest batch whose training fits a budget, both it and the next having been counted.

    Args:
        total_bytes: bytes that training with a batch takes; grows with the batch, nearly in a straight line.
        budget_bytes: what there is.

    Returns:
        The batch; 0 where not even one sample fits.
    """
    fits, too_large = (1, total_bytes(1)), (0, 0)
    if fits[1] > budget_bytes:
        return 0
    step = 63  # of small batches other tensors are the largest: their slope would mislead
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
