"""Normalisations that save codes of x_hat in place of x: batch, instance, group, layer and root mean square norm.

    x_hat = (x - mean) / deviation,   y = gamma x_hat + beta
    dX = gamma / deviation (dY - mean(dY) - x_hat~ mean(dY x_hat~))

As in the paper's layer only the last term is approximate, whether the statistics are a batch's or a row's. The forward
pass is PyTorch's own; the statistics are computed a second time for the codes. The output's tag holds the codes, with
the sign of y, for the activation and the convolutions after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.coded.mode import Coding, is_recording
from blpa.coded.once import differentiable_once
from blpa.coded.tensors import Coded, Layout, is_worth_a_code, load, not_a_view, save
from blpa.kernels import any_layout, compute_dtype
from blpa.kernels.any_layout import Stats

Call = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""The forward pass: x, gamma, beta -> y."""


class _Norm(torch.autograd.Function):
    """x, gamma, beta -> y, and the codes of x_hat.

    `normalise` maps x [R, S, C] to centre and scale, which broadcast to it, and the statistics of x_hat. `norm_grad`
    and `options` are the backward function of any_layout and its options.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        call: Call,
        normalise: Callable[[Tensor, Layout], tuple[Tensor | None, Tensor, Stats]],
        channel: int,
        codec: Codec | None,
        norm_grad: Callable[..., tuple[Tensor, Tensor]],
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = Layout.of(x, channel, codec)
        rows = layout.rows(x)
        centre, scale, stats = normalise(rows, layout)  # before running statistics change
        y = not_a_view(call(x, gamma, beta))
        vectors = any_layout.vectors_of(
            stats,
            torch.ones_like(stats.mean) if gamma is None else gamma,
            torch.zeros_like(stats.mean) if beta is None else beta,
            codec,
        )
        values = any_layout.encode(rows, layout.rows(y), vectors, codec, centre, scale)
        save(ctx, Coded(values, vectors, layout), scale)
        ctx.norm_grad, ctx.options = norm_grad, options
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, gamma, beta)]
        ctx.mark_non_differentiable(values, vectors)
        ctx.set_materialize_grads(False)  # else there would be zeros as large as the codes
        return y, values, vectors

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 3
        if grad is not None:
            saved, (scale,) = load(ctx)
            found = saved.norm_grad(ctx.norm_grad, grad, scale, ctx.needs_input_grad[0], **ctx.options)
            grads = [
                one.to(dtype) if wanted else None
                for one, dtype, wanted in zip(found, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
            ]
        return *grads, *(None,) * 6


class _ConstantNorm(torch.autograd.Function):
    """x, beta -> y of a batch norm whose statistics and gamma are constant: dX = scale dY needs nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor | None, call: Callable[..., Tensor], scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtypes = x.dtype, None if beta is None else beta.dtype
        return not_a_view(call(x, beta))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        dx = dbeta = None
        if ctx.needs_input_grad[0]:
            dx = (grad * scale.to(grad.dtype).view(-1, *(1,) * (grad.dim() - 2))).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            axes = [axis for axis in range(grad.dim()) if axis != 1]
            dbeta = grad.sum(axes, dtype=compute_dtype(grad.dtype)).to(ctx.dtypes[1])
        return dx, dbeta, None, None


def _coded(
    coding: Coding, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: Call, normalise: Any, channel: int,
    norm_grad: Any, **options: Any,
) -> Tensor:  # fmt: skip
    y, values, vectors = _Norm.apply(x, gamma, beta, call, normalise, channel, coding.codec, norm_grad, options)
    coding.coded_calls += 1
    return coding.tag(y, Coded(values, vectors, Layout.of(y, channel, coding.codec)), channel)


def batch_norm(
    coding: Coding,
    function: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Coded torch.nn.functional.batch_norm."""
    if not is_recording(input, weight, bias) or not is_worth_a_code(input, 1) or input.dim() < 2:
        return NotImplemented

    def call(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        result: Tensor = function(x, running_mean, running_var, gamma, beta, training, momentum, eps)
        return result

    dtype = compute_dtype(input.dtype)
    if training or running_mean is None or running_var is None:
        centre = scale = None
    else:
        centre, scale = running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()
        if weight is None or not weight.requires_grad:
            factor = scale if weight is None else scale * weight.detach()
            return _ConstantNorm.apply(input, bias, lambda x, beta: call(x, weight, beta), factor)

    def normalise(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Stats]:
        stats = any_layout.channel_stats(rows)
        if centre is None or scale is None:
            mean, rstd = stats.mean, (stats.var + eps).rsqrt()
        else:
            mean, rstd = centre, scale
        return mean, rstd, stats.of_normalised(mean, rstd)

    return _coded(
        coding, input, weight, bias, call, normalise, 1, any_layout.norm_grad, constant_stats=centre is not None
    )


def torch_batch_norm(
    coding: Coding, function: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float, eps: float,
    cudnn_enabled: bool,
) -> Any:  # fmt: skip
    """Coded torch.batch_norm, whose arguments have another order."""

    def in_order(x: Tensor, mean: Any, var: Any, gamma: Any, beta: Any, *others: Any) -> Any:
        return function(x, gamma, beta, mean, var, *others, cudnn_enabled)

    return batch_norm(coding, in_order, input, running_mean, running_var, weight, bias, training, momentum, eps)


def group_norm(
    coding: Coding,
    function: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *others: Any,
) -> Any:
    """Coded torch.nn.functional.group_norm."""
    if not is_recording(input, weight, bias) or not is_worth_a_code(input, 1) or input.dim() < 2:
        return NotImplemented

    def call(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        result: Tensor = function(x, num_groups, gamma, beta, eps, *others)
        return result

    samples, channels = input.shape[:2]
    per_byte = coding.codec.codes_per_byte if coding.codec else 1
    pixels = 1 if any_layout.outer_first(samples, input.shape[2:].numel(), per_byte) else 0

    def normalise(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Stats]:
        groups = input.reshape(samples, num_groups, -1).to(compute_dtype(input.dtype))
        var, mean = torch.var_mean(groups, -1, correction=0)
        centre, scale = (
            value.repeat_interleave(channels // num_groups, 1).unsqueeze(pixels)
            for value in (mean, (var + eps).rsqrt())
        )
        return centre, scale, any_layout.channel_stats(rows, centre, scale)

    return _coded(
        coding, input, weight, bias, call, normalise, 1, any_layout.norm_grad,
        constant_stats=False, groups=num_groups, pixels=pixels,
    )  # fmt: skip


def instance_norm(
    coding: Coding,
    function: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Coded torch.nn.functional.instance_norm: a group norm of one channel a group, unless by running statistics."""
    if not use_input_stats or input.dim() < 3:
        return NotImplemented

    def call(x: Tensor, groups: int, gamma: Any, beta: Any, eps: float) -> Any:
        return function(x, running_mean, running_var, gamma, beta, use_input_stats, momentum, eps)

    return group_norm(coding, call, input, input.shape[1], weight, bias, eps)


def layer_norm(
    coding: Coding,
    function: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *others: Any,
    centred: bool = True,
) -> Any:
    """Coded torch.nn.functional.layer_norm over the last dimension."""
    is_last = len(normalized_shape) == 1 and input.dim() >= 2
    if not is_last or not is_recording(input, weight, bias) or not is_worth_a_code(input, -1):
        return NotImplemented

    def call(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        result: Tensor = (
            function(x, normalized_shape, gamma, beta, eps, *others)
            if centred
            else function(x, normalized_shape, gamma, eps, *others)
        )
        return result

    def normalise(rows: Tensor, layout: Layout) -> tuple[Tensor | None, Tensor, Stats]:
        scale = rows.new_empty(rows.shape[0], 1, 1, dtype=compute_dtype(rows.dtype))
        centre = torch.zeros_like(scale) if centred else None
        epsilon = torch.finfo(input.dtype).eps if eps is None else eps
        for part in any_layout.parts(rows, None):
            (some,) = part.blocks
            x = rows[some].to(scale.dtype)
            if centre is None:
                var = x.square().mean(-1, keepdim=True)
            else:
                var, centre[some] = torch.var_mean(x, -1, correction=0, keepdim=True)
            scale[some] = (var + epsilon).rsqrt()
        return centre, scale, any_layout.channel_stats(rows, centre, scale)

    return _coded(coding, input, weight, bias, call, normalise, -1, any_layout.layer_norm_grad, centred=centred)


def rms_norm(
    coding: Coding,
    function: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Coded torch.nn.functional.rms_norm over the last dimension."""
    return layer_norm(coding, function, input, normalized_shape, weight, None, eps, centred=False)
