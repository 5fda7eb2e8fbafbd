"""The functions for activations of any layout as operations of torch.library: what converted networks call.

An operation is one node in a graph of torch.compile or torch.export, whatever computes it. It allocates its result and
changes none of its arguments, so a compiler may order, drop and share operations. The tensor's device chooses the
kernels (`kernels_for`); on the meta device results are allocated and nothing is computed.

any_layout.py has formulas and shapes. Here tensors are the user's, of any strides; results are dense, and channels last
in memory where `channels_last` says so.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import RunningStats, any_layout, bits, compute_dtype, cpu
from blpa.kernels.any_layout import Elementwise, Vectors
from blpa.kernels.available import supports_triton
from blpa.kernels.order import Order, dense, empty


class AnyLayoutKernels(Protocol):
    """The contract of kernels for a device: the functions of any_layout.py, on dense tensors."""

    channel_stats: Callable[..., Tensor]
    grid_vectors: Callable[..., Tensor]
    encode: Callable[..., Tensor]
    normalise_encode: Callable[..., Tensor]
    decode: Callable[..., None]
    elementwise_grad: Callable[..., None]
    gradient_sums: Callable[..., Tensor]
    row_means: Callable[..., Tensor]
    input_grad: Callable[..., None]


class BatchNormKernels(AnyLayoutKernels, Protocol):
    """Kernels whose batch norms may differ from PyTorch's own by rounding."""

    batch_norm_vectors: Callable[..., tuple[Tensor, Tensor, Tensor]]


@functools.cache
def kernels_for(device: torch.device) -> AnyLayoutKernels:
    """Return the kernels that run on a device: in C++ on a CPU, in Triton on a GPU that it supports."""
    if device.type == "cpu":
        return cpu
    if device.type == "cuda" and supports_triton(device):
        from blpa.kernels import triton_any_layout

        return triton_any_layout
    return any_layout


def kernels_name(device: torch.device) -> str:
    """Name what computes on a device, once it has computed: c++, triton or torch."""
    kernels = kernels_for(device)
    if kernels is cpu:
        return "c++" if cpu.is_loaded() else "torch"
    return "torch" if kernels is any_layout else "triton"


_LIBRARY = torch.library.Library("blpa_any_layout", "FRAGMENT")
Function = TypeVar("Function", bound=Callable[..., Any])


def _operation(arguments: str, fake: Callable[..., Any], result: str = "Tensor") -> Callable[[Function], Function]:
    """Make an operation of a function; `fake` has the same arguments, and only allocates the result."""

    def define(function: Function) -> Function:
        name = function.__name__
        _LIBRARY.define(f"{name}({arguments}) -> {result}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"blpa_any_layout::{name}", fake, lib=_LIBRARY)
        return function

    return define


def _of_channels(count: int, x: Tensor, channel: int) -> Tensor:
    return x.new_empty(count, x.shape[channel], dtype=compute_dtype(x.dtype))


def _function(name: str, options: Sequence[float]) -> Elementwise | None:
    return Elementwise(name, tuple(options)) if name else None


def _codec(bits: int, clip: float | None) -> Codec | None:
    return Codec(bits, "range" if clip is None else clip) if bits else None


@_operation(
    "Tensor x, int channel, bool channels_last, Tensor? centre, Tensor? scale",
    lambda x, channel, *_: _of_channels(4, x, channel),
)
def channel_stats(x: Tensor, channel: int, channels_last: bool, centre: Tensor | None, scale: Tensor | None) -> Tensor:
    """Compute mean, biased variance, low and high [4, C] of (x - centre) scale, for `channel` of x."""
    order = Order.of(x.shape, channel, channels_last)
    return kernels_for(x.device).channel_stats(dense(x, channels_last), order, centre, scale)


@_operation("Tensor x, bool channels_last, bool with_range", lambda x, *_: _of_channels(4, x, 1))
def batch_stats(x: Tensor, channels_last: bool, with_range: bool) -> Tensor:
    """Do as channel_stats, with PyTorch's own bits of mean and variance; low and high only with the range."""
    return batch_stats_and_averages(x, channels_last, with_range, None)


def batch_stats_and_averages(x: Tensor, channels_last: bool, with_range: bool, running: RunningStats | None) -> Tensor:
    """Do as batch_stats, and update running averages as PyTorch's batch norm does."""
    dtype, order = compute_dtype(x.dtype), Order.of(x.shape, 1, channels_last)
    if x.is_meta:
        return x.new_empty(4, x.shape[1], dtype=dtype)
    if x.is_cpu and (stats := cpu.batch_stats(x, order, with_range, running)) is not None:
        return stats
    if x.dtype != dtype and running is None:  # else PyTorch's would be as short as x
        unused = x.new_zeros(x.shape[1], dtype=dtype)
        running = RunningStats(unused, unused.clone(), 0.0)
    mean, var = torch.batch_norm_update_stats(x, *(running[:3] if running else (None, None, 0.0)))
    low = high = mean
    if with_range:
        *_, low, high = kernels_for(x.device).channel_stats(dense(x, channels_last), order)
    return torch.stack((mean, var, low, high))


def rstd_of(stats: Tensor, eps: float) -> Tensor:
    """Compute 1 / deviation [C] of batch_stats; on a CPU rounded as PyTorch's batch norm does."""
    dtype = torch.float64 if stats.is_cpu else stats.dtype
    return (stats[1].to(dtype) + eps).rsqrt_().to(stats.dtype)


@_operation(
    "Tensor stats, Tensor? gamma, Tensor? beta, Tensor? centre, Tensor? scale, int bits, float? clip, "
    "float rounded_to_zero",
    lambda stats, *_: stats.new_empty(len(Vectors._fields), stats.shape[1]),
)
def grid_vectors(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, centre: Tensor | None, scale: Tensor | None, bits: int,
    clip: float | None, rounded_to_zero: float,
) -> Tensor:  # fmt: skip
    """Place the grid of each channel, Vectors [7, C]; the range is each channel's own where clip is None."""
    kernels = kernels_for(stats.device)
    return kernels.grid_vectors(stats, gamma, beta, centre, scale, _codec(bits, clip), rounded_to_zero)


def _allocate_codes(
    x: Tensor, y: Tensor, vectors: Tensor, channel: int, channels_last: bool, bits: int, *_: Tensor
) -> Tensor:
    count = Order.of(x.shape, channel, channels_last).saved_elements(bits)
    return vectors.new_empty(count, dtype=torch.uint8 if bits else None)


@_operation(
    "Tensor x, Tensor y, Tensor vectors, int channel, bool channels_last, int bits, Tensor? centre, Tensor? scale",
    _allocate_codes,
)
def encode(
    x: Tensor, y: Tensor, vectors: Tensor, channel: int, channels_last: bool, bits: int, centre: Tensor | None,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Encode (x - centre) scale, with the sign of y."""
    order = Order.of(x.shape, channel, channels_last)
    x_dense = dense(x, channels_last)
    y_dense = x_dense if y is x else dense(y, channels_last)
    return kernels_for(x.device).encode(x_dense, y_dense, vectors, order, bits, centre, scale)


def _allocate_own(x: Tensor, channel: int, channels_last: bool, bits: int, clip: float | None) -> tuple[Tensor, Tensor]:
    vectors = _of_channels(len(Vectors._fields), x, channel)
    return _allocate_codes(x, x, vectors, channel, channels_last, bits), vectors


@_operation("Tensor x, int channel, bool channels_last, int bits, float? clip", _allocate_own, "(Tensor, Tensor)")
def encode_own(x: Tensor, channel: int, channels_last: bool, bits: int, clip: float | None) -> tuple[Tensor, Tensor]:
    """Encode x about its own mean, or from 0 where it was rectified: codes and Vectors [7, C]."""
    order, codec, x = Order.of(x.shape, channel, channels_last), _codec(bits, clip), dense(x, channels_last)
    found = cpu.encode_own(x, order, codec) if x.is_cpu and codec is not None else None
    if found is not None:
        return found
    kernels = kernels_for(x.device)
    vectors = kernels.grid_vectors(kernels.channel_stats(x, order), None, None, None, None, codec)
    return kernels.encode(x, x, vectors, order, bits, None, None), vectors


def computes_batch_norm(x: Tensor, channels_last: bool, bits: int) -> bool:
    """Return whether `batch_norm` is the way to compute a batch norm of a dense x.

    On a CPU where it has the bits of PyTorch's own. On a GPU that Triton supports, where it differs by rounding: codes
    beside PyTorch's own would read x once more and y too, and nothing could be written over x. The meta device stands
    for either.
    """
    kernels = kernels_for(x.device)
    if kernels is cpu:
        return cpu.normalises_as_pytorch(Order.of(x.shape, 1, channels_last), bits, x.dtype)
    return x.is_meta or kernels is not any_layout


class BatchNorm(NamedTuple):
    """A batch norm in training."""

    gamma: Tensor
    beta: Tensor
    running: RunningStats | None
    eps: float


def batch_norm(
    x: Tensor, channels_last: bool, codec: Codec | None, norm: BatchNorm, rectify: bool, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write y of a batch norm, or relu(y), to out, which may be x; update its averages. Not for compilers.

    Returns:
        Codes of x_hat with the sign of y, Vectors [7, C] and 1 / deviation [C].
    """
    order, bits = Order.of(x.shape, 1, channels_last), codec.bits if codec else 0
    kernels, least = kernels_for(x.device), any_layout.largest_rounded_to_zero(x.dtype)
    if kernels is cpu or x.is_meta:  # as PyTorch's own to the bit
        stats = batch_stats_and_averages(x, channels_last, codec is not None and codec.clip == "range", norm.running)
        if kernels is cpu and codec is not None:
            return cpu.batch_norm(x, order, codec, stats, norm.gamma, norm.beta, norm.eps, rectify, out)
        mean, rstd = stats[0], rstd_of(stats, norm.eps)
        if x.is_meta:
            vectors = stats.new_empty(len(Vectors._fields), order.channels)
            return _allocate_codes(x, out, vectors, 1, channels_last, bits), vectors, rstd
        vectors = kernels.grid_vectors(stats, norm.gamma, norm.beta, mean, rstd, codec, least)
    else:
        of_norm = norm.gamma, norm.beta, norm.running, norm.eps
        vectors, mean, rstd = cast(BatchNormKernels, kernels).batch_norm_vectors(x, order, *of_norm, codec, least)
    return kernels.normalise_encode(x, vectors, order, bits, mean, rstd, rectify, out), vectors, rstd


def _allocate_value(
    values: Tensor, vectors: Tensor, shape: Sequence[int], dtype: torch.dtype, channel: int, channels_last: bool,
    *_: Any,
) -> Tensor:  # fmt: skip
    return empty(shape, channels_last, dtype, values.device)


@_operation(
    "Tensor values, Tensor vectors, SymInt[] shape, ScalarType dtype, int channel, bool channels_last, int bits, "
    "str function, float[] options",
    _allocate_value,
)
def decode(
    values: Tensor, vectors: Tensor, shape: Sequence[int], dtype: torch.dtype, channel: int, channels_last: bool,
    bits: int, function: str, options: Sequence[float],
) -> Tensor:  # fmt: skip
    """Compute f(y~) of this shape; y~ where the function's name is empty."""
    out = empty(shape, channels_last, dtype, values.device)
    order = Order.of(shape, channel, channels_last)
    kernels_for(values.device).decode(values, vectors, order, bits, _function(function, options), out)
    return out


def _allocate_like(grad: Tensor, values: Tensor, vectors: Tensor, channel: int, channels_last: bool, *_: Any) -> Tensor:
    return empty(grad.shape, channels_last, grad.dtype, grad.device)


@_operation(
    "Tensor grad, Tensor values, Tensor vectors, int channel, bool channels_last, int bits, str function, "
    "float[] options",
    _allocate_like,
)
def elementwise_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, channel: int, channels_last: bool, bits: int, function: str,
    options: Sequence[float],
) -> Tensor:  # fmt: skip
    """Compute dY = f'(y~) dA from grad = dA."""
    out = empty(grad.shape, channels_last, grad.dtype, grad.device)
    order = Order.of(grad.shape, channel, channels_last)
    kernels_for(grad.device).elementwise_grad(
        dense(grad, channels_last), values, vectors, order, bits, Elementwise(function, tuple(options)), out
    )
    return out


@_operation(
    "Tensor grad, Tensor values, Tensor vectors, int channel, bool channels_last, int bits, bool per_sample, "
    "bool rectified",
    lambda grad, values, vectors, channel, channels_last, bits, per_sample, rectified: vectors.new_empty(
        2, grad.shape[0] if per_sample else 1, vectors.shape[1]
    ),
)
def gradient_sums(
    grad: Tensor, values: Tensor, vectors: Tensor, channel: int, channels_last: bool, bits: int, per_sample: bool,
    rectified: bool,
) -> Tensor:  # fmt: skip
    """Sum dY and dY z~ of each channel, [2, N or 1, C], from grad = dY; from dA of a = relu(y), if rectified."""
    order = Order.of(grad.shape, channel, channels_last)
    return kernels_for(grad.device).gradient_sums(
        dense(grad, channels_last), values, vectors, order, bits, per_sample=per_sample, rectified=rectified
    )


@_operation(
    "Tensor grad, Tensor values, Tensor vectors, int bits",
    lambda grad, values, vectors, bits: vectors.new_empty(2, math.prod(grad.shape[:-1]), 1),
)
def row_means(grad: Tensor, values: Tensor, vectors: Tensor, bits: int) -> Tensor:
    """Compute mean(gamma dY) and mean(gamma dY z~) over the last dimension of grad = dY, [2, rows, 1]."""
    order = Order.of(grad.shape, -1, False)
    return kernels_for(grad.device).row_means(dense(grad, False), values, vectors, order, bits)


@_operation(
    "Tensor grad, Tensor values, Tensor vectors, int channel, bool channels_last, int bits, Tensor scale, "
    "Tensor? means, bool rectified",
    _allocate_like,
)
def input_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, channel: int, channels_last: bool, bits: int, scale: Tensor,
    means: Tensor | None, rectified: bool,
) -> Tensor:  # fmt: skip
    """Compute dX = scale (gamma dY - mean0 - z~ mean1) of a norm from grad = dY; or dA of a = relu(y), if rectified."""
    out = empty(grad.shape, channels_last, grad.dtype, grad.device)
    order = Order.of(grad.shape, channel, channels_last)
    kernels_for(grad.device).input_grad(
        dense(grad, channels_last), values, vectors, order, bits, scale, means, out, rectified=rectified
    )
    return out


_operation("Tensor mask", lambda mask: mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8))(bits.pack_bits)
_operation("Tensor packed, SymInt[] shape", lambda packed, shape: packed.new_empty(shape, dtype=torch.bool))(
    bits.unpack_bits
)


def _in_memory(x: Tensor, channels_last: bool) -> Tensor:
    """Return a dense tensor as a contiguous one, with its dimensions in the order of memory."""
    x = dense(x, channels_last)
    return x.movedim(1, -1) if channels_last else x


@_operation(
    "Tensor y, float low, float high, bool channels_last",
    lambda y, *_: y.new_empty(-(-y.numel() // 8), dtype=torch.uint8),
)
def pack_between(y: Tensor, low: float, high: float, channels_last: bool) -> Tensor:
    """Pack whether low < y < high, a bit per element."""
    y = _in_memory(y, channels_last)
    found = cpu.pack_between(y, low, high) if y.is_cpu else None
    return bits.pack_between(y, low, high) if found is None else found


@_operation(
    "Tensor grad, Tensor packed, bool channels_last",
    lambda grad, packed, channels_last: empty(grad.shape, channels_last, grad.dtype, grad.device),
)
def masked(grad: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """Return grad, 0 where the bit is not set."""
    grad = _in_memory(grad, channels_last)
    found = cpu.masked(grad, packed) if grad.is_cpu else None
    found = bits.masked(grad, packed) if found is None else found
    return found.movedim(-1, 1) if channels_last else found


_WINDOWS = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode"


def _max_pool_of(kernel: Sequence[int], *, is_grad: bool = False) -> Any:
    """Return PyTorch's function for windows of two or three dimensions."""
    return getattr(torch.ops.aten, f"max_pool{len(kernel)}d_with_indices{'_backward' if is_grad else ''}")


def _allocate_maxima(x: Tensor, kernel: Sequence[int], *others: Any) -> tuple[Tensor, Tensor]:
    out, index = _max_pool_of(kernel)(x, kernel, *others)
    return out, index.new_empty(index.shape, dtype=torch.uint8 if math.prod(kernel) <= 256 else torch.int32)


@_operation(f"Tensor x, {_WINDOWS}", _allocate_maxima, "(Tensor, Tensor)")
def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute maxima over windows of two or three dimensions, and their places (bits.places_of)."""
    windows = kernel, stride, padding, dilation
    found = cpu.max_pool(x, *windows) if x.is_cpu and not ceil_mode else None
    if found is not None:
        return found
    out, index = _max_pool_of(kernel)(x, *windows, ceil_mode)
    return out, bits.places_of(index, x.shape[-len(kernel) :], *windows)


def _allocate_max_pool_grad(grad: Tensor, x: Tensor, places: Tensor, *windows: Any) -> Tensor:
    index = places.new_empty(places.shape, dtype=torch.int64)
    dx: Tensor = _max_pool_of(windows[0], is_grad=True)(grad, x, *windows, index)
    return dx


@_operation(f"Tensor grad, Tensor x, Tensor places, {_WINDOWS}", _allocate_max_pool_grad)
def max_pool_grad(
    grad: Tensor, x: Tensor, places: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """Compute dX from the gradient of max_pool's maxima and their places; of x only shape and memory format count."""
    windows = kernel, stride, padding, dilation
    dx = cpu.max_pool_grad(grad, places, x.shape, *windows) if x.is_cpu and x.is_contiguous() else None
    if dx is not None:
        return dx
    index = bits.index_of(places, x.shape[-len(kernel) :], *windows)
    result: Tensor = _max_pool_of(kernel, is_grad=True)(grad, x, *windows, ceil_mode, index)
    return result


OPERATIONS = torch.ops.blpa_any_layout
