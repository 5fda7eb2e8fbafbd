"""Normalisations that save codes of x_hat in place of x: batch, instance, group, layer and root mean square norm.

    x_hat = (x - mean) / deviation,   y = gamma x_hat + beta
    dX = gamma / deviation (dY - mean(dY) - x_hat~ mean(dY x_hat~))

As in the paper's layer only the last term is approximate, whether the statistics are a batch's or a row's. The output's
tag holds the codes, with the sign of y, for the activation and the convolutions after it.

The forward pass is PyTorch's own, and statistics are computed a second time for the codes. Only a batch norm in
training is computed here, in one pass with its codes and, where that is proven to be unseen (fusion.py), with its ReLU
and over its input: on a CPU with PyTorch's bits, on a GPU with its values but for rounding. Not where a compiler traces
the network, or a mode of PyTorch's may watch it.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from blpa.coded.fusion import Fusion, caller_of, fusion_of, is_observed
from blpa.coded.mode import Coding, is_recording, may_overwrite
from blpa.coded.tensors import Coded, Layout, channels_last_format, is_worth_a_code, load, not_a_view, save
from blpa.kernels import RunningStats, compute_dtype, library
from blpa.kernels.any_layout import Elementwise, Vectors
from blpa.kernels.library import BatchNorm, computes_batch_norm, rstd_of
from blpa.once import differentiable_once

Call = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""The forward pass: x, gamma, beta -> y."""


class Means(NamedTuple):
    """Over what a norm's statistics are taken, and so the means of its gradient."""

    per_sample: bool = False
    """Over groups of channels of one sample."""
    groups: int = 0
    per_row: bool = False
    """Over the last dimension."""
    centred: bool = True
    """Whether the mean is subtracted."""
    constant: bool = False
    """The statistics do not depend on x."""
    of_all: Callable[[Tensor], Tensor] | None = None
    """Over the samples of several processes: maps this one's sums to the means of all."""


class Statistics(NamedTuple):
    """What a norm takes of x."""

    centre: Tensor | None
    """Subtracted from x [N or 1, C or 1]."""
    scale: Tensor
    """1 / deviation [N or 1, C or 1]."""
    of_channels: Tensor
    """Mean, variance, low and high of each channel [4, C], of x_hat or of x."""
    are_of_x: bool = False


class Normalised(NamedTuple):
    """What a norm computes."""

    y: Tensor
    """Or relu(y), if rectified; or x, overwritten with it."""
    saved: Coded
    scale: Tensor
    """1 / deviation [N or 1, C or 1]."""
    rectified: bool = False


class _Norm(torch.autograd.Function):
    """x, gamma, beta -> y, and the codes of x_hat."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        compute: Callable[[Tensor, Tensor | None, Tensor | None], Normalised],
        means: Means,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, saved, scale, ctx.rectified = compute(x, gamma, beta)
        if y is x:
            ctx.mark_dirty(x)
        save(ctx, saved, scale)
        ctx.means = means
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, gamma, beta)]
        ctx.mark_non_differentiable(*saved.tensors)
        ctx.set_materialize_grads(False)  # else there would be zeros as large as the codes
        return y, saved.values, saved.vectors

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 3
        if grad is not None:
            saved, (scale,) = load(ctx)
            sums = saved.gradient_sums(grad, per_sample=ctx.means.per_sample, rectified=ctx.rectified)
            dx = None
            if ctx.needs_input_grad[0]:
                means = _means(saved, grad, sums, ctx.means)
                dx = saved.input_grad(grad, scale, means, rectified=ctx.rectified)
            dbeta, dgamma = sums.sum(1) if sums.shape[1] > 1 else sums.squeeze(1)
            grads = [
                one.to(dtype) if wanted else None
                for one, dtype, wanted in zip((dx, dgamma, dbeta), ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
            ]
        return *grads, None, None


def _means(saved: Coded, grad: Tensor, sums: Tensor, means: Means) -> Tensor | None:
    """Return mean(gamma dY) and mean(gamma dY x_hat~) over what the statistics are taken over."""
    if means.constant:
        return None
    if means.per_row:
        found: Tensor = saved.row_means(grad)
        return found if means.centred else torch.stack((torch.zeros_like(found[0]), found[1]))
    gamma = saved.vectors[Vectors._fields.index("gamma")]
    if means.of_all is not None:
        return means.of_all(sums) * gamma
    if not means.per_sample:
        return sums * gamma / (grad.numel() // grad.shape[1])
    of_groups = (sums * gamma).unflatten(-1, (means.groups, -1)).mean(-1, keepdim=True)
    found = of_groups.expand(*of_groups.shape[:-1], grad.shape[1] // means.groups).flatten(-2) / grad.shape[2:].numel()
    return found


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


def coded_norm(
    coding: Coding, layout: Layout, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: Call, normalise: Any,
    means: Means,
) -> Tensor:  # fmt: skip
    """Call a norm, save codes of this layout and tag its output with them.

    `normalise(x, layout)` returns the Statistics of x.
    """

    def compute(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Normalised:
        centre, scale, stats, of_x = normalise(x, layout)  # before averages change
        y = not_a_view(call(x, gamma, beta))
        shift, factor = (centre.squeeze(0), scale.squeeze(0)) if of_x else (None, None)
        vectors = layout.vectors(stats, *_affine(x, layout, gamma, beta), shift, factor, y.dtype)
        return Normalised(y, layout.encode(x, y, vectors, centre, scale), scale)

    return _tagged(coding, layout, x, gamma, beta, compute, means)


def _affine(x: Tensor, layout: Layout, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gamma and beta, 1 and 0 where there is none."""
    gamma = x.new_ones(x.shape[layout.channel]) if gamma is None else gamma
    return gamma, torch.zeros_like(gamma) if beta is None else beta


def _tagged(
    coding: Coding, layout: Layout, x: Tensor, gamma: Tensor | None, beta: Tensor | None, compute: Any, means: Means
) -> Tensor:
    y, values, vectors = _Norm.apply(x, gamma, beta, compute, means)
    coding.coded_calls += 1
    return coding.tag(y, Coded(values, vectors, layout._replace(dtype=y.dtype)), layout.channel)


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

    layout = Layout.of(input, 1, coding.codec)
    is_computed_here = training and eps > 0 and not coding.is_traced and not is_observed()
    if is_computed_here and _is_plain(input, weight, bias, running_mean, running_var):
        fusion = fusion_of(caller_of(sys._getframe(1)), input, coding.convolved)
        if computes_batch_norm(input, layout.channels_last, layout.bits):
            has_none = running_mean is None or running_var is None
            running = None if has_none else RunningStats(running_mean, running_var, momentum)  # type: ignore[arg-type]
            return _batch_norm(coding, layout, input, weight, bias, running, eps, fusion)
    dtype = compute_dtype(input.dtype)
    if training or running_mean is None or running_var is None:
        centre = scale = None
    else:
        centre, scale = running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()
        if weight is None or not weight.requires_grad:
            factor = scale if weight is None else scale * weight.detach()
            return _ConstantNorm.apply(input, bias, lambda x, beta: call(x, weight, beta), factor)

    def normalise(x: Tensor, layout: Layout) -> Statistics:
        if centre is None or scale is None:
            stats = layout.batch_stats(x)
            mean, rstd = stats[0], rstd_of(stats, eps)
        else:
            stats, mean, rstd = layout.stats(x), centre, scale
        return Statistics(mean.unsqueeze(0), rstd.unsqueeze(0), stats, are_of_x=True)

    return coded_norm(coding, layout, input, weight, bias, call, normalise, Means(constant=centre is not None))


def _is_plain(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> bool:
    """Return whether a batch norm has arguments that PyTorch takes, for which it has one formula."""
    given = [vector for vector in (gamma, beta, running_mean, running_var) if vector is not None]
    if not given or (running_mean is None) != (running_var is None) or x.dtype == torch.float64:
        return False
    if not x.is_contiguous() and channels_last_format(x) is None:
        return False
    dtype = compute_dtype(x.dtype)
    return all(one.shape == x.shape[1:2] and one.dtype == dtype and one.is_contiguous() for one in given)


def _batch_norm(
    coding: Coding, layout: Layout, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running: RunningStats | None, eps: float, fusion: Fusion,
) -> Tensor:  # fmt: skip
    """Compute a batch norm in training, and what it may do beside."""
    rectify, overwrite = fusion.rectify, fusion.overwrite and may_overwrite(x)

    def compute(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Normalised:
        out = x if overwrite else torch.empty_like(x)  # what may fail comes before averages change
        norm = BatchNorm(*_affine(x, layout, gamma, beta), running, eps)
        values, vectors, rstd = library.batch_norm(x, layout.channels_last, layout.codec, norm, rectify, out)
        return Normalised(out, Coded(values, vectors, layout), rstd.unsqueeze(0), rectify)

    coding.convolved = None
    y = _tagged(coding, layout, x, gamma, beta, compute, Means())
    if not rectify:
        return y
    coding.rectified = weakref.ref(y)
    saved = cast(Coded, coding.tags.saved(y))
    return coding.tag(y, saved.after(Elementwise("relu")), 1)


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

    def normalise(x: Tensor, layout: Layout) -> Statistics:
        groups = x.reshape(samples, num_groups, -1).to(compute_dtype(x.dtype))
        var, mean = torch.var_mean(groups, -1, correction=0)
        centre, scale = (value.repeat_interleave(channels // num_groups, 1) for value in (mean, (var + eps).rsqrt()))
        return Statistics(centre, scale, layout.stats(x, centre, scale))

    layout = Layout.of(input, 1, coding.codec)
    return coded_norm(coding, layout, input, weight, bias, call, normalise, Means(per_sample=True, groups=num_groups))


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

    def normalise(x: Tensor, layout: Layout) -> Statistics:
        epsilon = torch.finfo(x.dtype).eps if eps is None else eps
        rows = x.flatten(0, -2).to(compute_dtype(x.dtype))
        if centred:
            var, centre = torch.var_mean(rows, -1, correction=0, keepdim=True)
        else:
            var, centre = rows.square().mean(-1, keepdim=True), None
        scale = (var + epsilon).rsqrt()
        return Statistics(centre, scale, layout.stats(x, centre, scale))

    layout = Layout.of(input, -1, coding.codec)
    return coded_norm(coding, layout, input, weight, bias, call, normalise, Means(per_row=True, centred=centred))


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
