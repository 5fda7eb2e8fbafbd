"""Tensors that a batch norm + ReLU saves for backward, shared with the convolutions that consume its output.

    4 bits          values = codes [N H W / 2, C] uint8,   vectors [9, C]
    full precision  values = x [N, C, H, W],               vectors [9, C]

Stock layers save two full-precision tensors: batch norm its input, the convolutions theirs. Here all functions save the
same two tensors, and autograd frees them after the last backward function. The vectors include gamma and beta as they
were in the forward pass.

Where a max pool follows the ReLU, a third tensor has the place of each maximum in its window, one byte per output. The
pooled activation and both gradients follow from the three.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import Kernels
from blpa.kernels.library import OPERATIONS
from blpa.processes import means_of_all
from blpa.tracing import Changes, is_traced

Slices = tuple[slice, ...]


class MaxPool(NamedTuple):
    """A max pool over square windows: their size, the distance from one to the next, and the padding, in pixels.

    The gradient is added up window place by window place, so no two threads add to one pixel and no index of a pixel,
    eight bytes each, is needed.
    """

    kernel_size: int
    stride: int
    padding: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maxima of x [N, C, H, W], channels-last: [N, C, h, w], and their places, uint8, likewise.

        Raises:
            ValueError: a window has more than 16 x 16 places, or is larger than x.
        """
        if not self.kernel_size <= min(16, *x.shape[2:]):
            raise ValueError(
                f"kernel_size = {self.kernel_size}: must be at most 16, and the height and width of x, {list(x.shape)}"
            )
        windows = [self.kernel_size] * 2, [self.stride] * 2, [self.padding] * 2, [1, 1]
        out, places = OPERATIONS.max_pool(x, *windows, False)
        return tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in (out, places))  # type: ignore[return-value]

    def values(self, x: Tensor, places: Tensor) -> Tensor:
        """Read x [N, C, H, W] at the places: [N, C, h, w], channels-last."""
        found = torch.zeros_like(places, dtype=x.dtype)
        for place, pixels, outputs in self._places(x.shape, places.shape):
            part = found[outputs]
            part.copy_(torch.where(places[outputs] == place, x[pixels], part))
        return found

    def input_grad(self, grad: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        """Compute dX of this shape [N, C, H, W], channels-last, from the gradient of the maxima."""
        dx = grad.new_zeros(shape).contiguous(memory_format=torch.channels_last)
        for place, pixels, outputs in self._places(shape, places.shape):
            dx[pixels] += grad[outputs].masked_fill(places[outputs] != place, 0)
        return dx

    def _places(self, shape: torch.Size, shape_out: torch.Size) -> Iterator[tuple[int, Slices, Slices]]:
        """List each place of a window, the pixels that are there in some window, and those windows' outputs."""
        sizes = list(zip(shape[2:], shape_out[2:], strict=True))
        for place in range(self.kernel_size**2):
            pixels, outputs = [slice(None)] * 2, [slice(None)] * 2
            for at, (size, size_out) in zip(divmod(place, self.kernel_size), sizes, strict=True):
                offset = at - self.padding
                first = max(0, -(offset // self.stride))
                last = min(size_out - 1, (size - 1 - offset) // self.stride)
                pixels.append(slice(first * self.stride + offset, last * self.stride + offset + 1, self.stride))
                outputs.append(slice(first, last + 1))
            yield place, tuple(pixels), tuple(outputs)


class Layout(NamedTuple):
    """How to decode the saved tensors: shape [N, C, H, W] and dtype of max(y, 0), codec, backend, and the max pool."""

    shape: torch.Size
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, torch.dtype]
    """Dtypes of gamma and beta."""
    codec: Codec | None
    kernels: Kernels
    counter: Tensor | None
    """See Kernels."""
    group: Any
    """Of processes whose samples share the statistics (blpa/processes.py); None if these are of this one's alone."""
    max_pool: MaxPool | None


class SavedActivation:
    """Tensors that one batch norm + ReLU saves for backward, and the functions that read them.

    Args:
        values: packed codes, uint8 [codec.packed_rows(N H W), C]; without a codec x [N, C, H, W].
        vectors: Norm [9, C].
        layout: how to decode them.
        places: of the maxima, uint8 [N, C, h, w]; None without a max pool.
    """

    def __init__(self, values: Tensor, vectors: Tensor, layout: Layout, places: Tensor | None = None) -> None:
        self.values = values
        self.vectors = vectors
        self.layout = layout
        self.places = places
        self.output_changes = Changes(0, 0)
        """Of the output a, when it was returned."""

    @property
    def nbytes(self) -> int:
        """Bytes of the saved tensors."""
        return self.values.nbytes + self.vectors.nbytes + (0 if self.places is None else self.places.nbytes)

    @property
    def shape(self) -> torch.Size:
        """Shape of a: after the max pool, if there is one."""
        return self.layout.shape if self.places is None else self.places.shape

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Decode a~, of a's shape, channels-last, in the given dtype."""
        a, a_rows = new_activation(self.layout.shape, dtype, self.values.device)
        self.layout.kernels.decode(self._rows, self.vectors, codec=self.layout.codec, out=a_rows)
        return a if self.layout.max_pool is None else self.layout.max_pool.values(a, cast(Tensor, self.places))

    def pointwise_weight_grad(self, grad: Tensor) -> Tensor | None:
        """Compute dW [C_out, C] of a 1x1 convolution from grad = G; None if the backend needs a~ for it."""
        if is_traced() or self.places is not None:  # the backend asks for settings that a compiler cannot trace
            return None
        kernels, codec = self.layout.kernels, self.layout.codec
        grad_rows = rows(grad.contiguous(memory_format=torch.channels_last))
        return kernels.pointwise_weight_grad(grad_rows, self._rows, self.vectors, codec=codec)

    def batch_norm_backward(
        self, grad: Tensor, *, constant_stats: bool, overwrite_grad: bool = False, add: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dX, dgamma and dbeta from grad = dA.

        Args:
            grad: dA, of a's shape.
            constant_stats: the statistics did not depend on x.
            overwrite_grad: dX may overwrite grad: the caller owns it. Autograd may have given the same tensor to hooks
                or other functions.
            add: another gradient of x [N, C, H, W], which is added to dX.

        Returns:
            dX [N, C, H, W]; dgamma and dbeta [C] in their parameters' dtypes.
        """
        if self.layout.max_pool is not None:
            grad = self.layout.max_pool.input_grad(grad, cast(Tensor, self.places), self.layout.shape)
            overwrite_grad = True
        channels_last = grad.contiguous(memory_format=torch.channels_last)
        dx, dx_rows = channels_last, rows(channels_last)
        grad_rows = dx_rows
        if is_traced() or not (overwrite_grad or channels_last is not grad):
            dx, dx_rows = new_activation(grad.shape, grad.dtype, grad.device)
        means = None
        if self.layout.group is not None and not constant_stats:
            means = functools.partial(means_of_all, rows=grad_rows.shape[0], group=self.layout.group)
        dbeta, dgamma = self.layout.kernels.backward(
            grad_rows,
            self._rows,
            self.vectors,
            codec=self.layout.codec,
            constant_stats=constant_stats,
            out=dx_rows,
            add=None if add is None else rows(add.contiguous(memory_format=torch.channels_last)),
            counter=self.layout.counter,
            means=means,
        ).unbind(0)
        gamma_dtype, beta_dtype = self.layout.parameter_dtypes
        return dx, dgamma.to(gamma_dtype), dbeta.to(beta_dtype)

    def save(self, ctx: Any, *others: Tensor) -> None:
        """Save the tensors, others after them, and the layout for backward."""
        places = () if self.places is None else (self.places,)
        ctx.save_for_backward(self.values, self.vectors, *places, *others)
        ctx.layout = self.layout

    @staticmethod
    def load(ctx: Any) -> tuple["SavedActivation", list[Tensor]]:
        """Return what `save` saved: this object and the others."""
        values, vectors, *others = ctx.saved_tensors  # read once: each access unpacks them anew
        places = None if ctx.layout.max_pool is None else others.pop(0)
        return SavedActivation(values, vectors, ctx.layout, places), others

    @property
    def _rows(self) -> Tensor:
        return self.values if self.layout.codec else rows(self.values)


def rows(x: Tensor) -> Tensor:
    """View x [N, C, H, W], in channels-last memory, as [N H W, C]; while a compiler traces, whatever x's memory."""
    batch, channels, height, width = x.shape
    if is_traced():
        return x.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    return x.as_strided((batch * height * width, channels), (channels, 1))


def new_activation(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate x [N, C, H, W], channels-last, and return it and its rows [N H W, C]."""
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    return x, rows(x)
