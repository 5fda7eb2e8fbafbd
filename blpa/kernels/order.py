"""In which order the elements of a tensor of any layout lie in memory, and which of their codes share a byte."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blpa.codec import Codec


class Order(NamedTuple):
    """How the elements of a tensor lie in memory."""

    outer: int
    channels: int
    inner: int
    channels_last: bool
    """[outer, inner, C] instead of [outer, C, inner]."""

    @staticmethod
    def of(shape: Sequence[int], channel: int, channels_last: bool) -> "Order":
        """Return the order of a dense tensor of this shape and channel dimension."""
        channel %= len(shape)  # and math.prod, for shapes that a compiler leaves open
        return Order(math.prod(shape[:channel]), shape[channel], math.prod(shape[channel + 1 :]), channels_last)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.outer * self.channels * self.inner

    def matrices(self, x: Tensor) -> Tensor:
        """View a dense tensor, or its elements in their order in memory, as [outer, inner, C]."""
        if self.channels_last:
            x = x if x.dim() == 1 else x.movedim(1, -1)
            return x.reshape(self.outer, self.inner, self.channels)
        return x.reshape(self.outer, self.channels, self.inner).transpose(1, 2)

    def outer_first(self, bits: int) -> bool:
        """Return whether codes of different samples share a byte: unless pixels pack with less waste."""
        per_byte = 8 // bits if bits else 1
        return -self.outer % per_byte * self.inner <= -self.inner % per_byte * self.outer

    def rows(self, x: Tensor, bits: int) -> Tensor:
        """View a dense tensor, or its elements in their order in memory, as rows [R, S, C]."""
        matrices = self.matrices(x)
        return matrices if self.outer_first(bits) else matrices.transpose(0, 1)

    def packed_rows(self, values: Tensor, bits: int) -> Tensor:
        """View packed codes as [rows of bytes, S, C]."""
        matrices = self.packed(bits).matrices(values)
        return matrices if self.outer_first(bits) else matrices.transpose(0, 1)

    def packed(self, bits: int) -> "Order":
        """Return the order of the bytes of codes."""
        codec = Codec(bits)
        if self.outer_first(bits):
            return self._replace(outer=codec.packed_rows(self.outer))
        return self._replace(inner=codec.packed_rows(self.inner))

    def saved_elements(self, bits: int) -> int:
        """Return the number of elements that `encode` returns."""
        return self.packed(bits).numel if bits else 2 * self.numel

    def of_rows(self, vector: Tensor, bits: int) -> Tensor:
        """View a tensor [outer or 1, C or 1] so that it broadcasts to rows [R, S, C]."""
        return vector.unsqueeze(1 if self.outer_first(bits) else 0)


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """Return x with its elements in this order; x itself if they are."""
    return x.contiguous(memory_format=_memory_format(x.dim(), channels_last))


def empty(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a dense tensor."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=_memory_format(len(shape), channels_last))


def _memory_format(dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d
