"""Modules for the ops, with the parameters, buffers and state_dict keys of the stock modules that they replace.

Stock modules exchange tensors. Here a batch norm and ReLU returns an Activation and a convolution takes one, so that
they share its codes, and a network is written once for coded and stock layers:

    activation = batch_norm_relu(x)
    out = conv(activation)

conv.after(batch_norm_relu, x) fuses the two, for an activation that nothing else reads.

A network gets its layers from a factory, StockLayers or CodedLayers. `from_stock` converts an existing layer.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from blpa import ops
from blpa.codec import Codec
from blpa.convolution import Convolution, Pair
from blpa.kernels import Kernels
from blpa.kernels.automatic import AUTOMATIC
from blpa.processes import sharing
from blpa.saved import MaxPool, SavedActivation

FOUR_BITS = Codec(bits=4)


class Activation(NamedTuple):
    """Output of a batch norm and ReLU."""

    value: Tensor
    """a [N, C, H, W], pooled if the layer has a max pool."""
    saved: SavedActivation | None
    """Saved for the convolutions that read a; None for stock layers or without grad."""


class ResidualSum:
    """The sum of a block's output and its shortcut, deferred.

    The next batch norm computes it in its pass over x for the statistics.

    Args:
        x: output of the block, which the sum overwrites, as in ops.sum_of.
        shortcut: of the same shape; freed when the sum is computed.
    """

    def __init__(self, x: Tensor, shortcut: Tensor) -> None:
        self._x = x
        self._shortcut: Tensor | None = shortcut

    @property
    def shape(self) -> torch.Size:
        """Shape of the sum."""
        return self._x.shape

    @property
    def device(self) -> torch.device:
        """Device of the sum."""
        return self._x.device

    def value(self) -> Tensor:
        """Return the sum."""
        if self._shortcut is not None:
            self._x, self._shortcut = ops.sum_of(self._x, self._shortcut), None
        return self._x

    def value_and_statistics(self, gamma: Tensor, beta: Tensor, bn: ops.BatchNorm) -> tuple[Tensor, Tensor | None]:
        """Return the sum, and its statistics for bn if this call computes it (see ops.add_shortcut)."""
        statistics = None
        if self._shortcut is not None:
            self._x, statistics = ops.add_shortcut(self._x, self._shortcut, gamma, beta, bn)
            self._shortcut = None
        return self._x, statistics


def as_tensor(x: Tensor | ResidualSum) -> Tensor:
    """Return x, or compute the sum that it is."""
    return x.value() if isinstance(x, ResidualSum) else x


class BatchNormReLU(nn.BatchNorm2d):
    """Batch norm and ReLU that saves the codes of its activation (ops.batch_norm_relu).

    It is an nn.BatchNorm2d, so weights of stock networks load, and code that looks for batch norms (weight decay,
    initialisation, frozen statistics) finds it. Its defaults are those of the stock layer. As there, each call follows
    the attributes as they are then: training, track_running_stats, momentum, eps, parameters and buffers that are None.

    Args:
        num_features: channels C.
        eps: added to the variance; 1e-3 in the paper.
        momentum: weight of the new value in the running statistics; None averages over all steps.
        affine: have gamma and beta; without them gamma is 1 and beta 0.
        track_running_stats: have running statistics; without them evaluation takes those of x.
        codec: of the saved codes; None saves one full-precision tensor.
        forward_from_code: use the decoded activation in the forward pass too.
        kernels: the backend; by default that of the tensor's device.
        max_pool: of the activation; None does not pool.
        sync: in training, statistics and the means of the gradient are those of the samples of all processes, if there
            are several (torch.distributed); each process needs some.
        process_group: the processes that share them; None is all.
        others: device, dtype and what else nn.BatchNorm2d takes.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        codec: Codec | None = FOUR_BITS,
        forward_from_code: bool = False,
        kernels: Kernels = AUTOMATIC,
        max_pool: MaxPool | None = None,
        sync: bool = False,
        process_group: Any = None,
        **others: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **others)
        self.codec = codec
        self.forward_from_code = forward_from_code
        self.kernels = kernels
        self.max_pool = max_pool
        self.sync = sync
        self.process_group = process_group
        self._counter = torch.zeros(num_features, dtype=torch.int32)

    @classmethod
    def from_stock(
        cls, bn: nn.BatchNorm2d, *, codec: Codec | None = FOUR_BITS, kernels: Kernels = AUTOMATIC
    ) -> "BatchNormReLU":
        """Convert a stock batch norm and the ReLU after it.

        Args:
            bn: the new layer shares its parameters and buffers, so optimisers stay valid, and copies its attributes and
                the training flag.
            codec: as for the class.
            kernels: as for the class.

        Raises:
            ValueError: a subclass, or hooks.
        """
        _check_is_stock(bn, nn.BatchNorm2d)
        ours = cls(bn.num_features, eps=bn.eps, momentum=bn.momentum, affine=bn.affine, codec=codec, kernels=kernels)
        ours.track_running_stats = bn.track_running_stats
        ours.weight, ours.bias = bn.weight, bn.bias
        ours.running_mean, ours.running_var = bn.running_mean, bn.running_var
        ours.num_batches_tracked = bn.num_batches_tracked
        return ours.train(bn.training)

    def forward(self, x: Tensor | ResidualSum, *, overwrite_x: bool = False) -> Activation:  # type: ignore[override]
        """Compute a; `overwrite_x` allows max(y, 0) to overwrite x, for an x that nothing else reads."""
        arguments = self._arguments(x.device, overwrite_x)
        return Activation(*ops.batch_norm_relu(as_tensor(x), *arguments, max_pool=self.max_pool))

    def _arguments(self, device: torch.device, overwrite_x: bool) -> tuple[Tensor, Tensor, ops.BatchNorm]:
        """Return gamma, beta and the options of the ops for a call with an x on this device."""
        gamma, beta = self.weight, self.bias
        if gamma is None:
            gamma = torch.ones(self.num_features, device=device)
        if beta is None:
            beta = torch.zeros(self.num_features, device=device)
        return gamma, beta, self._batch_norm(device, overwrite_x)

    def _batch_norm(self, device: torch.device, overwrite_x: bool) -> ops.BatchNorm:
        is_tracking = self.training and self.track_running_stats
        uses_averages = is_tracking or not self.training
        batches, momentum = self.num_batches_tracked if is_tracking else None, self.momentum
        if momentum is None:  # all batches so far have the same weight
            momentum = 0.0 if batches is None else 1 / (int(batches) + 1)
        return ops.BatchNorm(
            codec=self.codec,
            running_mean=self.running_mean if uses_averages else None,
            running_var=self.running_var if uses_averages else None,
            num_batches_tracked=batches,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            overwrite_x=overwrite_x,
            forward_from_code=self.forward_from_code,
            kernels=self.kernels,
            counter=self._zero_counter(device),
            group=self._group(device),
        )

    def _group(self, device: torch.device) -> Any:
        """Return the processes that share the statistics of this call; None on the meta device, which only counts."""
        if not (self.sync and self.training) or device.type == "meta":
            return None
        return sharing(self.process_group)

    def _zero_counter(self, device: torch.device) -> Tensor | None:
        """Return zeros for the backend (see kernels.Kernels) on a device.

        They are not a buffer, which to_empty and code that initialises buffers would change. None in a capture that is
        the first call on its device: the backend then makes some.
        """
        if self._counter.device != device:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # a captured fill runs only when the graph is replayed
            self._counter = torch.zeros_like(self._counter, device=device)
        return self._counter

    def extra_repr(self) -> str:
        """Return the text of the stock module, the codec and the backend."""
        pool = "" if self.max_pool is None else f", max_pool={self.max_pool}"
        sync = ", sync=True" if self.sync else ""
        return f"{nn.BatchNorm2d.extra_repr(self)}, codec={self.codec}, kernels={self.kernels.name}{pool}{sync}"


class Conv2d(nn.Conv2d):
    """Convolution without bias that takes an Activation and saves its codes (ops.conv2d).

    Args: those of nn.Conv2d, with bias False by default.

    Raises:
        ValueError: a bias, or padding that is not a number of zeros.
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
        """Convert a stock convolution.

        Args:
            conv: the new layer shares its weight, so optimisers stay valid, and copies its options and the training
                flag.

        Raises:
            ValueError: a subclass, hooks, a bias, or padding that is not a number of zeros.
        """
        _check_is_stock(conv, nn.Conv2d)
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        ours = cls(
            conv.in_channels,
            conv.out_channels,
            cast(Pair, conv.kernel_size),
            bias=conv.bias is not None,
            device="meta",  # the weight to be replaced takes no memory and no random numbers
            **options,
        )
        ours.weight = conv.weight
        return ours.train(conv.training)

    def forward(self, activation: Activation) -> Tensor:  # type: ignore[override]
        """Compute out [N, C_out, H_out, W_out].

        Raises:
            TypeError: the argument is not an Activation, such as a plain tensor.
        """
        _check_is_activation(activation)
        return ops.conv2d(activation.value, activation.saved, self.weight, convolution=self._convolution())

    def after(self, batch_norm_relu: nn.Module, x: Tensor, *, overwrite_x: bool = False) -> Tensor:
        """Apply a BatchNormReLU whose output nothing else reads, and this layer, fused (ops.batch_norm_relu_conv2d).

        The two are called one after the other if batch_norm_relu is another class or has a max pool, or one of them
        has hooks or an overridden forward.

        Args:
            batch_norm_relu: the layer before this one.
            x: [N, C, H, W].
            overwrite_x: allow a to overwrite x, for an x that nothing else reads.

        Returns:
            out [N, C_out, H_out, W_out].

        Raises:
            TypeError: the other class is a batch norm without ReLU.
        """
        bn = batch_norm_relu
        check_has_relu(bn)
        if not self._is_one_with(bn):
            return cast(Tensor, self(bn(x, overwrite_x=overwrite_x)))
        gamma, beta, options = bn._arguments(x.device, overwrite_x)
        return ops.batch_norm_relu_conv2d(x, gamma, beta, self.weight, options, convolution=self._convolution())

    def after_with_shortcut(self, batch_norm_relu: nn.Module, x: Tensor | ResidualSum) -> tuple[Tensor, Tensor]:
        """Return `after` of x, and x for the shortcut (ops.batch_norm_relu_conv2d_with_shortcut)."""
        bn, statistics = batch_norm_relu, None
        check_has_relu(bn)
        if not self._is_one_with(bn):
            x = as_tensor(x)
            return cast(Tensor, self(bn(x))), x
        gamma, beta, options = bn._arguments(x.device, overwrite_x=False)
        if isinstance(x, ResidualSum):
            x, statistics = x.value_and_statistics(gamma, beta, options)
        return ops.batch_norm_relu_conv2d_with_shortcut(
            x, gamma, beta, self.weight, options, convolution=self._convolution(), statistics=statistics
        )

    def add_shortcut(self, out: Tensor, shortcut: Tensor) -> ResidualSum:
        """Return the deferred sum of this layer's output and a shortcut; a block that FSDP shards returns its value."""
        return ResidualSum(out, shortcut)

    def _is_one_with(self, bn: nn.Module) -> TypeGuard[BatchNormReLU]:
        if not isinstance(bn, BatchNormReLU) or bn.max_pool is not None:
            return False
        return _is_plain(bn, BatchNormReLU) and _is_plain(self, Conv2d)

    def _convolution(self) -> Convolution:
        stride, padding, dilation = (cast(Pair, v) for v in (self.stride, self.padding, self.dilation))
        return Convolution(stride, padding, dilation, self.groups)


class StockBatchNormReLU(nn.BatchNorm2d):
    """PyTorch's own batch norm, in-place ReLU and, if there is one, max pool."""

    max_pool: MaxPool | None = None

    def forward(self, x: Tensor, *, overwrite_x: bool = False) -> Activation:  # type: ignore[override]
        """Compute a; x is saved for the backward pass, so never overwritten."""
        a = F.relu(super().forward(x), inplace=True)
        return Activation(a if self.max_pool is None else F.max_pool2d(a, *self.max_pool), None)


class StockSyncBatchNormReLU(nn.SyncBatchNorm):
    """The same, of PyTorch's SyncBatchNorm, which in training with several processes refuses a CPU."""

    max_pool: MaxPool | None = None

    def forward(self, x: Tensor, *, overwrite_x: bool = False) -> Activation:  # type: ignore[override]
        """Compute a; x is saved for the backward pass, so never overwritten."""
        a = F.relu(super().forward(x), inplace=True)
        return Activation(a if self.max_pool is None else F.max_pool2d(a, *self.max_pool), None)


StockBatchNorm = StockBatchNormReLU | StockSyncBatchNormReLU


class StockConv2d(nn.Conv2d):
    """PyTorch's own convolution, which saves its input."""

    def forward(self, activation: Activation) -> Tensor:  # type: ignore[override]
        """Compute out [N, C_out, H_out, W_out].

        Raises:
            TypeError: the argument is not an Activation, such as a plain tensor.
        """
        _check_is_activation(activation)
        return super().forward(activation.value)

    def after(self, batch_norm_relu: nn.Module, x: Tensor, *, overwrite_x: bool = False) -> Tensor:
        """Apply a batch norm and ReLU, and this layer."""
        check_has_relu(batch_norm_relu)
        return cast(Tensor, self(batch_norm_relu(x, overwrite_x=overwrite_x)))

    def after_with_shortcut(self, batch_norm_relu: nn.Module, x: Tensor | ResidualSum) -> tuple[Tensor, Tensor]:
        """Return `after` of x, and x for the shortcut."""
        check_has_relu(batch_norm_relu)
        x = as_tensor(x)
        return cast(Tensor, self(batch_norm_relu(x))), x

    def add_shortcut(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add a shortcut to this layer's output, in place."""
        return out.add_(shortcut)


_HOW_TO_SYNC = (
    "PyTorch's convert_sync_batchnorm drops ReLU and codes: use CodedLayers(sync=True), StockLayers(sync=True) or "
    "BatchNormReLU(..., sync=True) instead"
)


def check_has_relu(layer: nn.Module) -> None:
    """Raise TypeError for a batch norm of PyTorch's in the place of one with ReLU."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, BatchNormReLU | StockBatchNorm):
        raise TypeError(
            f"layer is a {type(layer).__name__}: must be a BatchNormReLU or StockBatchNormReLU. {_HOW_TO_SYNC}"
        )


def _check_is_activation(activation: object) -> None:
    """Raise TypeError for a plain tensor, such as what a batch norm of PyTorch's returns."""
    if not isinstance(activation, Activation):
        raise TypeError(
            f"activation is a {type(activation).__name__}: must be what a BatchNormReLU returns; a first convolution "
            f"is an nn.Conv2d. {_HOW_TO_SYNC}"
        )


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP's hooks are on a module: they find tensors that it returns, not those in a ResidualSum."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _is_plain(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Return whether calling the module runs only the forward of `layer`: no hooks, no override."""
    return type(module).forward is layer.forward and not (_is_changed(module) or _has_any_global_hook())


def _is_changed(module: nn.Module) -> bool:
    """Return whether an instance has hooks or its own forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _check_is_stock(module: nn.Module, layer: type[nn.Module]) -> None:
    """Raise ValueError unless a module is exactly a `layer`, without hooks or its own forward."""
    if type(module) is not layer:
        raise ValueError(f"layer is a {type(module).__name__}: must be a {layer.__name__}, and no subclass of it")
    if _is_changed(module):
        raise ValueError(f"{layer.__name__} has hooks or a forward of its own: remove them first")


@dataclass(frozen=True)
class StockLayers:
    """Make PyTorch's own layers, which save batch norm's input and ReLU's output for the backward pass.

    Args:
        eps: added to the variance; 1e-3 in the paper.
        sync: statistics of all processes, by PyTorch's SyncBatchNorm.
    """

    eps: float = 1e-5
    sync: bool = False

    def batch_norm_relu(self, channels: int) -> StockBatchNorm:
        """Make a batch norm and ReLU: x -> Activation."""
        layer = StockSyncBatchNormReLU if self.sync else StockBatchNormReLU
        return layer(channels, eps=self.eps)

    def batch_norm_relu_max_pool(self, channels: int, max_pool: MaxPool) -> StockBatchNorm:
        """Make a batch norm, ReLU and max pool: x -> Activation."""
        layer = self.batch_norm_relu(channels)
        layer.max_pool = max_pool
        return layer

    def last_batch_norm_relu(self, channels: int) -> StockBatchNorm:
        """Make the network's last one, which no convolution reads: x -> Activation."""
        return self.batch_norm_relu(channels)

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> StockConv2d:
        """Make a convolution, padded by half its kernel: Activation -> out."""
        return StockConv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


@dataclass(frozen=True)
class CodedLayers:
    """Make layers that save the codes of each activation, shared by batch norm and the convolutions.

    Args:
        codec: of the saved codes; None saves one full-precision tensor.
        forward_from_code: use the decoded activation in the forward pass too: the paper's naive baseline.
        kernels: the backend; by default that of the tensor's device.
        eps: added to the variance; 1e-3 in the paper.
        codes_max_pool: a batch norm, ReLU and max pool saves codes too. In the paper it saves its input.
        sync: statistics of all processes (BatchNormReLU).
    """

    codec: Codec | None = FOUR_BITS
    forward_from_code: bool = False
    kernels: Kernels = AUTOMATIC
    eps: float = 1e-5
    codes_max_pool: bool = False
    sync: bool = False

    def batch_norm_relu(self, channels: int) -> BatchNormReLU:
        """Make a batch norm and ReLU: x -> Activation."""
        return BatchNormReLU(
            channels, eps=self.eps, codec=self.codec, forward_from_code=self.forward_from_code, kernels=self.kernels,
            sync=self.sync,
        )  # fmt: skip

    def batch_norm_relu_max_pool(self, channels: int, max_pool: MaxPool) -> BatchNormReLU:
        """Make a batch norm, ReLU and max pool: x -> Activation."""
        layer = (self if self.codes_max_pool else self._without_codes()).batch_norm_relu(channels)
        layer.max_pool = max_pool
        return layer

    def last_batch_norm_relu(self, channels: int) -> BatchNormReLU:
        """Make the network's last one, which no convolution reads: x -> Activation.

        It saves its input: its backward pass is the first to run, so codes would be decoded at once.
        """
        return self._without_codes().batch_norm_relu(channels)

    def _without_codes(self) -> "CodedLayers":
        """Return these layers without codes, unless the forward pass uses them."""
        return replace(self, codec=self.codec if self.forward_from_code else None)

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> Conv2d:
        """Make a convolution, padded by half its kernel: Activation -> out."""
        return Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)


Layers = StockLayers | CodedLayers
"""A factory of layers."""
