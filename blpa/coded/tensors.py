"""What is saved in place of a tensor, and the tag by which the functions that read the tensor find it.

    Coded     the codes of one tensor: a = f(y~), perhaps viewed in another shape
    Joined    the codes of several tensors, of which the tensor is the concatenation

A coded function puts a tag on its output. The next function that reads the tensor saves what the tag holds, and no code
of its own. A tag counts only while the tensor is unchanged: autograd counts changes in place, and the tag remembers the
count. So a change between two functions costs a code, and never correctness. Nothing is looked up by address.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import any_layout
from blpa.kernels.any_layout import Elementwise, rows_of

MIN_ROWS = 32
"""Elements of a channel that are worth a code: the seven vectors of fewer take as much as they save."""


@dataclass(frozen=True)
class Layout:
    """How the codes of a tensor lie in memory: its shape, strides and dtype, its channel dimension, and the codec."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    channel: int
    codec: Codec | None

    @staticmethod
    def of(x: Tensor, channel: int, codec: Codec | None) -> "Layout":
        """Return the layout of x, with contiguous strides unless x is channels-last around its channels."""
        is_dense = x.is_contiguous() or (channel % x.dim() == 1 and channels_last_format(x) is not None)
        strides = x.stride() if is_dense else torch.empty(x.shape, device="meta").stride()
        return Layout(x.shape, strides, x.dtype, channel, codec)

    def rows(self, x: Tensor) -> Tensor:
        """View a tensor of this shape as [R, S, C]; copied if its memory allows no such view."""
        return rows_of(x, self.channel, self.codec.codes_per_byte if self.codec else 1)

    def empty(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Allocate a tensor of this layout, and return it and its rows, a view."""
        out = torch.empty_strided(self.shape, self.strides, dtype=dtype or self.dtype, device=device)
        rows = self.rows(out)
        assert rows.untyped_storage()._cdata == out.untyped_storage()._cdata
        return out, rows


@dataclass(frozen=True)
class Coded:
    """Codes of one tensor.

    Args:
        values: from any_layout.encode.
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
    @torch.no_grad()
    def of(x: Tensor, channel: int, codec: Codec | None) -> "Coded":
        """Encode x itself, whatever computed it: about each channel's mean, or a rectified channel from 0."""
        layout = Layout.of(x, channel, codec)
        rows = layout.rows(x)
        vectors = any_layout.vectors_of(any_layout.channel_stats(rows), None, None, codec)
        return Coded(any_layout.encode(rows, rows, vectors, codec), vectors, layout)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors to save."""
        return self.values, self.vectors

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Coded":
        """Return the same with other tensors in their places."""
        values, vectors = tensors
        return replace(self, values=values, vectors=vectors)

    def after(self, function: Elementwise) -> "Coded":
        """Return the codes of function(y), which are those of y."""
        return replace(self, function=function)

    def viewed(self, view: Callable[[Tensor], Tensor]) -> "Coded":
        """Return the codes of a view, which are the same."""
        return replace(self, views=(*self.views, view))

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
        out, rows = self.layout.empty(self.values.device)
        any_layout.decode(*self._saved, self.function, rows)
        for view in self.views:
            out = view(out)
        return out

    def elementwise_grad(self, grad: Tensor, function: Elementwise) -> Tensor:
        """Compute dY from grad = dA of a = function(y)."""
        out, rows = self.layout.empty(grad.device, grad.dtype)
        any_layout.elementwise_grad(self.layout.rows(grad), *self._saved, function, rows)
        return out

    def norm_grad(
        self,
        norm_grad: Callable[..., tuple[Tensor, Tensor]],
        grad: Tensor,
        scale: Tensor,
        wants_dx: bool,
        **options: Any,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Compute dX, dgamma and dbeta from grad = dY by a function of any_layout."""
        out, rows = self.layout.empty(grad.device, grad.dtype) if wants_dx else (None, None)
        return out, *norm_grad(self.layout.rows(grad), *self._saved, scale, rows, **options)

    @property
    def _saved(self) -> tuple[Tensor, Tensor, Codec | None]:
        return self.values, self.vectors, self.layout.codec


@dataclass(frozen=True)
class Joined:
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

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Joined":
        """Return the same with other tensors in their places."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return Joined(tuple(part.with_tensors(pair) for part, pair in zip(self.parts, pairs, strict=True)), self.dim)

    def value(self) -> Tensor:
        """Decode the parts and join them."""
        return torch.cat([part.value() for part in self.parts], self.dim)


Saved = Coded | Joined


_EMPTY = torch.empty(0)


def save(ctx: Any, saved: Saved | None, *others: Tensor) -> None:
    """Save the codes, if any, for backward, others after them, so that autograd frees them."""
    codes = () if saved is None else saved.tensors
    ctx.save_for_backward(*codes, *others)
    ctx.saved = saved and saved.with_tensors([_EMPTY] * len(codes))


def load(ctx: Any) -> tuple[Any, list[Tensor]]:
    """Return what `save` saved: the codes and the others."""
    tensors = ctx.saved_tensors  # read once: each access unpacks them anew
    count = len(ctx.saved.tensors) if ctx.saved else 0
    return ctx.saved and ctx.saved.with_tensors(tensors[:count]), list(tensors[count:])


class _Tag:
    """What is known of a tensor at one count of its changes; copies and pickles of the tensor know nothing."""

    def __init__(self, saved: Saved | None, channel: int | None, version: int) -> None:
        self.saved, self.channel, self.version = saved, channel, version

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> None:
        return None


_NAME = "_blpa_tag"


def tag(tensor: Tensor, saved: Saved | None, channel: int | None) -> Tensor:
    """Put a tag on a tensor: what is saved of it, and which dimension holds its channels."""
    tensor._blpa_tag = _Tag(saved, channel, tensor._version)  # type: ignore[attr-defined]
    return tensor


def untag(tensor: Tensor) -> None:
    """Take the tag off a tensor."""
    if getattr(tensor, _NAME, None) is not None:
        del tensor._blpa_tag  # type: ignore[attr-defined]


def saved_of(tensor: Tensor) -> Saved | None:
    """Return what is saved of a tensor; None without a tag, or if the tensor was changed since."""
    found = getattr(tensor, _NAME, None)
    return found.saved if found is not None and found.version == tensor._version else None


def channel_of(tensor: Tensor) -> int:
    """Return the dimension of the channels: as its maker knows it, else 1, or the last of [N, tokens, C]."""
    found = getattr(tensor, _NAME, None)
    if found is not None and found.channel is not None:
        return int(found.channel)
    return -1 if tensor.dim() == 3 else min(1, tensor.dim() - 1)


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
    return out.detach() if out._is_view() else out


def shape_only(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor of this shape in the memory of one element, for functions that read its shape alone."""
    return like.new_zeros(()).expand(shape)
