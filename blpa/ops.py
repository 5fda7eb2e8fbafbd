"""Batch norm + ReLU, and the convolutions that read it, with one code kept for the backward passes of both.

Forward, exact (statistics per channel over N, H, W):

    x_hat = (x - mean) rstd,   y = gamma x_hat + beta,   a = max(y, 0),   out = conv(a, W)

Backward, from G, the gradient of out, and the codes of x_hat, which give x_hat~, a~ and relu_mask = [y > 0]:

    dW = conv_weight_grad(a~, G)                                     approximate
    dA = conv_input_grad(W, G),     dY = dA relu_mask                exact, given G
    dbeta = sum dY                                                   exact, given G
    dgamma = sum dY x_hat~                                           approximate
    dX = gamma rstd (dY - mean(dY) - x_hat~ mean(dY x_hat~))         only the last term is approximate

`batch_norm_relu_conv2d` is all of it, for an a that one convolution reads; where a shortcut reads x as well,
`batch_norm_relu_conv2d_with_shortcut` adds the shortcut's gradient in the pass that writes dX; where x is a sum that a
shortcut is part of, `add_shortcut` makes it in the pass that takes its statistics. Where a has other readers,
`batch_norm_relu` makes a and a `Kept`, and every `conv2d` that reads a takes the Kept along, so all of them
share its codes.

Source: Chakrabarti and Moseley, NeurIPS 2019, section 3.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blpa.codec import Code
from blpa.convolution import Convolution, as_computed
from blpa.kernels import Averages, Kernels, Norm, compute_dtype
from blpa.kernels.reference import REFERENCE
from blpa.saved import Kept, Layout, rows

_PLAIN = Convolution()


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm:
    """How a batch norm and ReLU computes and what it keeps: everything but x, gamma and beta.

    Args:
        code: the code to keep; None keeps x itself, at full precision.
        running_mean: running average [C], updated in training, used in evaluation; None uses the statistics of x.
        running_var: the same for the unbiased variance.
        num_batches_tracked: batches that the averages have seen, int64 [], counted in training; None is not counted.
        training: normalise by the statistics of x, or else by the running averages.
        momentum: weight of the new value in the running averages.
        eps: added to the variance.
        overwrite_x: x is not read again, so a may take its place (it does not where x is what is kept, or is copied).
        forward_from_code: a is decoded from the codes in the forward pass too, and gradients pass as if it were not:
            the paper's naive baseline.
        kernels: the back end.
        counter: zeros, int32 [C], which belong to this batch norm: the backend counts in them (kernels.Kernels). One
            stream at a time may use them, as it may the running averages; None makes some for every call.

    Raises:
        ValueError: forward_from_code has no code.
    """

    code: Code | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-3
    overwrite_x: bool = False
    forward_from_code: bool = False
    kernels: Kernels = REFERENCE
    counter: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.forward_from_code and self.code is None:
            raise ValueError("forward_from_code needs a code, and code is None")

    @property
    def has_constant_stats(self) -> bool:
        """Whether the statistics that normalise x do not depend on it."""
        return not self.training and self.running_mean is not None and self.running_var is not None

    def vectors(
        self, x: Tensor, gamma: Tensor, beta: Tensor, code: Code | None, *, add: Tensor | None = None
    ) -> Tensor:
        """Norm [9, C] for x [M, C], which first becomes x + add; in training the running averages move towards it."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            averages = None
        elif self.training:
            averages = Averages(mean, var, self.momentum, self.num_batches_tracked)
        else:
            var = var.to(compute_dtype(x.dtype))
            return torch.stack(Norm.of(mean, var, gamma, beta, eps=self.eps, code=code))
        return self.kernels.channel_stats(
            x, gamma, beta, eps=self.eps, code=code, averages=averages, add=add, counter=self.counter
        )


@dataclass(frozen=True)
class _Unit:
    """One batch norm and ReLU, for an x that was looked at."""

    bn: BatchNorm
    layout: Layout
    overwrite: bool
    """a takes the place of x."""
    vectors: Tensor | None = None
    """The Norm of x, where it is known."""

    def __call__(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Kept]:
        """Its forward pass: a, and what is kept."""
        code, kernels = self.layout.code, self.layout.kernels
        x_rows = rows(x)
        vectors = self.bn.vectors(x_rows, gamma, beta, code) if self.vectors is None else self.vectors
        a = x if self.overwrite else torch.empty_like(x)
        a_rows = x_rows if self.overwrite else rows(a)
        codes = kernels.normalise_rectify_encode(x_rows, vectors, code=code, out=a_rows)
        if self.bn.forward_from_code:
            assert codes is not None
            kernels.decode(codes, vectors, code=code, out=a_rows)
        return a, Kept(x if codes is None else codes, vectors, self.layout)


def _save(ctx: Any, kept: Kept, weight: Tensor, convolution: Convolution) -> Tensor:
    """Save what _convolution_backward reads, and return W as the convolution computes with it."""
    ctx.convolution, ctx.weight_dtype = convolution, weight.dtype
    weight = as_computed(weight)
    kept.save(ctx, weight)
    return weight


def _convolution_backward(
    ctx: Any, grad: Tensor, *, wants_da: bool, wants_dw: bool
) -> tuple[Kept, Tensor | None, Tensor | None]:
    """The Kept, and gradients dA and dW where wanted; a~ is gone before dA is made, since the two are of one size."""
    kept, (weight,) = Kept.saved(ctx)
    convolution, layout = ctx.convolution, kept.layout
    da = dw = None
    if wants_dw:
        dw = kept.pointwise_weight_grad(grad) if convolution.is_pointwise(weight) else None
        if dw is None:
            dw = convolution.weight_grad(grad, kept.decode(grad.dtype), weight)
        dw = dw.view(weight.shape).to(ctx.weight_dtype)
    if wants_da:
        da = convolution.input_grad(grad, weight, layout.shape).to(layout.dtype)
    return kept, da, dw


class _BatchNormReLU(torch.autograd.Function):
    """x, gamma, beta -> a; appends the Kept to `keep`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, unit: _Unit, keep: list[Kept]) -> Tensor:
        a, kept = unit(x, gamma, beta)
        if unit.overwrite:
            ctx.mark_dirty(x)
        kept.save(ctx)
        ctx.constant_stats = unit.bn.has_constant_stats
        keep.append(kept)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, _ = Kept.saved(ctx)
        return *kept.batch_norm_backward(grad, constant_stats=ctx.constant_stats), None, None


class _Conv2d(torch.autograd.Function):
    """a, weight -> out; saves what a was made from, not a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, kept: Kept, convolution: Convolution) -> Tensor:
        weight = _save(ctx, kept, weight, convolution)
        return convolution(a, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_da, wants_dw = ctx.needs_input_grad[:2]
        _, da, dw = _convolution_backward(ctx, grad, wants_da=wants_da, wants_dw=wants_dw)
        return da, dw, None, None


class _BatchNormReLUConv2d(torch.autograd.Function):
    """x, gamma, beta, weight -> out, x; the two above in one, whose dA is nobody else's, so that dX takes its place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, unit: _Unit, convolution: Convolution
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        a, kept = unit(x, gamma, beta)
        weight = _save(ctx, kept, weight, convolution)
        ctx.constant_stats = unit.bn.has_constant_stats
        return convolution(a, weight), None if unit.overwrite else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_x: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_x, *(None,) * 5
        *wants_da, wants_dw = ctx.needs_input_grad[:4]
        kept, da, dw = _convolution_backward(ctx, grad, wants_da=any(wants_da), wants_dw=wants_dw)
        dx = dgamma = dbeta = None
        if da is not None:
            dx, dgamma, dbeta = kept.batch_norm_backward(
                da, constant_stats=ctx.constant_stats, overwrite_grad=True, add=grad_x
            )
        return dx, dgamma, dbeta, dw, None, None


class _AddShortcut(torch.autograd.Function):
    """x, shortcut, gamma, beta -> their sum in the place of x, and its Norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # else the Norm would be given a gradient of zeros
        vectors = bn.vectors(rows(x), gamma, beta, bn.code, add=rows(shortcut))
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(vectors)
        return x, vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return grad, grad, None, None, None


class _AveragePool(torch.autograd.Function):
    """x -> its mean over windows of stride x stride; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        return F.avg_pool2d(x, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.interpolate(grad, scale_factor=ctx.stride, mode="nearest").div_(ctx.stride**2), None


def average_pool(x: Tensor, stride: int) -> Tensor:
    """Mean over windows of stride x stride; F.avg_pool2d would keep x, though its gradient needs no more than a size.

    Args:
        x: [N, C, H, W].
        stride: a divisor of H and W.

    Raises:
        ValueError: it is not.
    """
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(f"x is {list(x.shape)}: height and width must be multiples of {stride}")
    return cast(Tensor, _AveragePool.apply(x, stride))


def batch_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm) -> tuple[Tensor, Kept | None]:
    """Normalise, scale and rectify x, and keep a code of it for the backward pass.

    a = max(gamma (x - mean) / sqrt(var + eps) + beta, 0)

    Args:
        x: float [N, C, H, W]; channels-last, else it is copied into that.
        gamma: scale [C], of either sign or zero.
        beta: shift [C].
        bn: the rest.

    Returns:
        a [N, C, H, W], channels-last, and what the convolutions that read a need; None in place of that where no
        gradient is being recorded.

    Raises:
        ValueError: x is not floating point [N, C, H, W], gamma or beta is not [C], training has one value per channel
            only, or overwrite_x would overwrite a leaf.

    Source: Chakrabarti and Moseley, section 3; eps as theirs.
    """
    recording = _is_recording(x, gamma, beta)
    x, unit = _prepare(x, gamma, beta, bn, recording=recording)
    keep: list[Kept] = []
    a = _BatchNormReLU.apply(x, gamma, beta, unit, keep)
    if not recording:
        return a, None
    keep[0].made_a_version = a._version
    return a, keep[0]


def conv2d(a: Tensor, kept: Kept | None, weight: Tensor, *, convolution: Convolution = _PLAIN) -> Tensor:
    """Convolve a, keeping for the backward pass not a but what it was made from.

    out = conv(a, W), without bias

    Args:
        a: output of batch_norm_relu [N, C, H, W], unchanged.
        kept: what batch_norm_relu returned with it; None is a plain convolution.
        weight: W [C_out, C / groups, k_h, k_w].
        convolution: its stride, padding, dilation and groups.

    Returns:
        out [N, C_out, H_out, W_out].

    Raises:
        ValueError: a is not of the shape that kept was made for, or was changed in place.

    Source: Chakrabarti and Moseley, section 3.
    """
    if kept is None:
        return convolution(a, weight)
    if a.shape != kept.layout.shape:
        made_for = list(kept.layout.shape)
        raise ValueError(
            f"a is {list(a.shape)}, kept was made for {made_for}: pass on what one batch_norm_relu returned"
        )
    if a._version != kept.made_a_version:
        raise ValueError("a was changed in place since batch_norm_relu returned it: kept no longer tells what it was")
    return cast(Tensor, _Conv2d.apply(a, weight, kept, convolution))


def batch_norm_relu_conv2d(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    convolution: Convolution = _PLAIN,
) -> Tensor:
    """Batch norm, ReLU and the only convolution that reads them, in one.

    The same bits as conv2d of batch_norm_relu, for one function call instead of two; and the input gradient takes the
    place of the gradient between them.

    Args:
        x: as batch_norm_relu; so are gamma, beta and bn.
        gamma: scale [C].
        beta: shift [C].
        weight: as conv2d; so is convolution.
        bn: the rest.
        convolution: its stride, padding, dilation and groups.

    Returns:
        out [N, C_out, H_out, W_out].

    Raises:
        ValueError: as batch_norm_relu.

    Source: Chakrabarti and Moseley, section 3.
    """
    if not _is_recording(x, gamma, beta):
        a, _ = batch_norm_relu(x, gamma, beta, bn)
        return convolution(a, weight)
    x, unit = _prepare(x, gamma, beta, bn, recording=True)
    out, _ = _BatchNormReLUConv2d.apply(x, gamma, beta, weight, unit, convolution)
    return cast(Tensor, out)


def add_shortcut(
    x: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm
) -> tuple[Tensor, Tensor | None]:
    """Add a shortcut to x, in its place, and take the statistics of the sum in the same pass.

    Args:
        x: [N, C, H, W], which nobody else reads.
        shortcut: of the same shape.
        gamma: of the batch norm that reads the sum next; so are beta and bn.
        beta: shift [C].
        bn: the rest.

    Returns:
        x + shortcut, and its statistics for batch_norm_relu_conv2d_with_shortcut; None where they are not taken here:
        no gradient is being recorded, they are constant, or memory is not channels-last.

    Raises:
        ValueError: as batch_norm_relu.

    Source: the sum is He et al. 2016's.
    """
    _check(x, gamma, beta, bn)
    is_alike = (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype)
    in_rows = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, shortcut))
    if not (is_alike and in_rows and _is_recording(x, shortcut, gamma, beta)) or bn.has_constant_stats:
        return x.add_(shortcut), None
    return cast(tuple[Tensor, Tensor], _AddShortcut.apply(x, shortcut, gamma, beta, bn))


def batch_norm_relu_conv2d_with_shortcut(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    convolution: Convolution = _PLAIN,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """batch_norm_relu_conv2d, for an x that a shortcut reads as well.

    Autograd would make the sum of x's two gradients in a pass of its own over three tensors. Here the shortcut's
    gradient comes in by the x that is returned, and the pass that writes dX adds it.

    Args:
        x: as batch_norm_relu_conv2d; so are the others.
        gamma: scale [C].
        beta: shift [C].
        weight: as conv2d.
        bn: the rest; its overwrite_x is not for an x that is read again.
        convolution: its stride, padding, dilation and groups.
        statistics: what add_shortcut returned with x.

    Returns:
        out [N, C_out, H_out, W_out], and x for the shortcut.

    Raises:
        ValueError: as batch_norm_relu, or overwrite_x is true.

    Source: the sum is He et al. 2016's; the rest is Chakrabarti and Moseley, section 3.
    """
    if bn.overwrite_x:
        raise ValueError("overwrite_x = True, but a shortcut reads x again")
    if not (_is_recording(x, gamma, beta) and x.is_contiguous(memory_format=torch.channels_last)):
        return batch_norm_relu_conv2d(x, gamma, beta, weight, bn, convolution=convolution), x
    x, unit = _prepare(x, gamma, beta, bn, recording=True)
    unit = replace(unit, vectors=statistics)
    out, x_again = _BatchNormReLUConv2d.apply(x, gamma, beta, weight, unit, convolution)
    return cast(Tensor, out), cast(Tensor, x_again)


def _is_recording(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(x: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm) -> None:
    """Refuse what no batch norm and ReLU can take."""
    if not x.is_floating_point() or x.dim() != 4 or not x.numel():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: must be floating point [N, C, H, W], none of them 0")
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {list(vector.shape)}: must be [{x.shape[1]}], one value for each channel of x")
    if bn.training and x.numel() <= x.shape[1]:
        raise ValueError(f"x is {list(x.shape)}: training needs more than one value per channel")


def _prepare(x: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm, *, recording: bool) -> tuple[Tensor, _Unit]:
    """Check the arguments of a batch norm and ReLU: x, channels-last, and what is done to it."""
    _check(x, gamma, beta, bn)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    code = bn.code if recording or bn.forward_from_code else None
    keeps_x = recording and code is None
    overwrite = (bn.overwrite_x or channels_last is not x) and not keeps_x
    owner = channels_last._base if channels_last._base is not None else channels_last
    if overwrite and recording and owner.is_leaf and owner.requires_grad:
        raise ValueError("overwrite_x = True, but x is a leaf that requires grad: its gradient is of the value it has")
    layout = Layout(x.shape, x.dtype, (gamma.dtype, beta.dtype), code, bn.kernels, bn.counter)
    return channels_last, _Unit(bn, layout, overwrite)
