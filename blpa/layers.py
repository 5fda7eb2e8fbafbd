"""Modules on the ops, with the parameters, buffers and state_dict keys of the stock modules they stand for.

A batch norm and ReLU gives an Activation, a convolution takes one, so a model is written once for every kind of layer:

    activation = batch_norm_relu(x)
    out = conv(activation)

and conv.after(batch_norm_relu, x) is both, for an activation that nothing else reads.

A network takes its layers from a factory, StockLayers or CodedLayers. `from_stock` makes a layer of one that exists.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from blpa import ops
from blpa.codec import Code
from blpa.convolution import Convolution, Pair
from blpa.kernels import Kernels
from blpa.kernels.reference import REFERENCE
from blpa.saved import Kept

FOUR_BITS = Code(bits=4)


class Activation(NamedTuple):
    """Output of a batch norm and ReLU."""

    value: Tensor
    """a [N, C, H, W]."""
    kept: Kept | None
    """What the backward pass of its readers needs in place of a; None for stock layers, and where none is recorded."""


class ResidualSum:
    """The sum of a block's output and its shortcut, which is not made yet.

    The batch norm that reads it first makes it, in the pass that takes its statistics.

    Args:
        x: what the block made, whose place the sum takes.
        shortcut: of the same shape; it is let go as soon as the sum is made.
    """

    def __init__(self, x: Tensor, shortcut: Tensor) -> None:
        self._x = x
        self._shortcut: Tensor | None = shortcut

    @property
    def shape(self) -> torch.Size:
        """Shape of the sum."""
        return self._x.shape

    def value(self) -> Tensor:
        """The sum."""
        if self._shortcut is not None:
            self._x, self._shortcut = self._x.add_(self._shortcut), None
        return self._x

    def value_and_statistics(self, gamma: Tensor, beta: Tensor, bn: ops.BatchNorm) -> tuple[Tensor, Tensor | None]:
        """The sum, and where it is made here, its statistics for that batch norm (ops.add_shortcut)."""
        statistics = None
        if self._shortcut is not None:
            self._x, statistics = ops.add_shortcut(self._x, self._shortcut, gamma, beta, bn)
            self._shortcut = None
        return self._x, statistics


def _made(x: Tensor | ResidualSum) -> Tensor:
    return x.value() if isinstance(x, ResidualSum) else x


class BatchNormReLU(nn.BatchNorm2d):
    """Batch norm and ReLU that keeps a code of its activation (ops.batch_norm_relu).

    It is an nn.BatchNorm2d so that weights of stock networks load, and so that whatever looks for batch norms in a
    network (weight decay, initialisation, freezing of statistics) finds it. Its defaults are the stock layer's.

    Args:
        num_features: channels C.
        eps: added to the variance; the paper's is 1e-3.
        momentum: weight of the new value in the running averages; None averages over all steps.
        code: the code to keep; None keeps one full-precision tensor.
        forward_from_code: a is decoded from the codes in the forward pass too.
        kernels: the back end.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        code: Code | None = FOUR_BITS,
        forward_from_code: bool = False,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.code = code
        self.forward_from_code = forward_from_code
        self.kernels = kernels
        self._counter = torch.zeros(num_features, dtype=torch.int32)

    @classmethod
    def from_stock(
        cls, bn: nn.BatchNorm2d, *, code: Code | None = FOUR_BITS, kernels: Kernels = REFERENCE
    ) -> "BatchNormReLU":
        """Make the layer that stands for a stock batch norm and the ReLU that reads it.

        Args:
            bn: its parameters and buffers become the new layer's too, so optimisers that hold them go on. Epsilon,
                momentum and the training flag are copied.
            code: as for the class.
            kernels: as for the class.

        Raises:
            ValueError: a subclass, hooks, no gamma and beta, or statistics that are tracked in part.
        """
        _check_is_stock(bn, nn.BatchNorm2d)
        if bn.weight is None or bn.bias is None:
            raise ValueError(f"affine = {bn.affine}: the batch norm must have gamma and beta")
        has_averages = {average is not None for average in (bn.running_mean, bn.running_var)}
        if has_averages != {bn.track_running_stats}:
            raise ValueError(f"track_running_stats = {bn.track_running_stats}: must say whether there are averages")
        ours = cls(bn.num_features, eps=bn.eps, momentum=bn.momentum, code=code, kernels=kernels)
        ours.track_running_stats = bn.track_running_stats
        ours.weight, ours.bias = bn.weight, bn.bias
        ours.running_mean, ours.running_var = bn.running_mean, bn.running_var
        ours.num_batches_tracked = bn.num_batches_tracked
        return ours.train(bn.training)

    def forward(self, x: Tensor | ResidualSum, *, overwrite_x: bool = False) -> Activation:  # type: ignore[override]
        """A [N, C, H, W] of x; it may take the place of x if `overwrite_x` says that x is not read again."""
        return Activation(*ops.batch_norm_relu(_made(x), self.weight, self.bias, self._batch_norm(overwrite_x)))

    def _batch_norm(self, overwrite_x: bool) -> ops.BatchNorm:
        """What ops need besides x and the parameters."""
        momentum = self.momentum
        if momentum is None:  # each of the batches has the same weight, this one too
            momentum = 1 / (int(self.num_batches_tracked) + 1) if self.num_batches_tracked is not None else 0.0
        return ops.BatchNorm(
            code=self.code,
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_batches_tracked=self.num_batches_tracked,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            overwrite_x=overwrite_x,
            forward_from_code=self.forward_from_code,
            kernels=self.kernels,
            counter=self._zero_counter(),
        )

    def _zero_counter(self) -> Tensor | None:
        """Zeros for the backend to count in (kernels.Kernels), made again where the weight has been moved to.

        They are no buffer: what initialises buffers would not know that these must be zero.
        """
        device = self.weight.device
        if self._counter.device != device:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # what a capture makes is zero only once the graph is replayed
            self._counter = torch.zeros_like(self._counter, device=device)
        return self._counter

    def extra_repr(self) -> str:
        """The stock module's, and the code."""
        return f"{nn.BatchNorm2d.extra_repr(self)}, code={self.code}, kernels={self.kernels.name}"


class Conv2d(nn.Conv2d):
    """Convolution without bias that reads an Activation and does not keep it (ops.conv2d).

    Args: as nn.Conv2d's, but that bias is False by default.

    Raises:
        ValueError: a bias, or padding other than a number of zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        bias: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, **others)
        if bias or self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(
                f"bias = {bias}, padding = {self.padding!r} ({self.padding_mode}): must be False, a number of zeros"
            )

    @classmethod
    def from_stock(cls, conv: nn.Conv2d) -> "Conv2d":
        """Make the layer that stands for a stock convolution.

        Args:
            conv: its weight becomes the new layer's too, so optimisers that hold it go on. Its options and the
                training flag are copied.

        Raises:
            ValueError: a subclass, hooks, a bias, or padding other than a number of zeros.
        """
        _check_is_stock(conv, nn.Conv2d)
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        ours = cls(
            conv.in_channels,
            conv.out_channels,
            cast(Pair, conv.kernel_size),
            bias=conv.bias is not None,
            device="meta",  # its own weight takes no memory and no random numbers
            **options,
        )
        ours.weight = conv.weight
        return ours.train(conv.training)

    def forward(self, activation: Activation) -> Tensor:  # type: ignore[override]
        """Out [N, C_out, H_out, W_out].

        Raises:
            TypeError: a tensor, say, of which nothing was kept.
        """
        if not isinstance(activation, Activation):
            raise TypeError(f"activation is a {type(activation).__name__}: must be what a BatchNormReLU returns")
        return ops.conv2d(activation.value, activation.kept, self.weight, convolution=self._convolution())

    def after(self, batch_norm_relu: nn.BatchNorm2d, x: Tensor, *, overwrite_x: bool = False) -> Tensor:
        """Out of x through a BatchNormReLU that nothing else reads, in one (ops.batch_norm_relu_conv2d).

        Where calling either layer would do more than that (hooks, a subclass's or an instance's own forward), they are
        called one after the other.
        """
        bn = batch_norm_relu
        if not self._is_one_with(bn):
            return cast(Tensor, self(bn(x, overwrite_x=overwrite_x)))
        return ops.batch_norm_relu_conv2d(
            x, bn.weight, bn.bias, self.weight, bn._batch_norm(overwrite_x), convolution=self._convolution()
        )

    def after_with_shortcut(self, batch_norm_relu: nn.BatchNorm2d, x: Tensor | ResidualSum) -> tuple[Tensor, Tensor]:
        """Out as `after`, and x for a shortcut that reads it too (ops.batch_norm_relu_conv2d_with_shortcut)."""
        bn, statistics = batch_norm_relu, None
        if not self._is_one_with(bn):
            x = _made(x)
            return cast(Tensor, self(bn(x))), x
        gamma, beta, options = bn.weight, bn.bias, bn._batch_norm(overwrite_x=False)
        if isinstance(x, ResidualSum):
            x, statistics = x.value_and_statistics(gamma, beta, options)
        return ops.batch_norm_relu_conv2d_with_shortcut(
            x, gamma, beta, self.weight, options, convolution=self._convolution(), statistics=statistics
        )

    def add_shortcut(self, out: Tensor, shortcut: Tensor) -> ResidualSum:
        """The sum of what this layer put out and a shortcut, for a batch norm and ReLU to make."""
        return ResidualSum(out, shortcut)

    def _is_one_with(self, bn: nn.BatchNorm2d) -> TypeGuard[BatchNormReLU]:
        return isinstance(bn, BatchNormReLU) and _is_plain(bn, BatchNormReLU) and _is_plain(self, Conv2d)

    def _convolution(self) -> Convolution:
        stride, padding, dilation = (cast(Pair, v) for v in (self.stride, self.padding, self.dilation))
        return Convolution(stride, padding, dilation, self.groups)


class StockBatchNormReLU(nn.BatchNorm2d):
    """PyTorch's own batch norm and in-place ReLU."""

    def forward(self, x: Tensor, *, overwrite_x: bool = False) -> Activation:  # type: ignore[override]
        """A [N, C, H, W]; x is kept for the backward pass and so never overwritten."""
        return Activation(F.relu(super().forward(x), inplace=True), None)


class StockConv2d(nn.Conv2d):
    """PyTorch's own convolution, which keeps what it reads."""

    def forward(self, activation: Activation) -> Tensor:  # type: ignore[override]
        """Out [N, C_out, H_out, W_out]."""
        return super().forward(activation.value)

    def after(self, batch_norm_relu: nn.BatchNorm2d, x: Tensor, *, overwrite_x: bool = False) -> Tensor:
        """Out of x through a batch norm and ReLU."""
        return cast(Tensor, self(batch_norm_relu(x, overwrite_x=overwrite_x)))

    def after_with_shortcut(self, batch_norm_relu: nn.BatchNorm2d, x: Tensor | ResidualSum) -> tuple[Tensor, Tensor]:
        """Out as `after`, and x, which autograd lets a shortcut read too."""
        x = _made(x)
        return cast(Tensor, self(batch_norm_relu(x))), x

    def add_shortcut(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """The sum of what this layer put out and a shortcut, in the place of the first."""
        return out.add_(shortcut)


def _is_plain(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Whether calling the module is calling the layer's own forward and nothing else."""
    return type(module).forward is layer.forward and not (_is_changed(module) or _has_any_global_hook())


def _is_changed(module: nn.Module) -> bool:
    """Whether an instance has hooks or a forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _check_is_stock(module: nn.Module, layer: type[nn.Module]) -> None:
    """Raise ValueError unless a module is a stock layer that does nothing but its own forward pass."""
    if type(module) is not layer:
        raise ValueError(f"layer is a {type(module).__name__}: must be a {layer.__name__}, and no subclass of it")
    if _is_changed(module):
        raise ValueError(f"{layer.__name__} has hooks or a forward of its own: remove them first")


@dataclass(frozen=True)
class StockLayers:
    """Make PyTorch's own layers, which save batch norm's input and ReLU's output for the backward pass.

    Args:
        eps: added to the variance; the paper's is 1e-3.
    """

    eps: float = 1e-5

    def batch_norm_relu(self, channels: int) -> StockBatchNormReLU:
        """Make a batch norm and ReLU: x -> Activation."""
        return StockBatchNormReLU(channels, eps=self.eps)

    def last_batch_norm_relu(self, channels: int) -> StockBatchNormReLU:
        """Make the network's last one, which no convolution reads: x -> Activation."""
        return self.batch_norm_relu(channels)

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> StockConv2d:
        """Make a convolution, padded by half its kernel: Activation -> out."""
        return StockConv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


@dataclass(frozen=True)
class CodedLayers:
    """Make layers that save a code of each activation, which batch norm and the convolutions share.

    Args:
        code: the code to save; None saves one full-precision tensor.
        forward_from_code: feed the decoded activation forward too, the paper's naive baseline.
        kernels: the backend.
        eps: added to the variance; the paper's is 1e-3.
    """

    code: Code | None = FOUR_BITS
    forward_from_code: bool = False
    kernels: Kernels = REFERENCE
    eps: float = 1e-5

    def batch_norm_relu(self, channels: int) -> BatchNormReLU:
        """Make a batch norm and ReLU: x -> Activation."""
        return BatchNormReLU(
            channels, eps=self.eps, code=self.code, forward_from_code=self.forward_from_code, kernels=self.kernels
        )

    def last_batch_norm_relu(self, channels: int) -> BatchNormReLU:
        """Make the network's last one, which no convolution reads: x -> Activation.

        Its backward pass is the first to run, so a code would be made only to be decoded at once: it saves its input.
        """
        return replace(self, code=self.code if self.forward_from_code else None).batch_norm_relu(channels)

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> Conv2d:
        """Make a convolution, padded by half its kernel: Activation -> out."""
        return Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)


Layers = StockLayers | CodedLayers
"""What a network takes its layers from."""
