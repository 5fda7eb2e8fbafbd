"""What one batch norm and ReLU leaves for the backward pass, its own and that of the convolutions that read it.

    4-bit unit     codes [N H W / 2, C] uint8,   rstd [C]
    full precision x [N, C, H, W],               mean [C], rstd [C]

Autograd saves the tensors like any others, with each function that needs them, and frees them when the last one's
backward pass is done. gamma and beta are saved as the parameters they are, so that autograd notices if they change in
between.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blpa.codec import Code
from blpa.kernels import Kernels, Norm


class KeptTensors(NamedTuple):
    """What is kept, as autograd saves it."""

    values: Tensor
    """Packed codes uint8 [code.packed_rows(N H W), C]; x itself [N, C, H, W] where there is no code."""
    mean: Tensor | None
    """Mean [C]; only where there is no code."""
    rstd: Tensor
    """1 / sqrt(var + eps) [C]."""
    gamma: Tensor
    """The scale parameter, not a copy."""
    beta: Tensor
    """The shift parameter, not a copy."""


@dataclass(frozen=True)
class Layout:
    """How to read KeptTensors: everything about them that is not a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    code: Code | None
    kernels: Kernels


class Kept:
    """What one batch norm and ReLU leaves for the backward pass, its own and that of the convolutions that read it."""

    def __init__(self, tensors: KeptTensors, layout: Layout) -> None:
        self.tensors = tensors
        self.layout = layout
        self.made_a_version = 0  # autograd's count of changes to a, when it was made

    @property
    def nbytes(self) -> int:
        """Bytes that are alive only because they are kept: values and per-channel vectors, not the parameters."""
        vectors = [self.tensors.values, self.tensors.rstd, self.tensors.mean]
        return sum(tensor.nbytes for tensor in vectors if tensor is not None)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """A~ [N, C, H, W], channels-last, in the given dtype."""
        values, norm = self._values_and_norm()
        a = torch.empty(self.layout.shape, dtype=dtype, device=values.device, memory_format=torch.channels_last)
        self.layout.kernels.decode(values, norm, code=self.layout.code, out=rows(a))
        return a

    def batch_norm_backward(self, grad: Tensor, *, constant_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dX, dgamma and dbeta for grad = dA.

        dX does not take the place of grad, which autograd may have handed to hooks, callers or other functions too.
        """
        (values, norm), code, kernels = self._values_and_norm(), self.layout.code, self.layout.kernels
        channels_last = grad.contiguous(memory_format=torch.channels_last)
        grad_rows = rows(channels_last)
        is_copy = channels_last is not grad
        dx = channels_last if is_copy else torch.empty_like(grad)
        dx_rows = grad_rows if is_copy else rows(dx)
        dbeta, dgamma = kernels.grad_sums(grad_rows, values, norm, code=code)
        through_stats = (torch.zeros_like(dbeta),) * 2 if constant_stats else (dbeta, dgamma)
        kernels.input_grad(grad_rows, values, norm, *through_stats, code=code, out=dx_rows)
        return dx, dgamma.to(self.tensors.gamma.dtype), dbeta.to(self.tensors.beta.dtype)

    def save(self, ctx: Any, *others: Tensor) -> None:
        """Hand the tensors, and others after them, to autograd, and remember how to read them."""
        ctx.save_for_backward(*self.tensors, *others)
        ctx.layout = self.layout

    @staticmethod
    def saved(ctx: Any) -> tuple["Kept", list[Tensor]]:
        """What `save` saved: the Kept and the others."""
        tensors, count = ctx.saved_tensors, len(KeptTensors._fields)  # read once: each reading unpacks them anew
        return Kept(KeptTensors(*tensors[:count]), ctx.layout), list(tensors[count:])

    def _values_and_norm(self) -> tuple[Tensor, Norm]:
        values, mean, rstd, gamma, beta = self.tensors
        return values if self.layout.code else rows(values), norm_of(mean, rstd, gamma, beta, self.layout.code)


def norm_of(mean: Tensor | None, rstd: Tensor, gamma: Tensor, beta: Tensor, code: Code | None) -> Norm:
    """The per-channel vectors that the kernels need, parameters in the dtype of rstd."""
    gamma, beta = gamma.detach().to(rstd.dtype), beta.detach().to(rstd.dtype)
    return Norm(mean, rstd, gamma, beta, code.grid(gamma, beta) if code else None)


def rows(x: Tensor) -> Tensor:
    """View the data of x [N, C, H, W] in channels-last memory as [N H W, C]."""
    return x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
