"""Batch norm + ReLU, and the convolutions that read it, with one code kept for the backward passes of both.

Forward, exact (statistics per channel over N, H, W):

    x_hat = (x - mean) rstd,   y = gamma x_hat + beta,   a = max(y, 0),   out = conv(a, W)

Backward, from G, the gradient of out, and the codes of x_hat, which give x_hat~, a~ and relu_mask = [y > 0]:

    dW = conv_weight_grad(a~, G)                                     approximate
    dA = conv_input_grad(W, G),     dY = dA relu_mask                exact, given G
    dbeta = sum dY                                                   exact, given G
    dgamma = sum dY x_hat~                                           approximate
    dX = gamma rstd (dY - mean(dY) - x_hat~ mean(dY x_hat~))         only the last term is approximate

`batch_norm_relu` makes a and a `Kept`; every `conv2d` that reads a takes the Kept along, so all of them share its
codes.

Source: Chakrabarti and Moseley, NeurIPS 2019, section 3.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blpa.codec import Code
from blpa.kept import Kept, KeptTensors, Layout, norm_of, rows
from blpa.kernels import Kernels, compute_dtype
from blpa.kernels.reference import REFERENCE

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Statistics:
    """Which statistics normalise x; the arguments of batch_norm_relu of the same names."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    @property
    def are_constant(self) -> bool:
        """Whether they do not depend on x."""
        return not self.training and self.running_mean is not None and self.running_var is not None

    def mean_and_rstd(self, x: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """Mean and 1 / sqrt(var + eps) [C] for x [M, C]; in training the running averages move towards them."""
        dtype = compute_dtype(x.dtype)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_mean.to(dtype), (self.running_var.to(dtype) + self.eps).rsqrt()
        mean, var = kernels.channel_stats(x)
        if self.training and self.running_mean is not None and self.running_var is not None:
            unbiased = var * (x.shape[0] / (x.shape[0] - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, (var + self.eps).rsqrt()


class _BatchNormReLU(torch.autograd.Function):
    """x, gamma, beta -> a; appends the Kept to `keep`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        statistics: _Statistics,
        layout: Layout,
        overwrite: bool,
        forward_from_code: bool,
        keep: list[Kept],
    ) -> Tensor:
        code, kernels = layout.code, layout.kernels
        x_rows = rows(x)
        mean, rstd = statistics.mean_and_rstd(x_rows, kernels)
        norm = norm_of(mean, rstd, gamma, beta, code)
        a = x if overwrite else torch.empty_like(x)
        a_rows = x_rows if overwrite else rows(a)
        codes = kernels.normalise_rectify_encode(x_rows, norm, code=code, out=a_rows)
        if forward_from_code:
            assert codes is not None
            kernels.decode(codes, norm, code=code, out=a_rows)
        if overwrite:
            ctx.mark_dirty(x)
        kept = Kept(
            KeptTensors(x if codes is None else codes, mean if codes is None else None, rstd, gamma, beta), layout
        )
        kept.save(ctx)
        ctx.constant_stats = statistics.are_constant
        keep.append(kept)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, _ = Kept.saved(ctx)
        dx, dgamma, dbeta = kept.batch_norm_backward(grad, constant_stats=ctx.constant_stats)
        return dx, dgamma, dbeta, *(None,) * 5


class _Conv2d(torch.autograd.Function):
    """a, weight -> out; saves what a was made from, not a."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, kept: Kept, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> Tensor:
        kept.save(ctx, weight)
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(a, weight, None, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, (weight,) = Kept.saved(ctx)
        stride, padding, dilation, groups = ctx.geometry
        grad_a = grad_weight = None
        if ctx.needs_input_grad[1]:
            a = kept.decode(grad.dtype)
            which = (False, True, False)  # the gradients of input, weight and bias
            grad_weight = torch.ops.aten.convolution_backward(
                grad, a, weight.to(grad.dtype), None, stride, padding, dilation, False, (0, 0), groups, which
            )[1].to(weight.dtype)
            del a  # before dA is made: the two are of one size, and need not be alive together
        if ctx.needs_input_grad[0]:
            # The input gradient of a convolution is the transposed convolution; the sizes that the stride rounded away
            # come back as output padding.
            size, kernel = kept.layout.shape[2:], weight.shape[2:]
            lost = [
                size[i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
                for i in range(2)
            ]
            grad_a = F.conv_transpose2d(grad, weight.to(grad.dtype), None, stride, padding, lost, groups, dilation)
            grad_a = grad_a.to(kept.layout.dtype)
        return grad_a, grad_weight, *(None,) * 5


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


def batch_norm_relu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    code: Code | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
    overwrite_x: bool = False,
    forward_from_code: bool = False,
    kernels: Kernels = REFERENCE,
) -> tuple[Tensor, Kept | None]:
    """Normalise, scale and rectify x, and keep a code of it for the backward pass.

    a = max(gamma (x - mean) / sqrt(var + eps) + beta, 0)

    Args:
        x: float [N, C, H, W]; channels-last, else it is copied into that.
        gamma: scale [C], of either sign or zero.
        beta: shift [C].
        code: the code to keep; None keeps x itself, at full precision.
        running_mean: running average [C], updated in training, used in evaluation; None uses the statistics of x there.
        running_var: the same for the unbiased variance.
        training: normalise by the statistics of x, else by the running averages.
        momentum: weight of the new value in the running averages.
        eps: added to the variance.
        overwrite_x: x is not read again, so a may take its place (it does not where x is what is kept, or is copied).
        forward_from_code: a is decoded from the codes in the forward pass too, and gradients pass as if it were not:
            the paper's naive baseline.
        kernels: the back end.

    Returns:
        a [N, C, H, W], channels-last, and what the convolutions that read a need; None in place of that where no
        gradient is being recorded.

    Raises:
        ValueError: x is not floating point [N, C, H, W], gamma or beta is not [C], training has one value per channel
            only, or forward_from_code has no code.

    Source: Chakrabarti and Moseley, section 3; eps as theirs.
    """
    if not x.is_floating_point() or x.dim() != 4 or not x.numel():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: must be floating point [N, C, H, W], none of them 0")
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {list(vector.shape)}: must be [{x.shape[1]}], one value for each channel of x")
    if training and x.numel() <= x.shape[1]:
        raise ValueError(f"x is {list(x.shape)}: training needs more than one value per channel")
    if forward_from_code and code is None:
        raise ValueError("forward_from_code needs a code, and code is None")

    recording = torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad or beta.requires_grad)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    may_overwrite = overwrite_x or channels_last is not x
    code = code if recording or forward_from_code else None
    keeps_x = recording and code is None
    keep: list[Kept] = []
    a = _BatchNormReLU.apply(
        channels_last,
        gamma,
        beta,
        _Statistics(running_mean, running_var, training, momentum, eps),
        Layout(x.shape, x.dtype, code, kernels),
        may_overwrite and not keeps_x,
        forward_from_code,
        keep,
    )
    if not recording:
        return a, None
    keep[0].made_a_version = a._version
    return a, keep[0]


def conv2d(
    a: Tensor,
    kept: Kept | None,
    weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a, keeping for the backward pass not a but what it was made from.

    out = conv(a, W), without bias

    Args:
        a: output of batch_norm_relu [N, C, H, W], unchanged.
        kept: what batch_norm_relu returned with it; None is a plain convolution.
        weight: W [C_out, C / groups, k_h, k_w].
        stride: as torch.nn.functional.conv2d; so are padding, dilation and groups.
        padding: zeros added on each side.
        dilation: distance between the weights.
        groups: groups of channels that do not mix.

    Returns:
        out [N, C_out, H_out, W_out].

    Raises:
        ValueError: a is not of the shape that kept was made for, or was changed in place.

    Source: Chakrabarti and Moseley, section 3.
    """
    stride, padding, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, padding, dilation))
    if kept is None:
        return F.conv2d(a, weight, None, stride, padding, dilation, groups)
    if a.shape != kept.layout.shape:
        made_for = list(kept.layout.shape)
        raise ValueError(
            f"a is {list(a.shape)}, kept was made for {made_for}: pass on what one batch_norm_relu returned"
        )
    if a._version != kept.made_a_version:
        raise ValueError("a was changed in place since batch_norm_relu returned it: kept no longer tells what it was")
    return cast(Tensor, _Conv2d.apply(a, weight, kept, stride, padding, dilation, groups))
