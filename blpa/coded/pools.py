"""Pooling and dropout, whose gradients need the place of a maximum, a shape or a bit per element, and no input.

    max pooling        the maximum's place in its window, one byte per output: PyTorch saves the input and an int64
    average pooling    the shape: PyTorch saves the input
    dropout            one bit per element

All gradients are PyTorch's own, to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from blpa.coded.mode import Coding, is_recording
from blpa.coded.products import per_dimension
from blpa.coded.tensors import channels_last_format, not_a_view, shape_only
from blpa.kernels.library import OPERATIONS
from blpa.once import differentiable_once

Windows = tuple[list[int], list[int], list[int], list[int], bool]
"""kernel_size, stride, padding, dilation and ceil_mode of aten's functions."""


class _MaxPool(torch.autograd.Function):
    """x -> its maxima over windows of two or three dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows) -> Tensor:
        out, places = OPERATIONS.max_pool(x, *windows)
        ctx.windows, ctx.like = windows, _like(x)
        ctx.save_for_backward(places)
        return cast(Tensor, out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return OPERATIONS.max_pool_grad(grad, ctx.like(grad), places, *ctx.windows), None


class _AveragePool(torch.autograd.Function):
    """x -> call(x), whose gradient is the same at every x: backward(G, x), which reads x's shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.backward, ctx.like = backward, _like(x)
        return not_a_view(call(x))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward(grad, ctx.like(grad)), None, None


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
        ctx.save_for_backward(OPERATIONS.pack_bits(mask))
        return cast(Tensor, out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        mask = OPERATIONS.unpack_bits(bits, grad.shape)
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


def average_pool(dims: int) -> Callable[..., Any]:
    """Return the coded torch.nn.functional.avg_pool1d, avg_pool2d or avg_pool3d."""

    def handler(
        coding: Coding,
        function: Any,
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *divisor: Any,
        **named_divisor: Any,
    ) -> Any:
        step = kernel_size if stride is None or (isinstance(stride, Sequence) and not stride) else stride
        kernel, steps, zeros = (per_dimension(value, dims) for value in (kernel_size, step, padding))
        if dims == 1:
            kernel, steps, zeros = [1, *kernel], [1, *steps], [0, *zeros]
        aten = torch.ops.aten
        pool_backward = aten.avg_pool3d_backward if dims == 3 else aten.avg_pool2d_backward

        def call(x: Tensor) -> Tensor:
            out: Tensor = function(
                x, kernel_size, step, padding, ceil_mode, count_include_pad, *divisor, **named_divisor
            )
            return out

        def backward(grad: Tensor, x: Tensor) -> Tensor:
            divided_by = divisor[0] if divisor else named_divisor.get("divisor_override")
            dx: Tensor = pool_backward(grad, x, kernel, steps, zeros, ceil_mode, count_include_pad, divided_by)
            return dx

        return _pool(coding, input, call, backward, dims)

    return handler


def adaptive_average_pool(dims: int) -> Callable[..., Any]:
    """Return the coded torch.nn.functional.adaptive_avg_pool1d, 2d or 3d; to one pixel it is a mean, saving nothing."""

    def handler(coding: Coding, function: Any, input: Tensor, output_size: Any) -> Any:
        sizes = [output_size] if isinstance(output_size, int) else list(output_size)
        if all(size == 1 for size in sizes):
            return NotImplemented
        aten = torch.ops.aten
        backward = aten._adaptive_avg_pool3d_backward if dims == 3 else aten._adaptive_avg_pool2d_backward
        return _pool(coding, input, lambda x: function(x, output_size), backward, dims)

    return handler


def _pool(coding: Coding, x: Tensor, call: Callable[..., Any], backward: Callable[..., Any], dims: int) -> Any:
    """Pool averages; `backward` is one of aten's, those of one dimension being those of two."""
    if not is_recording(x):
        return NotImplemented
    coding.coded_calls += 1
    if dims > 1:
        return coding.tag(_AveragePool.apply(x, call, backward), None, coding.tags.channel(x))

    def backward_of_rows(grad: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = backward(grad.unsqueeze(-2), x.unsqueeze(-2)).squeeze(-2)
        return dx

    return coding.tag(_AveragePool.apply(x, call, backward_of_rows), None, coding.tags.channel(x))


def dropout(
    coding: Coding, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Coded torch.nn.functional.dropout."""
    if not is_recording(input) or not training or not 0 < p < 1 or inplace or not input.numel():
        return NotImplemented
    channel = coding.tags.channel(input)
    coding.coded_calls += 1
    return coding.tag(_Dropout.apply(input, p), None, channel)
