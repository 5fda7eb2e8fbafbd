"""What is saved in place of a tensor.

    Coded     the codes of one tensor: a = f(y~), perhaps viewed in another shape
    Joined    the codes of several tensors, of which the tensor is the concatenation

Functions that read the tensor find it by the tensor's tag (tags.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels.any_layout import Elementwise, largest_rounded_to_zero
from blpa.kernels.library import OPERATIONS

MIN_ROWS = 32
"""Elements of a channel that are worth a code: the seven vectors of fewer take as much as they save."""


class Layout(NamedTuple):
    """How a tensor lies in memory, and its codec; the tensor is dense, or else its codes are of a dense copy."""

    shape: Sequence[int]
    dtype: torch.dtype
    channel: int
    channels_last: bool
    codec: Codec | None

    @staticmethod
    def of(x: Tensor, channel: int, codec: Codec | None) -> "Layout":
        """Return the layout of x: contiguous, unless x is channels-last around its channels."""
        channel %= x.dim()
        return Layout(x.shape, x.dtype, channel, channel == 1 and channels_last_format(x) is not None, codec)

    @property
    def bits(self) -> int:
        """Bits of a code; 0 without a codec."""
        return self.codec.bits if self.codec else 0

    @property
    def clip(self) -> float | None:
        """Clip of the codec; None for each channel's range, and without a codec."""
        return None if self.codec is None or self.codec.clip == "range" else self.codec.clip

    @property
    def of_codes(self) -> tuple[int, bool, int]:
        """The channel dimension, the order in memory and the bits, as the operations take them."""
        return self.channel, self.channels_last, self.bits

    def stats(self, x: Tensor, centre: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Compute mean, biased variance, low and high [4, C] of (x - centre) scale."""
        stats: Tensor = OPERATIONS.channel_stats(x, self.channel, self.channels_last, centre, scale)
        return stats

    def batch_stats(self, x: Tensor) -> Tensor:
        """Compute what `stats` does, with PyTorch's own bits of mean and variance; the range only if it is used."""
        stats: Tensor = OPERATIONS.batch_stats(x, self.channels_last, self.uses_range)
        return stats

    @property
    def uses_range(self) -> bool:
        """Whether the grid depends on low and high."""
        return self.codec is not None and self.codec.clip == "range"

    def vectors(
        self,
        stats: Tensor,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        centre: Tensor | None = None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Place the grid of each channel (any_layout.grid_vectors); y has this dtype."""
        least = largest_rounded_to_zero(dtype or self.dtype)
        vectors: Tensor = OPERATIONS.grid_vectors(stats, gamma, beta, centre, scale, self.bits, self.clip, least)
        return vectors

    def encode(
        self, x: Tensor, y: Tensor, vectors: Tensor, centre: Tensor | None = None, scale: Tensor | None = None
    ) -> "Coded":
        """Encode (x - centre) scale, with the sign of y."""
        return Coded(OPERATIONS.encode(x, y, vectors, *self.of_codes, centre, scale), vectors, self)


class Coded(NamedTuple):
    """Codes of one tensor.

    Args:
        values: from Layout.encode.
        vectors: any_layout.Vectors [7, C].
        layout: of the tensor that was encoded.
        function: the tensor is function(y); None where it is y itself.
        views: then viewed by these functions, one after the other.
    """

    values: Tensor
    vectors: Tensor
    layout: Layout
    function: Elementwise | None = None
    views: tuple[Callable[[Tensor], Tensor], ...] = ()

    @staticmethod
    def of(x: Tensor, channel: int, codec: Codec | None) -> "Coded":
        """Encode x itself, whatever computed it: about each channel's mean, or a rectified channel from 0."""
        with torch.no_grad():
            layout = Layout.of(x, channel, codec)
            values, vectors = OPERATIONS.encode_own(x, *layout.of_codes, layout.clip)
            return Coded(values, vectors, layout)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors to save."""
        return self.values, self.vectors

    def with_tensors(self, tensors: Sequence[Any]) -> "Coded":
        """Return the same with other tensors in their places."""
        values, vectors = tensors
        return self._replace(values=values, vectors=vectors)

    def after(self, function: Elementwise) -> "Coded":
        """Return the codes of function(y), which are those of y."""
        return self._replace(function=function)

    def viewed(self, view: Callable[[Tensor], Tensor]) -> "Coded":
        """Return the codes of a view, which are the same."""
        return self._replace(views=(*self.views, view))

    @property
    def bits(self) -> float:
        """Bits per element; infinite without a codec."""
        return self.layout.codec.bits if self.layout.codec else float("inf")

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is y itself, neither a function nor a view of it."""
        return self.function is None and not self.views

    def value(self) -> Tensor:
        """Decode the tensor."""
        name, options = self.function or ("", ())
        layout = self.layout
        out: Tensor = OPERATIONS.decode(
            self.values, self.vectors, layout.shape, layout.dtype, *layout.of_codes, name, options
        )
        for view in self.views:
            out = view(out)
        return out

    def elementwise_grad(self, grad: Tensor, function: Elementwise) -> Tensor:
        """Compute dY from grad = dA of a = function(y)."""
        dy: Tensor = OPERATIONS.elementwise_grad(grad, *self.tensors, *self.layout.of_codes, *function)
        return dy

    def gradient_sums(self, grad: Tensor, *, per_sample: bool = False, rectified: bool = False) -> Tensor:
        """Sum dY and dY z~ of each channel, [2, N or 1, C], from grad = dY; from dA of a = relu(y), if rectified."""
        sums: Tensor = OPERATIONS.gradient_sums(grad, *self.tensors, *self.layout.of_codes, per_sample, rectified)
        return sums

    def row_means(self, grad: Tensor) -> Tensor:
        """Compute mean(gamma dY) and mean(gamma dY z~) over the last dimension, [2, rows, 1], from grad = dY."""
        means: Tensor = OPERATIONS.row_means(grad, *self.tensors, self.layout.bits)
        return means

    def input_grad(self, grad: Tensor, scale: Tensor, means: Tensor | None, *, rectified: bool = False) -> Tensor:
        """Compute dX = scale (gamma dY - mean0 - z~ mean1) from grad = dY or dA; the others: [(2,) N or 1, C or 1]."""
        dx: Tensor = OPERATIONS.input_grad(grad, *self.tensors, *self.layout.of_codes, scale, means, rectified)
        return dx


class Joined(NamedTuple):
    """Codes of several tensors that a concatenation joins along `dim`."""

    parts: tuple[Coded, ...]
    dim: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors to save."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def bits(self) -> float:
        """Bits per element of the part that has fewest."""
        return min(part.bits for part in self.parts)

    def with_tensors(self, tensors: Sequence[Any]) -> "Joined":
        """Return the same with other tensors in their places."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return Joined(tuple(part.with_tensors(pair) for part, pair in zip(self.parts, pairs, strict=True)), self.dim)

    def value(self) -> Tensor:
        """Decode the parts and join them."""
        return torch.cat([part.value() for part in self.parts], self.dim)


Saved = Coded | Joined


def save(ctx: Any, saved: Saved | None, *others: Tensor) -> None:
    """Save the codes, if any, for backward, others after them, so that autograd frees them."""
    codes = () if saved is None else saved.tensors
    ctx.save_for_backward(*codes, *others)
    ctx.saved = None if saved is None else saved.with_tensors([None] * len(codes))


def load(ctx: Any) -> tuple[Any, list[Tensor]]:
    """Return what `save` saved: the codes and the others."""
    tensors = ctx.saved_tensors  # read once: each access unpacks them anew
    if ctx.saved is None:
        return None, list(tensors)
    count = len(ctx.saved.tensors)
    return ctx.saved.with_tensors(tensors[:count]), list(tensors[count:])


def is_worth_a_code(x: Tensor, channel: int) -> bool:
    """Return whether a code of x takes less memory than x."""
    return x.dim() > 0 and x.numel() >= MIN_ROWS * x.shape[channel] > 0


def channels_last_format(x: Tensor) -> torch.memory_format | None:
    """Return the channels-last format of a tensor that lies in it; None for a contiguous or any other one."""
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if memory_format is None or x.is_contiguous() or not x.is_contiguous(memory_format=memory_format):
        return None
    return memory_format


def not_a_view(out: Tensor) -> Tensor:
    """Return an output that nobody sees as a view: what an autograd function returns may then be overwritten."""
    return out.detach() if torch.compiler.is_dynamo_compiling() or out._is_view() else out


def shape_only(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor of this shape that takes no memory, for functions that read its shape alone.

    A CPU has no memory for what nobody touches; its convolutions would copy the tensor of one element that others get.
    """
    if like.device.type == "cpu":
        memory_format = channels_last_format(like) if len(shape) == like.dim() else None
        return (
            like.new_empty(shape)
            if memory_format is None
            else torch.empty(shape, dtype=like.dtype, memory_format=memory_format)
        )
    return like.new_empty(()).expand(shape)
