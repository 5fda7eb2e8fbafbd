"""A convolution and its two gradients as separate functions.

    out = conv(a, W),    dW = conv_weight_grad(a, G),    dA = conv_input_grad(W, G)

PyTorch's backward pass computes both gradients in one function, from the saved a. Here a~ is decoded for dW only and
freed before dA is allocated, which has the same size.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blpa.tracing import is_traced

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias; its options are those of torch.nn.functional.conv2d.

    Args:
        stride: step in pixels, one number or a (height, width) pair; so are the next two.
        padding: zeros added on each side.
        dilation: distance between taps of the kernel.
        groups: groups of channels that do not mix.
    """

    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1

    def __call__(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute out [N, C_out, H_out, W_out] from a [N, C, H, W] and W [C_out, C / groups, k_h, k_w]."""
        if a.is_meta:  # conv2d would lose the memory format there, and a copy would be counted
            return torch.empty(self._size(a, weight), dtype=a.dtype, device="meta", memory_format=torch.channels_last)
        return F.conv2d(a, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def is_pointwise(self, weight: Tensor) -> bool:
        """Return whether out is a matrix product: a 1x1 convolution of stride 1 without padding or groups."""
        stride, padding, _ = self._pairs()
        return weight.shape[2:] == (1, 1) and (stride, padding, self.groups) == ((1, 1), (0, 0), 1)

    def weight_grad(self, grad: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        """Compute dW from grad = G, a and the shape of W; all have one dtype."""
        stride, padding, dilation = self._pairs()
        which = (False, True, False)  # gradient of input, weight, bias
        return cast(
            Tensor,
            torch.ops.aten.convolution_backward(
                grad, a, weight, None, stride, padding, dilation, False, (0, 0), self.groups, which
            )[1],
        )

    def input_grad(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Compute dA of shape `size`, the transposed convolution of grad = G; G, W and dA have one dtype."""
        if grad.is_meta:  # as above
            return torch.empty(size, dtype=grad.dtype, device="meta", memory_format=torch.channels_last)
        stride, padding, dilation = self._pairs()
        height_width, kernel = size[2:], weight.shape[2:]
        # Output padding restores rows and columns that the stride skipped at the end.
        lost = [
            height_width[i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
            for i in range(2)
        ]
        return F.conv_transpose2d(grad, weight, None, stride, padding, lost, self.groups, dilation)

    def _size(self, a: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        stride, padding, dilation = self._pairs()
        height, width = (
            (a.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        return a.shape[0], weight.shape[0], height, width

    def _pairs(self) -> tuple[Pair, Pair, Pair]:
        stride, padding, dilation = (
            (v, v) if isinstance(v, int) else v for v in (self.stride, self.padding, self.dilation)
        )
        return stride, padding, dilation


def as_computed(weight: Tensor) -> Tensor:
    """Return W in the dtype of the convolution: autocast's if it is on.

    F.conv2d makes the same cast. Made here, it also serves the backward pass, where autocast is off.
    """
    device = weight.device.type
    # A compiler cannot trace the question in torch 2.11, and compiles for devices that have autocast.
    has_autocast = is_traced() or torch.amp.is_autocast_available(device)
    is_cast = has_autocast and torch.is_autocast_enabled(device)
    if not is_cast or weight.dtype == torch.float64:  # autocast leaves float64 unchanged
        return weight
    return weight.to(torch.get_autocast_dtype(device))
