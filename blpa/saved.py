"""Tensors that a batch norm + ReLU saves for backward, shared with the convolutions that consume its output.

    4 bits          values = codes [N H W / 2, C] uint8,   vectors [9, C]
    full precision  values = x [N, C, H, W],               vectors [9, C]

Stock layers save two full-precision tensors: batch norm its input, the convolutions theirs. Here all functions save the
same two tensors, and autograd frees them after the last backward function. The vectors include gamma and beta as they
were in the forward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import Kernels
from blpa.tracing import Changes, is_traced


class Layout(NamedTuple):
    """How to decode the saved tensors: shape [N, C, H, W] and dtype of the activation, codec and backend."""

    shape: torch.Size
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, torch.dtype]
    """Dtypes of gamma and beta."""
    codec: Codec | None
    kernels: Kernels
    counter: Tensor | None
    """See Kernels."""


class SavedActivation:
    """Tensors that one batch norm + ReLU saves for backward, and the functions that read them.

    Args:
        values: packed codes, uint8 [codec.packed_rows(N H W), C]; without a codec x [N, C, H, W].
        vectors: Norm [9, C].
        layout: how to decode them.
    """

    def __init__(self, values: Tensor, vectors: Tensor, layout: Layout) -> None:
        self.values = values
        self.vectors = vectors
        self.layout = layout
        self.output_changes = Changes(0, 0)
        """Of the output a, when it was returned."""

    @property
    def nbytes(self) -> int:
        """Bytes of the saved tensors."""
        return self.values.nbytes + self.vectors.nbytes

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Decode a~ [N, C, H, W], channels-last, in the given dtype."""
        a, a_rows = new_activation(self.layout.shape, dtype, self.values.device)
        self.layout.kernels.decode(self._rows, self.vectors, codec=self.layout.codec, out=a_rows)
        return a

    def pointwise_weight_grad(self, grad: Tensor) -> Tensor | None:
        """Compute dW [C_out, C] of a 1x1 convolution from grad = G; None if the backend needs a~ for it."""
        if is_traced():  # the backend asks for settings that a compiler cannot trace
            return None
        kernels, codec = self.layout.kernels, self.layout.codec
        grad_rows = rows(grad.contiguous(memory_format=torch.channels_last))
        return kernels.pointwise_weight_grad(grad_rows, self._rows, self.vectors, codec=codec)

    def batch_norm_backward(
        self, grad: Tensor, *, constant_stats: bool, overwrite_grad: bool = False, add: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dX, dgamma and dbeta from grad = dA.

        Args:
            grad: dA [N, C, H, W].
            constant_stats: the statistics did not depend on x.
            overwrite_grad: dX may overwrite grad: the caller owns it. Autograd may have given the same tensor to hooks
                or other functions.
            add: another gradient of x [N, C, H, W], which is added to dX.

        Returns:
            dX [N, C, H, W]; dgamma and dbeta [C] in their parameters' dtypes.
        """
        channels_last = grad.contiguous(memory_format=torch.channels_last)
        dx, dx_rows = channels_last, rows(channels_last)
        grad_rows = dx_rows
        if is_traced() or not (overwrite_grad or channels_last is not grad):
            dx, dx_rows = new_activation(grad.shape, grad.dtype, grad.device)
        dbeta, dgamma = self.layout.kernels.backward(
            grad_rows,
            self._rows,
            self.vectors,
            codec=self.layout.codec,
            constant_stats=constant_stats,
            out=dx_rows,
            add=None if add is None else rows(add.contiguous(memory_format=torch.channels_last)),
            counter=self.layout.counter,
        ).unbind(0)
        gamma_dtype, beta_dtype = self.layout.parameter_dtypes
        return dx, dgamma.to(gamma_dtype), dbeta.to(beta_dtype)

    def save(self, ctx: Any, *others: Tensor) -> None:
        """Save the tensors, others after them, and the layout for backward."""
        ctx.save_for_backward(self.values, self.vectors, *others)
        ctx.layout = self.layout

    @staticmethod
    def load(ctx: Any) -> tuple["SavedActivation", list[Tensor]]:
        """Return what `save` saved: this object and the others."""
        values, vectors, *others = ctx.saved_tensors  # read once: each access unpacks them anew
        return SavedActivation(values, vectors, ctx.layout), others

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
