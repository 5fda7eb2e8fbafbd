"""Batch norm + ReLU, and the convolutions that read it, whose backward passes share the codes of one activation.

Forward, exact (statistics per channel over N, H, W):

    x_hat = (x - mean) rstd,   y = gamma x_hat + beta,   a = max(y, 0),   out = conv(a, W)

Backward, from G, the gradient of out, and x_hat~, a~ and relu_mask = [y > 0], decoded from the codes of x_hat:

    dW = conv_weight_grad(a~, G)                                     approximate
    dA = conv_input_grad(W, G),     dY = dA relu_mask                exact, given G
    dbeta = sum dY                                                   exact, given G
    dgamma = sum dY x_hat~                                           approximate
    dX = gamma rstd (dY - mean(dY) - x_hat~ mean(dY x_hat~))         only the last term is approximate

PyTorch's functions save x and a at full precision.

    batch_norm_relu_conv2d                  all of the above, if one convolution reads a
    batch_norm_relu_conv2d_with_shortcut    if a shortcut reads x too: adds its gradient in the pass that writes dX
    add_shortcut                            if x is a residual sum: computes it in the pass over x for the statistics
    batch_norm_relu, conv2d                 if several convolutions read a: each gets a and its SavedActivation; a max
                                            pool may follow the ReLU

Source: Chakrabarti and Moseley, NeurIPS 2019, section 3.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blpa.codec import Codec
from blpa.convolution import Convolution, as_computed
from blpa.kernels import Kernels, Norm, RunningStats, compute_dtype
from blpa.kernels.automatic import AUTOMATIC
from blpa.once import differentiable_once
from blpa.processes import statistics_of_all
from blpa.saved import Layout, MaxPool, SavedActivation, new_activation, rows
from blpa.tracing import changes, is_traced, is_traced_without_gradient

_PLAIN = Convolution()


class BatchNorm(NamedTuple):
    """Options and running statistics of a batch norm and ReLU: everything but x, gamma and beta.

    Args:
        codec: of the saved codes; None saves x itself, at full precision.
        running_mean: running average [C], updated in training, used in evaluation; None uses the statistics of x.
        running_var: the same for the unbiased variance.
        num_batches_tracked: number of batches so far, int64 [], counted in training; None is not counted.
        training: normalise by the statistics of x, else by the running statistics.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        overwrite_x: a may overwrite x, since nothing else reads x. It does not if x is saved or had to be copied, or is
            a view and gradients are recorded (see _is_recorded_view).
        forward_from_code: use the decoded a in the forward pass too; gradients are as without: the paper's naive
            baseline.
        kernels: the backend; by default that of the tensor's device.
        counter: int32 [C], zeros, for the backend (see kernels.Kernels); like the running statistics, used by one
            stream at a time. None allocates one per call.
        group: of processes whose samples share the statistics in training (processes.sharing); each gets the gradient
            of its own samples, and of gamma and beta its own sums. None takes this process's alone.
    """

    codec: Codec | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-3
    overwrite_x: bool = False
    forward_from_code: bool = False
    kernels: Kernels = AUTOMATIC
    counter: Tensor | None = None
    group: Any = None

    @property
    def has_constant_stats(self) -> bool:
        """Whether running statistics are used, so that no gradient flows through them."""
        return not self.training and self.running_mean is not None and self.running_var is not None

    def vectors(
        self, x: Tensor, gamma: Tensor, beta: Tensor, codec: Codec | None, *, add: Tensor | None = None
    ) -> Tensor:
        """Compute the Norm [9, C] of x [M, C], or of x + add, written over x; update statistics in training."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            running_stats = None
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        elif self.training:
            running_stats = RunningStats(mean, var, self.momentum, self.num_batches_tracked)
        else:
            data = None
            if codec is not None and not self.forward_from_code:  # an image's output may not depend on its batch
                of_data = self.kernels.channel_stats(x, gamma, beta, eps=self.eps, codec=None, counter=self.counter)
                data = Norm(*of_data.unbind(0))
            var = var.to(compute_dtype(x.dtype))
            return torch.stack(Norm.of(mean, var, gamma, beta, eps=self.eps, codec=codec, data=data))
        if self.group is not None:
            of_own = self.kernels.channel_stats(x, gamma, beta, eps=self.eps, codec=None, add=add, counter=self.counter)
            mean, var, all_rows = statistics_of_all(of_own[0], of_own[1], x.shape[0], self.group)
            if running_stats is not None:
                running_stats.update(mean, var, all_rows)
            return torch.stack(Norm.of(mean, var, gamma, beta, eps=self.eps, codec=codec))
        return self.kernels.channel_stats(
            x, gamma, beta, eps=self.eps, codec=codec, running_stats=running_stats, add=add, counter=self.counter
        )


class _ForwardPass(NamedTuple):
    """The forward pass of a batch norm and ReLU whose arguments _prepare has checked."""

    bn: BatchNorm
    layout: Layout
    overwrite: bool
    """Write a over x."""
    vectors: Tensor | None = None
    """The Norm of x, if already computed."""

    def __call__(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, SavedActivation]:
        codec, kernels = self.layout.codec, self.layout.kernels
        x_rows = rows(x)
        vectors = self.bn.vectors(x_rows, gamma, beta, codec) if self.vectors is None else self.vectors
        a, a_rows = (x, x_rows) if self.overwrite else new_activation(x.shape, x.dtype, x.device)
        codes = kernels.normalise_rectify_encode(x_rows, vectors, codec=codec, out=a_rows)
        if self.bn.forward_from_code:
            assert codes is not None
            kernels.decode(codes, vectors, codec=codec, out=a_rows)
        places = None
        if self.layout.max_pool is not None:
            a, places = self.layout.max_pool(a)
        return a, SavedActivation(x if codes is None else codes, vectors, self.layout, places)


def _save(ctx: Any, saved: SavedActivation, weight: Tensor, convolution: Convolution) -> Tensor:
    """Save the tensors of _convolution_backward, and return W in the dtype of the convolution."""
    ctx.convolution, ctx.weight_dtype = convolution, weight.dtype
    weight = as_computed(weight)
    saved.save(ctx, weight)
    return weight


def _convolution_backward(
    ctx: Any, grad: Tensor, *, wants_da: bool, wants_dw: bool
) -> tuple[SavedActivation, Tensor | None, Tensor | None]:
    """Return the saved activation, dA and dW, None where not wanted. a~ is freed before dA, as large, is allocated."""
    saved, (weight,) = SavedActivation.load(ctx)
    convolution, layout = ctx.convolution, saved.layout
    da = dw = None
    if wants_dw:
        dw = saved.pointwise_weight_grad(grad) if convolution.is_pointwise(weight) else None
        if dw is None:
            dw = convolution.weight_grad(grad, saved.decode(grad.dtype), weight)
        dw = dw.view(weight.shape).to(ctx.weight_dtype)
        if not is_traced() and dw.is_contiguous() and weight.is_contiguous():
            dw = dw.as_strided(weight.shape, weight.stride())  # of 1x1 only: others may write the same memory otherwise
    if wants_da:
        da = convolution.input_grad(grad, weight, saved.shape).to(layout.dtype)
    return saved, da, dw


class _BatchNormReLU(torch.autograd.Function):
    """x, gamma, beta -> a, and its codes (None without a codec), vectors, and places (None without a max pool)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, forward_pass: _ForwardPass
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)  # else there would be zeros as large as the codes
        a, saved = forward_pass(x, gamma, beta)
        if a is x:
            ctx.mark_dirty(x)
        saved.save(ctx)
        ctx.constant_stats = forward_pass.bn.has_constant_stats
        codes = None if forward_pass.layout.codec is None else saved.values
        others = codes, saved.vectors, saved.places
        ctx.mark_non_differentiable(*(tensor for tensor in others if tensor is not None))
        return a, *others

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        saved = SavedActivation.load(ctx)[0]
        dx, dgamma, dbeta = saved.batch_norm_backward(grad, constant_stats=ctx.constant_stats)
        return dx, dgamma, dbeta, None


class _Conv2d(torch.autograd.Function):
    """a, weight -> out; saves the codes of a, not a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, saved: SavedActivation, convolution: Convolution) -> Tensor:
        weight = _save(ctx, saved, weight, convolution)
        return convolution(a, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_da, wants_dw = ctx.needs_input_grad[:2]
        _, da, dw = _convolution_backward(ctx, grad, wants_da=wants_da, wants_dw=wants_dw)
        return da, dw, None, None


class _BatchNormReLUConv2d(torch.autograd.Function):
    """x, gamma, beta, weight -> out, x: both of the above fused.

    dA is private to this function, so dX is written over it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        forward_pass: _ForwardPass,
        convolution: Convolution,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        a, saved = forward_pass(x, gamma, beta)
        weight = _save(ctx, saved, weight, convolution)
        ctx.constant_stats = forward_pass.bn.has_constant_stats
        return convolution(a, weight), None if forward_pass.overwrite else x

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_x: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_x, *(None,) * 5
        *wants_da, wants_dw = ctx.needs_input_grad[:4]
        saved, da, dw = _convolution_backward(ctx, grad, wants_da=any(wants_da), wants_dw=wants_dw)
        dx = dgamma = dbeta = None
        if da is not None:
            dx, dgamma, dbeta = saved.batch_norm_backward(
                da, constant_stats=ctx.constant_stats, overwrite_grad=True, add=grad_x
            )
        return dx, dgamma, dbeta, dw, None, None


class _AddShortcut(torch.autograd.Function):
    """x, shortcut, gamma, beta -> x + shortcut, written over x, and its Norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # else the Norm would get a gradient of zeros
        vectors = bn.vectors(rows(x), gamma, beta, bn.codec, add=rows(shortcut))
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(vectors)
        return x, vectors

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return grad, grad, None, None, None


class _AveragePool(torch.autograd.Function):
    """x -> its mean over windows of stride x stride; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        return F.avg_pool2d(x, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.interpolate(grad, scale_factor=ctx.stride, mode="nearest") / ctx.stride**2, None


def average_pool(x: Tensor, stride: int) -> Tensor:
    """Average over windows of stride x stride; F.avg_pool2d would save x, although its gradient needs only a shape.

    Args:
        x: [N, C, H, W].
        stride: a divisor of H and W.

    Returns:
        [N, C, H / stride, W / stride].

    Raises:
        ValueError: stride does not divide H and W.
    """
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(f"x is {list(x.shape)}: height and width must be multiples of {stride}")
    return cast(Tensor, _AveragePool.apply(x, stride))


def batch_norm_relu(
    x: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm, *, max_pool: MaxPool | None = None
) -> tuple[Tensor, SavedActivation | None]:
    """Normalise, scale and rectify x, pool it if asked to, and save its codes for the backward pass.

    a = max_pool(max(gamma (x - mean) / sqrt(var + eps) + beta, 0))

    Args:
        x: floating point [N, C, H, W]; copied unless channels-last.
        gamma: scale [C], of either sign or zero.
        beta: shift [C].
        bn: options and running statistics.
        max_pool: the windows; None does not pool. The place of each maximum is saved too, a byte each; PyTorch saves
            max_pool's input and an int64 each.

    Returns:
        a [N, C, H, W], channels-last, and the argument `saved` of conv2d, None if no gradient is recorded. With a max
        pool a is [N, C, h, w].

    Raises:
        ValueError: x is not floating point [N, C, H, W], gamma or beta is not [C], training has only one value per
            channel, or overwrite_x would overwrite a leaf.

    Source: Chakrabarti and Moseley, section 3; eps as theirs.
    """
    is_recording = _is_recording(x, gamma, beta)
    x, forward_pass = _prepare(x, gamma, beta, bn, is_recording=is_recording, max_pool=max_pool)
    if is_traced_without_gradient():
        with torch.no_grad():
            return forward_pass(x, gamma, beta)[0], None
    a, codes, vectors, places = _BatchNormReLU.apply(x, gamma, beta, forward_pass)
    if not is_recording:
        return a, None
    saved = SavedActivation(x if codes is None else codes, vectors, forward_pass.layout, places)
    saved.output_changes = changes(a)
    return a, saved


def conv2d(a: Tensor, saved: SavedActivation | None, weight: Tensor, *, convolution: Convolution = _PLAIN) -> Tensor:
    """Convolve a, and save its codes for the backward pass instead of a.

    out = conv(a, W), without bias

    Args:
        a: output of batch_norm_relu, unchanged: [N, C, H, W].
        saved: returned by batch_norm_relu with a; None for a plain convolution.
        weight: W [C_out, C / groups, k_h, k_w].
        convolution: stride, padding, dilation and groups.

    Returns:
        out [N, C_out, H_out, W_out].

    Raises:
        ValueError: a differs in shape from the saved activation, or was changed in place.

    Source: Chakrabarti and Moseley, section 3.
    """
    if saved is None:
        return convolution(a, weight)
    if a.shape != saved.shape:
        made_for = list(saved.shape)
        raise ValueError(
            f"a is {list(a.shape)}, saved was made for {made_for}: pass on what one batch_norm_relu returned"
        )
    now = changes(a)
    if now.graph != saved.output_changes.graph:  # the graph ended in between, and a may have changed since
        return convolution(a, weight)
    if now.times != saved.output_changes.times:
        raise ValueError("a was changed in place since batch_norm_relu returned it: saved is of its former value")
    return cast(Tensor, _Conv2d.apply(a, weight, saved, convolution))


def batch_norm_relu_conv2d(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    convolution: Convolution = _PLAIN,
) -> Tensor:
    """Apply batch norm, ReLU and the only convolution that reads them, fused.

    The result has the same bits as that of batch_norm_relu and conv2d; the input gradient overwrites the gradient of a.

    Args:
        x: as in batch_norm_relu; so are gamma, beta and bn.
        gamma: scale [C].
        beta: shift [C].
        weight: as in conv2d; so is convolution.
        bn: options and running statistics.
        convolution: stride, padding, dilation and groups.

    Returns:
        out [N, C_out, H_out, W_out].

    Raises:
        ValueError: as for batch_norm_relu.

    Source: Chakrabarti and Moseley, section 3.
    """
    if not _is_recording(x, gamma, beta):
        a, _ = batch_norm_relu(x, gamma, beta, bn)
        return convolution(a, weight)
    x, forward_pass = _prepare(x, gamma, beta, bn, is_recording=True)
    out, _ = _BatchNormReLUConv2d.apply(x, gamma, beta, weight, forward_pass, convolution)
    return cast(Tensor, out)


def add_shortcut(
    x: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm
) -> tuple[Tensor, Tensor | None]:
    """Add a shortcut to x, in place, and compute the statistics of the sum in the same pass.

    Args:
        x: [N, C, H, W], overwritten as in sum_of.
        shortcut: of the same shape.
        gamma: scale [C] of the batch norm that reads the sum next; beta and bn are its too.
        beta: shift [C].
        bn: options and running statistics.

    Returns:
        x + shortcut, and the argument `statistics` of batch_norm_relu_conv2d_with_shortcut, None if not computed here:
        no gradient is recorded, the statistics are constant, memory is not channels-last, or x may not be overwritten.

    Raises:
        ValueError: as for batch_norm_relu.

    Source: the sum is He et al. 2016's.
    """
    _check(x, gamma, beta, bn)
    if is_traced():
        return x + shortcut, None
    is_alike = (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype) and not _is_recorded_view(x)
    in_rows = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, shortcut))
    if not (is_alike and in_rows and _is_recording(x, shortcut, gamma, beta)) or bn.has_constant_stats:
        return sum_of(x, shortcut), None
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
    """Apply batch_norm_relu_conv2d to an x that a shortcut reads too.

    Autograd would add x's two gradients in a separate pass over three tensors. Here the pass that writes dX adds the
    gradient of the returned x.

    Args:
        x: as in batch_norm_relu_conv2d; so are the others.
        gamma: scale [C].
        beta: shift [C].
        weight: as in conv2d.
        bn: options and running statistics; overwrite_x must be false.
        convolution: stride, padding, dilation and groups.
        statistics: returned by add_shortcut with x; None computes them.

    Returns:
        out [N, C_out, H_out, W_out], and x for the shortcut.

    Raises:
        ValueError: as for batch_norm_relu, or overwrite_x is true.

    Source: the sum is He et al. 2016's; the rest is Chakrabarti and Moseley, section 3.
    """
    if bn.overwrite_x:
        raise ValueError("overwrite_x = True, but a shortcut reads x again")
    if not (_is_recording(x, gamma, beta) and x.is_contiguous(memory_format=torch.channels_last)):
        return batch_norm_relu_conv2d(x, gamma, beta, weight, bn, convolution=convolution), x
    x, forward_pass = _prepare(x, gamma, beta, bn, is_recording=True)
    forward_pass = forward_pass._replace(vectors=statistics)
    out, x_again = _BatchNormReLUConv2d.apply(x, gamma, beta, weight, forward_pass, convolution)
    return cast(Tensor, out), cast(Tensor, x_again)


def sum_of(x: Tensor, shortcut: Tensor) -> Tensor:
    """Return x + shortcut, written over x unless autograd forbids that."""
    return x + shortcut if _is_recorded_view(x) else x.add_(shortcut)


def _is_recorded_view(x: Tensor) -> bool:
    """Return whether x is a view in a graph: the functions that made it may not allow it to be changed.

    Such are what FSDP's and full backward hooks pass on to a module.
    """
    if is_traced():
        return False
    return torch.is_grad_enabled() and x.requires_grad and x._is_view()


def _is_recording(*tensors: Tensor) -> bool:
    """Return whether a backward pass may follow; never that of a network exported for evaluation."""
    is_wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return is_wanted and not is_traced_without_gradient()


def _check(x: Tensor, gamma: Tensor, beta: Tensor, bn: BatchNorm) -> None:
    """Raise ValueError for arguments that batch_norm_relu does not allow."""
    if is_traced_without_gradient():  # sizes are tensors then
        if bn.training:
            raise ValueError(
                "training = True under torch.jit.trace or torch.export, which cannot record what is saved for the "
                "backward pass: trace a network in evaluation, or use torch.compile"
            )
        return
    if bn.group is not None and is_traced():
        raise ValueError(
            "sync = True under torch.compile: must be False in several processes, or the network not compiled"
        )
    if not x.is_floating_point() or x.dim() != 4 or not x.numel():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: must be floating point [N, C, H, W], none of them 0")
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {list(vector.shape)}: must be [{x.shape[1]}], one value for each channel of x")
    if bn.training and x.numel() <= x.shape[1] and bn.group is None:  # the others have some too
        raise ValueError(f"x is {list(x.shape)}: training needs more than one value per channel")
    if bn.forward_from_code and bn.codec is None:
        raise ValueError("forward_from_code = True, but codec = None: must have codes to decode")
    if (bn.running_mean is None) != (bn.running_var is None):
        missing = "running_mean" if bn.running_mean is None else "running_var"
        raise ValueError(f"{missing} = None, but the other running average is there: must be both or none")


def _prepare(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bn: BatchNorm,
    *,
    is_recording: bool,
    max_pool: MaxPool | None = None,
) -> tuple[Tensor, _ForwardPass]:
    """Check the arguments of a batch norm and ReLU; return x, channels-last, and its forward pass."""
    _check(x, gamma, beta, bn)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    codec = bn.codec if is_recording or bn.forward_from_code else None
    saves_x = is_recording and codec is None
    may_overwrite = channels_last is not x or (bn.overwrite_x and not _is_recorded_view(x))
    overwrite = may_overwrite and not saves_x and not is_traced()
    if overwrite and is_recording and channels_last.is_leaf and channels_last.requires_grad:
        raise ValueError("overwrite_x = True, but x is a leaf that requires grad: must be False for it")
    layout = Layout(x.shape, x.dtype, (gamma.dtype, beta.dtype), codec, bn.kernels, bn.counter, bn.group, max_pool)
    return channels_last, _ForwardPass(bn, layout, overwrite)
