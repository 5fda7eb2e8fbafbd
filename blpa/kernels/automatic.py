"""The backend of a layer that names none: it follows the tensor's device, in each call."""

import functools
from typing import Any

import torch
from torch import Tensor

from blpa.kernels import Kernels
from blpa.kernels.available import supports_triton
from blpa.kernels.reference import REFERENCE


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return Triton's kernels on a GPU that they support, unless the arithmetic is in float64; else plain PyTorch's."""
    if device.type != "cuda" or dtype == torch.float64 or not _has_triton(device):
        return REFERENCE
    from blpa.kernels.triton_ops import TRITON

    return TRITON


_runs_triton = functools.cache(supports_triton)


def _has_triton(device: torch.device) -> bool:
    return _runs_triton(device)


_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # by torch.compiler, which loads the compiler


class AutomaticKernels:
    """The backend; see kernels.Kernels for the contract."""

    name = "auto"

    def __repr__(self) -> str:
        """Return the same text in every process, for the text of layers that contain this."""
        return f"<kernels {self.name}>"

    def channel_stats(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """See Kernels."""
        return kernels_for(x.device, x.dtype).channel_stats(x, *args, **options)

    def normalise_rectify_encode(self, x: Tensor, vectors: Tensor, **options: Any) -> Tensor | None:
        """See Kernels."""
        return kernels_for(x.device, vectors.dtype).normalise_rectify_encode(x, vectors, **options)

    def decode(self, saved: Tensor, vectors: Tensor, **options: Any) -> None:
        """See Kernels."""
        kernels_for(saved.device, vectors.dtype).decode(saved, vectors, **options)

    def backward(self, grad: Tensor, saved: Tensor, vectors: Tensor, **options: Any) -> Tensor:
        """See Kernels."""
        return kernels_for(grad.device, vectors.dtype).backward(grad, saved, vectors, **options)

    def pointwise_weight_grad(self, grad: Tensor, saved: Tensor, vectors: Tensor, **options: Any) -> Tensor | None:
        """See Kernels."""
        return kernels_for(grad.device, vectors.dtype).pointwise_weight_grad(grad, saved, vectors, **options)


AUTOMATIC = AutomaticKernels()
