"""A convolution and its two gradients, each by itself.

    out = conv(a, W),    dW = conv_weight_grad(a, G),    dA = conv_input_grad(W, G)

PyTorch's own function makes both gradients at once, from an a that it kept. Here a~ is made for dW alone and freed
before dA, which is as large, is made.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias; the fields are torch.nn.functional.conv2d's, a number for both directions or a pair.

    Args:
        stride: distance between the places where it is taken.
        padding: zeros added on each side.
        dilation: distance between the weights.
        groups: groups of channels that do not mix.
    """

    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1

    def __call__(self, a: Tensor, weight: Tensor) -> Tensor:
        """Out [N, C_out, H_out, W_out] of a [N, C, H, W] and W [C_out, C / groups, k_h, k_w]."""
        if a.is_meta:  # there a convolution loses the memory format, and a copy would be counted
            return torch.empty(self._size(a, weight), dtype=a.dtype, device="meta", memory_format=torch.channels_last)
        return F.conv2d(a, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether out is a product of rows: a 1x1 convolution that takes every pixel and mixes all channels."""
        stride, padding, _ = self._pairs()
        return weight.shape[2:] == (1, 1) and (stride, padding, self.groups) == ((1, 1), (0, 0), 1)

    def weight_grad(self, grad: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        """Gradient dW for grad = G; a and W, of which only the shape is used, are of its dtype, and so is dW."""
        stride, padding, dilation = self._pairs()
        which = (False, True, False)  # the gradients of input, weight and bias
        return cast(
            Tensor,
            torch.ops.aten.convolution_backward(
                grad, a, weight, None, stride, padding, dilation, False, (0, 0), self.groups, which
            )[1],
        )

    def input_grad(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Gradient dA for an a of that size, in the dtype of grad = G and W: the transposed convolution of G."""
        if grad.is_meta:  # as above
            return torch.empty(size, dtype=grad.dtype, device="meta", memory_format=torch.channels_last)
        stride, padding, dilation = self._pairs()
        height_width, kernel = size[2:], weight.shape[2:]
        # Rows and columns that the stride rounded away come back as output padding.
        lost = [
            height_width[i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
            for i in range(2)
        ]
        return F.conv_transpose2d(grad, weight, None, stride, padding, lost, self.groups, dilation)

    def _size(self, a: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """Shape of out."""
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
    """W in the dtype of the convolution: autocast's, where that is on.

    F.conv2d would make the same cast. Made here, it is there for the backward pass too, where autocast is off.
    """
    device = weight.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not is_cast or weight.dtype == torch.float64:  # which autocast leaves alone
        return weight
    return weight.to(torch.get_autocast_dtype(device))
