"""What one batch norm and ReLU leaves for the backward pass, its own and that of the convolutions that read it.

    4-bit unit      values = codes [N H W / 2, C] uint8,   vectors [9, C]
    full precision  values = x [N, C, H, W],               vectors [9, C]

Autograd saves the two tensors like any others, with each function that needs them, and frees them when the last one's
backward pass is done. The vectors hold gamma and beta as they were in the forward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Code
from blpa.kernels import Kernels


@dataclass(frozen=True)
class Layout:
    """How to read the kept tensors: everything about them that is not a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, torch.dtype]
    """Of gamma and beta."""
    code: Code | None
    kernels: Kernels
    counter: Tensor | None
    """See Kernels."""


class Kept:
    """What one batch norm and ReLU leaves for the backward pass, its own and that of the convolutions that read it."""

    def __init__(self, values: Tensor, vectors: Tensor, layout: Layout) -> None:
        self.values = values
        self.vectors = vectors
        self.layout = layout
        self.made_a_version = 0  # autograd's count of changes to a, when it was made

    @property
    def nbytes(self) -> int:
        """Bytes that are alive only because they are kept."""
        return self.values.nbytes + self.vectors.nbytes

    def decode(self, dtype: torch.dtype) -> Tensor:
        """A~ [N, C, H, W], channels-last, in the given dtype."""
        shape, device = self.layout.shape, self.values.device
        a = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        self.layout.kernels.decode(self._rows, self.vectors, code=self.layout.code, out=rows(a))
        return a

    def pointwise_weight_grad(self, grad: Tensor) -> Tensor | None:
        """Gradient dW [C_out, C] of a 1x1 convolution for grad = G, where the backend makes it from the codes."""
        kernels, code = self.layout.kernels, self.layout.code
        grad_rows = rows(grad.contiguous(memory_format=torch.channels_last))
        return kernels.pointwise_weight_grad(grad_rows, self._rows, self.vectors, code=code)

    def batch_norm_backward(
        self, grad: Tensor, *, constant_stats: bool, overwrite_grad: bool = False, add: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dX, dgamma and dbeta for grad = dA; `add`, a gradient that x has from elsewhere, is added to dX.

        dX takes the place of grad only where that is known to be nobody else's: autograd may have handed its own
        to hooks, callers or other functions too.
        """
        channels_last = grad.contiguous(memory_format=torch.channels_last)
        grad_rows = rows(channels_last)
        overwrite = overwrite_grad or channels_last is not grad
        dx = channels_last if overwrite else torch.empty_like(grad)
        dbeta, dgamma = self.layout.kernels.backward(
            grad_rows,
            self._rows,
            self.vectors,
            code=self.layout.code,
            constant_stats=constant_stats,
            out=grad_rows if overwrite else rows(dx),
            add=None if add is None else rows(add.contiguous(memory_format=torch.channels_last)),
            counter=self.layout.counter,
        ).unbind(0)
        gamma_dtype, beta_dtype = self.layout.parameter_dtypes
        return dx, dgamma.to(gamma_dtype), dbeta.to(beta_dtype)

    def save(self, ctx: Any, *others: Tensor) -> None:
        """Hand the tensors, and others after them, to autograd, and remember how to read them."""
        ctx.save_for_backward(self.values, self.vectors, *others)
        ctx.layout = self.layout

    @staticmethod
    def saved(ctx: Any) -> tuple["Kept", list[Tensor]]:
        """What `save` saved: the Kept and the others."""
        values, vectors, *others = ctx.saved_tensors  # read once: each reading unpacks them anew
        return Kept(values, vectors, ctx.layout), others

    @property
    def _rows(self) -> Tensor:
        return self.values if self.layout.code else rows(self.values)


def rows(x: Tensor) -> Tensor:
    """View the data of x [N, C, H, W] in channels-last memory as [N H W, C]."""
    batch, channels, height, width = x.shape
    return x.as_strided((batch * height * width, channels), (channels, 1))
