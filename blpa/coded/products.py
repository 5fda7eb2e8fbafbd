"""Convolutions, linear layers and products that save the codes of their input in place of the input.

    out = W a + b:    dA = W^T G exact, given G;    dW = G a~^T approximate;    db = sum G exact, given G

So the error of a code stays in the gradient of the layer's own weight, and reaches no layer below. With a frozen weight
nothing of the input is saved; PyTorch's convolution saves it all the same.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from blpa.coded.fusion import caller_of, output_of
from blpa.coded.mode import Coding, is_recording
from blpa.coded.tensors import Saved, load, not_a_view, save, shape_only
from blpa.once import differentiable_once

Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Conv(torch.autograd.Function):
    """a, weight, bias -> out. `options` are those of aten.convolution after the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        saved: Saved | None,
        options: tuple[Any, ...],
        call: Call,
    ) -> Tensor:
        save(ctx, saved, weight)
        ctx.options, ctx.shape, ctx.dtype = options, a.shape, a.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return call(a, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, (weight,) = load(ctx)
        wants_da, wants_dw, wants_db = ctx.needs_input_grad[:3]
        *_, is_transposed, _, groups = ctx.options
        bias_size = None
        if wants_db:
            bias_size = [weight.shape[1] * groups if is_transposed else weight.shape[0]]
        computed = weight.to(grad.dtype)

        def gradients(a: Tensor, *which: bool) -> tuple[Tensor, ...]:
            return cast(
                tuple[Tensor, ...],
                torch.ops.aten.convolution_backward(grad, a, computed, bias_size, *ctx.options, list(which)),
            )

        da = dw = db = None
        if wants_dw or wants_db:
            # a~ is freed before dA, as large, is allocated. The bias's gradient reads its shape alone.
            a = saved.value().to(grad.dtype) if wants_dw else shape_only(ctx.shape, grad)
            _, dw, db = gradients(a, False, wants_dw, wants_db)
            del a
            dw = dw.to(weight.dtype) if wants_dw else None
            db = db.to(ctx.bias_dtype) if wants_db else None
        if wants_da:
            da = gradients(shape_only(ctx.shape, grad), True, False, False)[0].to(ctx.dtype)
        return da, dw, db, None, None, None


class _Linear(torch.autograd.Function):
    """a, weight, bias -> out."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, call: Call) -> Tensor:
        save(ctx, saved, weight)
        ctx.shape, ctx.dtype = a.shape, a.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return not_a_view(call(a, weight, bias))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, (weight,) = load(ctx)
        rows = grad.reshape(-1, grad.shape[-1])
        da = dw = db = None
        if ctx.needs_input_grad[1]:
            a = saved.value().reshape(-1, weight.shape[1]).to(grad.dtype)
            dw = (rows.t() @ a).to(weight.dtype)
            del a
        if ctx.needs_input_grad[2]:
            db = rows.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            da = (rows @ weight.to(grad.dtype)).view(ctx.shape).to(ctx.dtype)
        return da, dw, db, None, None


class _Scale(torch.autograd.Function):
    """x, s -> x s, where s is small: dX = s G exact, given G; ds = sum G x~ approximate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, saved: Saved, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        save(ctx, saved, s)
        ctx.dtype = x.dtype
        return call(x, s)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, (s,) = load(ctx)
        dx = ds = None
        if ctx.needs_input_grad[1]:
            ds = saved.value().to(grad.dtype).mul_(grad).sum_to_size(s.shape).to(s.dtype)
        if ctx.needs_input_grad[0]:
            dx = (grad * s).to(ctx.dtype)
        return dx, ds, None, None


def conv(
    coding: Coding,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Coded torch.nn.functional.conv1d, conv2d and conv3d."""
    dims = weight.dim() - 2
    dilations = per_dimension(dilation, dims)
    pads = _padding(padding, weight, dilations)
    if pads is None:
        return NotImplemented
    options = (per_dimension(stride, dims), pads, dilations, False, [0] * dims, groups)
    return _conv(coding, function, input, weight, bias, options, (stride, padding, dilation, groups))


def conv_transpose(
    coding: Coding,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    """Coded torch.nn.functional.conv_transpose1d, conv_transpose2d and conv_transpose3d."""
    dims = weight.dim() - 2
    lists = [per_dimension(value, dims) for value in (stride, padding, dilation)]
    options = (*lists, True, per_dimension(output_padding, dims), groups)
    others = stride, padding, output_padding, groups, dilation
    return _conv(coding, function, input, weight, bias, options, others)


def _conv(
    coding: Coding,
    function: Any,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    others: tuple[Any, ...],
) -> Any:
    """Convolve by the function; `others` are its arguments after the bias, `options` those of aten.convolution."""
    if not is_recording(a, weight, bias) or a.dim() != weight.dim():
        return NotImplemented
    saved = coding.saved_of(a, 1) if weight.requires_grad else None
    if saved is not None or not weight.requires_grad:
        out = _Conv.apply(a, weight, bias, saved, options, lambda a, weight, bias: function(a, weight, bias, *others))
    elif coding.saves_others_exactly:
        out = function(a, weight, bias, *others)
    else:
        return NotImplemented
    if not coding.is_traced:
        coding.convolved = output_of(caller_of(sys._getframe(1)), out)
    return coding.tag(out, None, 1)


def per_dimension(value: int | Sequence[int], dims: int) -> list[int]:
    """Return one number per dimension, from one for all or one for each."""
    values = list(map(int, value)) if isinstance(value, Sequence) else [int(value)]
    return values * dims if len(values) == 1 else values


def _padding(padding: int | str | Sequence[int], weight: Tensor, dilation: list[int]) -> list[int] | None:
    """Return the zeros on each side of each dimension; None where the sides differ."""
    dims = weight.dim() - 2
    if not isinstance(padding, str):
        return per_dimension(padding, dims)
    if padding == "valid":
        return [0] * dims
    both = [spread * (size - 1) for spread, size in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(total % 2 for total in both) else [total // 2 for total in both]


def linear(coding: Coding, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Coded torch.nn.functional.linear."""
    if not is_recording(input, weight, bias) or not weight.requires_grad or input.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    saved = coding.saved_of(input, -1)
    if saved is None:
        return NotImplemented
    return coding.tag(_Linear.apply(input, weight, bias, saved, function), None, -1)


SMALLER = 16
"""How many times smaller a factor must be to be saved as it is: one or a few numbers for each channel."""


def mul(coding: Coding, function: Any, input: Any, other: Any) -> Any:
    """Coded product of a large tensor and a small one: squeeze and excitation, layer scale.

    Where both factors are large, the gradient of each passes through the other, so neither may be approximate. A small
    factor that is computed (squeeze and excitation) passes on the error of its sum, where rounding averages out.
    """
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or not is_recording(input, other):
        return NotImplemented
    is_first = input.numel() >= other.numel()
    x, s = (input, other) if is_first else (other, input)
    if not s.requires_grad or x.numel() < SMALLER * s.numel() or x.dim() < max(2, s.dim()):
        return NotImplemented
    if torch.broadcast_shapes(x.shape, s.shape) != x.shape:
        return NotImplemented
    channel = _channel_of_factor(coding, x, s)
    saved = coding.saved_of(x, channel)
    if saved is None:
        return NotImplemented
    result = _Scale.apply(x, s, saved, function if is_first else lambda x, s: function(s, x))
    return coding.tag(result, None, channel)


def _channel_of_factor(coding: Coding, x: Tensor, s: Tensor) -> int:
    """Return the dimension of x along which s varies, the last one but the samples'; the usual one if none does."""
    sizes = (1,) * (x.dim() - s.dim()) + tuple(s.shape)
    varying = [dim for dim in range(x.dim()) if sizes[dim] > 1 and (dim > 0 or s.dim() < x.dim())]
    return varying[-1] if len(varying) == 1 else coding.tags.channel(x)
