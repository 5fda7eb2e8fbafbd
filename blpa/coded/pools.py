"""Pooling and dropout, whose gradients need the place of a maximum, a shape or a bit per element, and no input.

    max pooling        the maximum's place in its window, one byte per output: PyTorch saves the input and an int64
    average pooling    the shape: PyTorch saves the input
    dropout            one bit per element

All gradients are PyTorch's own, to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blpa.coded.activations import pack_bits, unpack_bits
from blpa.coded.mode import Coding, is_recording
from blpa.coded.once import differentiable_once
from blpa.coded.products import per_dimension
from blpa.coded.tensors import channels_last_format, not_a_view, shape_only

Windows = tuple[list[int], list[int], list[int], list[int], bool]
"""kernel_size, stride, padding, dilation and ceil_mode of aten's functions."""


class _MaxPool(torch.autograd.Function):
    """x -> its maxima over windows of two or three dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows) -> Tensor:
        kernel, stride, padding, dilation, ceil_mode = windows
        pool = F.max_pool2d if len(kernel) == 2 else F.max_pool3d
        out, index = pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
        ctx.windows, ctx.like = windows, _like(x)
        ctx.save_for_backward(_places(index, x.shape, windows))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        x = ctx.like(grad)
        index = _index(places, x.shape, ctx.windows)
        dims = len(ctx.windows[0])
        aten = torch.ops.aten
        backward = aten.max_pool2d_with_indices_backward if dims == 2 else aten.max_pool3d_with_indices_backward
        return backward(grad, x, *ctx.windows, index), None


def _places(index: Tensor, shape: torch.Size, windows: Windows) -> Tensor:
    """Turn indices into planes of x [..., H, W] into places in windows, uint8; int32 indices if windows are large."""
    kernel = windows[0]
    if torch.Size(kernel).numel() > 256:
        return index.int()
    place = torch.zeros_like(index, dtype=torch.uint8)
    for dim, start in enumerate(_starts(index, windows)):
        size = shape[len(shape) - len(kernel) + dim]
        along = (index // shape[len(shape) - len(kernel) + dim + 1 :].numel()).remainder_(size)  # int64: one at a time
        place.mul_(kernel[dim]).add_(along.sub_(start).floor_divide_(windows[3][dim]).to(torch.uint8))
        del along
    return place


def _index(places: Tensor, shape: torch.Size, windows: Windows) -> Tensor:
    """Undo `_places`: int64 indices into planes of x."""
    kernel = windows[0]
    if places.dtype != torch.uint8:
        return places.long()
    index = torch.zeros_like(places, dtype=torch.int64)
    for dim, start in enumerate(_starts(places, windows)):
        offset = places // torch.Size(kernel[dim + 1 :]).numel() % kernel[dim]
        index.mul_(shape[len(shape) - len(kernel) + dim]).add_(offset, alpha=windows[3][dim]).add_(start)
    return index


def _starts(index: Tensor, windows: Windows) -> list[Tensor]:
    """Return where each output's window starts in x, for each dimension; they broadcast to the outputs."""
    kernel, stride, padding, *_ = windows
    starts = []
    for dim in range(len(kernel)):
        size = index.shape[index.dim() - len(kernel) + dim]
        start = torch.arange(size, device=index.device) * stride[dim] - padding[dim]
        starts.append(start.view(-1, *(1,) * (len(kernel) - 1 - dim)))
    return starts


class _LinearMap(torch.autograd.Function):
    """x -> call(x), a linear map of x such as an average pooling, whose gradient is the same at every x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.call, ctx.like = call, _like(x)
        return not_a_view(call(x))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.like(grad).requires_grad_()
        with torch.enable_grad():
            out = ctx.call(x)
        return torch.autograd.grad(out, x, grad)[0], None


class _Dropout(torch.autograd.Function):
    """x -> x mask / (1 - p), with the random numbers of PyTorch's dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cuda":  # one kernel
            out, mask = torch.ops.aten.native_dropout(x, p, True)
        else:
            noise = torch.empty_like(x).bernoulli_(1 - p)
            mask = noise != 0
            out = x * noise.div_(1 - p)
        ctx.p = p
        ctx.save_for_backward(pack_bits(mask))
        return cast(Tensor, out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        mask = unpack_bits(bits, grad.shape)
        if grad.device.type == "cuda":
            return torch.ops.aten.native_dropout_backward(grad, mask, 1 / (1 - ctx.p)), None
        return grad * mask.to(grad.dtype).div_(1 - ctx.p), None


def _like(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function of a gradient that makes a tensor of x's shape and memory format, with any values."""
    shape, memory_format = x.shape, channels_last_format(x)
    if memory_format is None:
        return lambda grad: shape_only(shape, grad)
    return lambda grad: grad.new_zeros(()).expand(shape).contiguous(memory_format=memory_format)


def max_pool(dims: int) -> Callable[..., Any]:
    """Return the coded torch.nn.functional.max_pool1d, max_pool2d or max_pool3d."""

    def handler(
        coding: Coding,
        function: Any,
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if not is_recording(input) or return_indices:
            return NotImplemented
        stride = kernel_size if stride is None or (isinstance(stride, Sequence) and not stride) else stride
        kernel, step, zeros, spread = (per_dimension(value, dims) for value in (kernel_size, stride, padding, dilation))
        channel = coding.tags.channel(input)
        coding.coded_calls += 1
        if dims > 1:
            return coding.tag(_MaxPool.apply(input, (kernel, step, zeros, spread, ceil_mode)), None, channel)
        windows = ([1, *kernel], [1, *step], [0, *zeros], [1, *spread], ceil_mode)
        return coding.tag(_MaxPool.apply(input.unsqueeze(-2), windows).squeeze(-2), None, channel)

    return handler


def average_pool(coding: Coding, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Coded torch.nn.functional.avg_pool1d, avg_pool2d and avg_pool3d."""
    if not is_recording(input):
        return NotImplemented
    channel = coding.tags.channel(input)
    coding.coded_calls += 1
    return coding.tag(_LinearMap.apply(input, lambda x: function(x, *args, **kwargs)), None, channel)


def adaptive_average_pool(coding: Coding, function: Any, input: Tensor, output_size: Any) -> Any:
    """Coded torch.nn.functional.adaptive_avg_pool1d, 2d and 3d; to one pixel it is a mean, which saves nothing."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    if all(size == 1 for size in sizes):
        return NotImplemented
    return average_pool(coding, function, input, output_size)


def dropout(
    coding: Coding, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Coded torch.nn.functional.dropout."""
    if not is_recording(input) or not training or not 0 < p < 1 or inplace or not input.numel():
        return NotImplemented
    channel = coding.tags.channel(input)
    coding.coded_calls += 1
    return coding.tag(_Dropout.apply(input, p), None, channel)
