"""Kernels for CPUs: the functions of any_layout.py in C++ (cpp), several times faster than in plain PyTorch.

The first tensor of MIN_ELEMENTS has the C++ compiled (cpu_build.py). Where that does not work, and for smaller tensors
and dtypes that the C++ has no code for, plain PyTorch computes the same.

Codes and decoded values are those of any_layout.py to the bit, smooth functions of them to a rounding or two. Sums
differ by rounding, and do not depend on the number of threads. Which code computes a sum follows from the tensor alone,
and not from what the process did before: a run that goes on from a checkpoint gets the same bits.
"""

import ctypes
import functools
import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from blpa.codec import RECTIFIED_CLIP, Codec
from blpa.kernels import RunningStats, any_layout, compute_dtype
from blpa.kernels.any_layout import Elementwise
from blpa.kernels.cpu_build import Array, Call, Layout, Windows, built
from blpa.kernels.order import Order

MIN_ELEMENTS = 1 << 14
"""Of a tensor that is worth C++: below, calls take longer than their work, and a network of such tensors is tiny."""

_LOG = logging.getLogger(__name__)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_IDENTITY, _RELU, _LEAKY_RELU, _CLAMP, _TABLE = range(5)


# ---- the library

_LOCK = threading.RLock()
_found: Any = None
_is_found = False
_exact_batch_norms: set[torch.dtype] = set()
"""Dtypes of x whose batch norms have PyTorch's bits."""
_has_exact_stats = False
"""Whether batch_stats has them."""


def _load() -> Any:
    """Return the library; None if there is none that computes what plain PyTorch does."""
    global _found, _is_found
    with _LOCK:  # re-entrant: the check below comes by here
        if not _is_found and _found is None:
            try:
                _found = built()
                with _disable_current_modes():  # of the caller's, who may be traced
                    _check()
            except BaseException as error:
                _found = None
                if not isinstance(error, RuntimeError | ArithmeticError | OSError | ValueError):
                    raise  # interrupted; the others: no home, no compiler that runs, ...
                _LOG.warning("coded networks run on plain PyTorch kernels, which are slower: %s", error)
            _is_found = True
    return _found


def is_loaded() -> bool:
    """Return whether the C++ has been loaded; else plain PyTorch has computed everything so far."""
    return _found is not None


def _ramp(end: float, count: int) -> Tensor:
    return torch.linspace(-end, end, count, dtype=torch.float32, device="cpu")


def _check() -> None:
    """Compare the codes of a small tensor, and a sum, with plain PyTorch's."""
    order = Order(3, 8, 739, False)
    x = _ramp(3, order.numel).sin().view(order.outer, order.channels, order.inner)
    stats = any_layout.channel_stats(x, order)
    vectors = any_layout.grid_vectors(stats, None, None, None, None, Codec(4))
    codes, expected = (kernels(x, x, vectors, order, 4, None, None) for kernels in (encode, any_layout.encode))
    sums = gradient_sums(x, codes, vectors, order, 4, per_sample=False, rectified=False)[0]
    if not torch.equal(codes, expected) or (sums - x.sum((0, 2))).abs().max() > 1e-2:
        raise ArithmeticError("compiled kernels compute something else")
    _check_batch_stats()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype != torch.float16 or _found.blpa_has_half():
            _check_batch_norm(dtype)


def _check_batch_stats() -> None:
    """Note whether the statistics of a batch norm have PyTorch's bits."""
    global _has_exact_stats
    x = _ramp(3000, 2 * 11 * 31 * 37).sin().add_(0.2).view(2, 11, 31, 37)
    expected = _ramp(2, 22).view(2, 11)
    found = expected.clone()
    expected_stats = torch.batch_norm_update_stats(x, expected[0], expected[1], 0.1)
    stats = _batch_stats(_found, x, Order.of(x.shape, 1, False), False, RunningStats(found[0], found[1], 0.1))
    _has_exact_stats = torch.equal(stats[:2], torch.stack(expected_stats)) and torch.equal(found, expected)


def _check_batch_norm(dtype: torch.dtype) -> None:
    """Note that batch norms of a dtype have PyTorch's bits, if they do."""
    x = _ramp(3000, 2 * 11 * 31 * 37).sin().view(2, 11, 31, 37).to(dtype)
    gamma, beta = _ramp(2, 22).view(2, 11)
    for channels_last in (False, True):
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        expected = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)
        mean, var = torch.batch_norm_update_stats(x, gamma.new_zeros(11), gamma.new_zeros(11), 0.0)
        order, rstd = Order.of(x.shape, 1, channels_last), (var.double() + 1e-5).rsqrt().float()
        vectors = any_layout.grid_vectors(torch.stack((mean, var, mean, mean)), gamma, beta, mean, rstd, Codec(4))
        out = torch.empty_like(x)
        normalise_encode(x, vectors, order, 4, mean, rstd, False, out)
        if not torch.equal(out, expected):
            return
    _exact_batch_norms.add(dtype)


def _library_for(elements: int, *tensors: Tensor) -> Any:
    """Return the library; None for few elements, or for dtypes that it does not compute in."""
    if elements < MIN_ELEMENTS:
        return None
    library = _found if _is_found else _load()
    if library is not None:
        for tensor in tensors:
            if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float16 and not library.blpa_has_half()):
                return None
    return library


def _for(order: Order, bits: int, *tensors: Tensor) -> Any:
    """Return the library if it has code for codes of these tensors, else None."""
    return _library_for(order.numel, *tensors) if bits else None


# ---- arguments


@functools.lru_cache(maxsize=4096)
def _layout(order: Order, bits: int) -> Any:
    """Describe where the codes of a tensor lie; for 0 bits, its elements."""
    per_element = order.channels > 1 and (order.channels_last or order.inner == 1)
    outer_first = order.outer_first(bits)
    packed = order.packed(bits) if bits else order
    length = order.channels if per_element else packed.inner
    lines = packed.numel // length
    per_outer = packed.inner if per_element else packed.channels
    per_slab = lines if outer_first else packed.inner if per_element else 1
    layout = Layout(
        bits, order.channels, lines, length, per_slab, per_slab * length, order.numel * per_slab // lines, per_outer,
        packed.outer if outer_first else 0, order.outer, per_element,
    )  # fmt: skip
    return ctypes.pointer(layout), packed.numel


def _array(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _DTYPES[tensor.dtype]


def _call(order: Order, bits: int, dtype: torch.dtype, **arguments: Any) -> Any:
    """Return the argument of a function; the tensors whose addresses are in it must outlive the call."""
    return Call(_layout(order, bits)[0], torch.get_num_threads(), dtype == torch.float64, **arguments)


def _coded(order: Order, bits: int, values: Tensor, vectors: Tensor, **arguments: Any) -> Any:
    """Return the argument of a function of codes."""
    arguments |= {"values": values.data_ptr(), "vectors": vectors.data_ptr()}
    return _call(order, bits, vectors.dtype, **arguments)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of a dtype, often the same: the question takes less time than PyTorch's functions."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _clips(codec: Codec) -> tuple[float, float]:
    """Return the ends of grids in deviations and, for rectified channels, in roots of mean squares; 0 for a range."""
    clip = 0.0 if codec.clip == "range" else codec.clip
    return clip, RECTIFIED_CLIP * clip


def _same_columns(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Bring tensors [..., C or 1] to one number of columns."""
    columns = max(tensor.shape[-1] for tensor in tensors)
    return [
        _dense(tensor if tensor.shape[-1] == columns else tensor.expand(*tensor.shape[:-1], columns), dtype)
        for tensor in tensors
    ]


def _row_step(tensor: Tensor) -> int:
    rows, columns = tensor.shape[-2:]
    return columns if rows > 1 else 0


def _normalisation(
    centre: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Return centre and scale, which must outlive the call, and the arguments for them."""
    if centre is None and scale is None:
        return (), {}
    centre = torch.zeros_like(scale) if centre is None else centre  # type: ignore[arg-type]
    scale = torch.ones_like(centre) if scale is None else scale
    centre, scale = _same_columns(dtype, centre, scale)
    return (centre, scale), {
        "centre": centre.data_ptr(), "centre_step": _row_step(centre), "scale": scale.data_ptr(),
        "scale_step": _row_step(scale), "by_channel": centre.shape[-1] > 1,
    }  # fmt: skip


def _means(scale: Tensor, means: Tensor | None, dtype: torch.dtype) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Return scale and means, which must outlive the call, and the arguments for them."""
    scale, *others = _same_columns(dtype, scale, *(() if means is None else (means,)))
    found = {"scale": scale.data_ptr(), "scale_step": _row_step(scale), "by_channel": scale.shape[-1] > 1}
    for both in others:
        found |= {"centre": both.data_ptr(), "centre_z": both[1].data_ptr(), "centre_step": _row_step(both)}
    return (scale, *others), found


def _function(
    library: Any, function: Elementwise | None, vectors: Tensor, order: Order, bits: int, *, is_grad: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """Return a table of f or f' [C, L], which must outlive the call, and the arguments for the function."""
    if function is None or function.name == "relu":
        return None, {"function": _IDENTITY if function is None else _RELU}
    if function.name == "leaky_relu":
        return None, {"function": _LEAKY_RELU, "slope": function.options[0]}
    if function.name == "hardtanh" and not is_grad:
        low, high = function.options
        return None, {"function": _CLAMP, "low": low, "high": high}
    y = vectors.new_empty(order.channels, 1 << bits)
    library.blpa_levels_of(_call(order, bits, y.dtype, vectors=vectors.data_ptr(), out=_array(y)))
    table = function.grad(torch.ones_like(y), y) if is_grad else function(y)
    return table, {"function": _TABLE, "table": table.data_ptr()}


# ---- the functions; any_layout.py says what they do


def channel_stats(x: Tensor, order: Order, centre: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Compute mean, biased variance, low and high [4, C]."""
    library = _for(order, 8, x)
    if library is None:
        return any_layout.channel_stats(x, order, centre, scale)
    out = x.new_empty(4, order.channels, dtype=compute_dtype(x.dtype))
    held, arguments = _normalisation(centre, scale, out.dtype)
    library.blpa_channel_stats(_call(order, 0, out.dtype, x=_array(x), out=_array(out), **arguments))
    del held
    return out


def batch_stats(x: Tensor, order: Order, with_range: bool, running: RunningStats | None) -> Tensor | None:
    """Compute mean, biased variance, low and high [4, C], and update running averages, with the bits of PyTorch's.

    None where PyTorch's own is to do it, which is as fast with the channels last and for 16-bit numbers.
    """
    averages = (running.mean, running.var) if running else ()
    is_served = x.dtype == torch.float32 and x.is_contiguous() and order.inner > 1
    is_served = is_served and all(one.dtype == x.dtype and one.is_contiguous() for one in averages)
    library = _library_for(x.numel()) if is_served else None
    return None if library is None or not _has_exact_stats else _batch_stats(library, x, order, with_range, running)


def _batch_stats(library: Any, x: Tensor, order: Order, with_range: bool, running: RunningStats | None) -> Tensor:
    out = x.new_empty(4, order.channels)
    momentum, *averages = (
        (running.momentum, running.mean.data_ptr(), running.var.data_ptr()) if running else (0.0, None, None)
    )
    library.blpa_batch_stats(
        x.data_ptr(), order.outer, order.channels, order.inner, torch.get_num_threads(), with_range, momentum,
        *averages, out.data_ptr(),
    )  # fmt: skip
    return out


def grid_vectors(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, centre: Tensor | None, scale: Tensor | None,
    codec: Codec | None, rounded_to_zero: float = 0.0,
) -> Tensor:  # fmt: skip
    """Place the grid of each channel, Vectors [7, C]."""
    library = _found if _is_found else None  # vectors alone load none
    if library is None or codec is None or stats.dtype != torch.float32:
        return any_layout.grid_vectors(stats, gamma, beta, centre, scale, codec, rounded_to_zero)
    if centre is None or scale is None:
        centre = scale = None
    given = [None if one is None else _dense(one, stats.dtype) for one in (stats, gamma, beta, centre, scale)]
    out = stats.new_empty(len(any_layout.Vectors._fields), stats.shape[1])
    addresses = (None if one is None else one.data_ptr() for one in given)
    library.blpa_grid_vectors(stats.shape[1], *addresses, codec.bits, *_clips(codec), rounded_to_zero, out.data_ptr())
    return out


def encode(
    x: Tensor, y: Tensor, vectors: Tensor, order: Order, bits: int, centre: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Encode z = (x - centre) scale, with the sign of y."""
    library = _for(order, bits, x, y)
    if library is None:
        return any_layout.encode(x, y, vectors, order, bits, centre, scale)
    held, arguments = _normalisation(centre, scale, vectors.dtype)
    values = x.new_empty(_layout(order, bits)[1], dtype=torch.uint8)
    library.blpa_encode(_coded(order, bits, values, vectors, x=_array(x), y=_array(y), **arguments))
    del held
    return values


def encode_own(x: Tensor, order: Order, codec: Codec) -> tuple[Tensor, Tensor] | None:
    """Do as channel_stats, grid_vectors and encode of x itself, in one call; None where this does not serve.

    Returns:
        Codes and Vectors [7, C].
    """
    dtype = compute_dtype(x.dtype)
    library = None if dtype == torch.float64 else _for(order, codec.bits, x)
    if library is None:
        return None
    values = x.new_empty(_layout(order, codec.bits)[1], dtype=torch.uint8)
    stats = x.new_empty(4, order.channels, dtype=dtype)
    vectors = x.new_empty(len(any_layout.Vectors._fields), order.channels, dtype=dtype)
    of_stats = _call(order, 0, dtype, x=_array(x), out=_array(stats))
    call = _coded(order, codec.bits, values, vectors, x=_array(x), y=_array(x))
    library.blpa_encode_own(of_stats, call, *_clips(codec))
    return values, vectors


def normalises_as_pytorch(order: Order, bits: int, dtype: torch.dtype) -> bool:
    """Return whether normalise_encode serves x of this order and dtype, with the bits of PyTorch's batch norm."""
    return _for(order, bits) is not None and dtype in _exact_batch_norms


def normalise_encode(
    x: Tensor, vectors: Tensor, order: Order, bits: int, mean: Tensor, rstd: Tensor, rectify: bool, out: Tensor
) -> Tensor:
    """Write y of a batch norm, or relu(y), to out, and encode z with the sign of y."""
    library = _for(order, bits, x, out)
    if library is None:
        return any_layout.normalise_encode(x, vectors, order, bits, mean, rstd, rectify, out)
    values = x.new_empty(_layout(order, bits)[1], dtype=torch.uint8)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    library.blpa_normalise_encode(_normalisation_of(x, values, vectors, order, bits, mean, rstd, rectify, out))
    return values


def _normalisation_of(
    x: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, mean: Tensor, rstd: Tensor, rectify: bool,
    out: Tensor,
) -> Any:  # fmt: skip
    """Return the argument of a batch norm."""
    return _coded(
        order, bits, values, vectors, x=_array(x), out=_array(out), centre=mean.data_ptr(), scale=rstd.data_ptr(),
        by_channel=order.channels > 1, rectified=rectify,
    )  # fmt: skip


def batch_norm(
    x: Tensor, order: Order, codec: Codec, stats: Tensor, gamma: Tensor, beta: Tensor, eps: float, rectify: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Do as grid_vectors and normalise_encode from the statistics, in one call, where `normalises_as_pytorch`.

    Returns:
        Codes, Vectors [7, C] and 1 / deviation [C].
    """
    values = x.new_empty(_layout(order, codec.bits)[1], dtype=torch.uint8)
    vectors, rstd = stats.new_empty(len(any_layout.Vectors._fields), order.channels), stats.new_empty(order.channels)
    gamma, beta = _dense(gamma, stats.dtype), _dense(beta, stats.dtype)
    call = _normalisation_of(x, values, vectors, order, codec.bits, stats, rstd, rectify, out)
    _for(order, codec.bits).blpa_batch_norm(
        call, stats.data_ptr(), gamma.data_ptr(), beta.data_ptr(), eps, *_clips(codec),
        any_layout.largest_rounded_to_zero(x.dtype),
    )  # fmt: skip
    return values, vectors, rstd


def decode(values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise | None, out: Tensor) -> None:
    """Write f(y~) to out."""
    library = _for(order, bits, out)
    if library is None:
        return any_layout.decode(values, vectors, order, bits, function, out)
    held, arguments = _function(library, function, vectors, order, bits, is_grad=False)
    library.blpa_decode(_coded(order, bits, values, vectors, out=_array(out), **arguments))
    del held


def elementwise_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise, out: Tensor
) -> None:
    """Write dY = f'(y~) dA to out, of grad's dtype."""
    library = _for(order, bits, grad)
    if library is None:
        return any_layout.elementwise_grad(grad, values, vectors, order, bits, function, out)
    held, arguments = _function(library, function, vectors, order, bits, is_grad=True)
    library.blpa_elementwise_grad(_coded(order, bits, values, vectors, x=_array(grad), out=_array(out), **arguments))
    del held


def gradient_sums(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, *, per_sample: bool, rectified: bool = False
) -> Tensor:
    """Sum dY and dY z~ of each channel, [2, outer or 1, C]."""
    library = _for(order, bits, grad)
    if library is None:
        return any_layout.gradient_sums(grad, values, vectors, order, bits, per_sample=per_sample, rectified=rectified)
    sums = vectors.new_empty(2, order.outer if per_sample else 1, order.channels)
    library.blpa_gradient_sums(
        _coded(
            order, bits, values, vectors, x=_array(grad), out=_array(sums), per_sample=per_sample, rectified=rectified
        )
    )
    return sums


def row_means(grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int) -> Tensor:
    """Compute mean(gamma dY) and mean(gamma dY z~) over the channels, [2, outer, 1]."""
    library = _for(order, bits, grad)
    if library is None:
        return any_layout.row_means(grad, values, vectors, order, bits)
    means = vectors.new_empty(2, order.outer, 1)
    library.blpa_row_means(_coded(order, bits, values, vectors, x=_array(grad), out=_array(means)))
    return means


def input_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, scale: Tensor, means: Tensor | None,
    out: Tensor, *, rectified: bool = False,
) -> None:  # fmt: skip
    """Write dX = scale (gamma dY - mean0 - z~ mean1) to out, of grad's dtype."""
    library = _for(order, bits, grad)
    if library is None:
        return any_layout.input_grad(grad, values, vectors, order, bits, scale, means, out, rectified=rectified)
    held, arguments = _means(scale, means, vectors.dtype)
    library.blpa_input_grad(
        _coded(order, bits, values, vectors, x=_array(grad), out=_array(out), rectified=rectified, **arguments)
    )
    del held


# ---- max pooling


def _windows(
    shape: Sequence[int], dtype: torch.dtype, outputs: Sequence[int] | None, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Windows | None:  # fmt: skip
    """Describe windows of two dimensions, with as many outputs as there are without ceil_mode, or those given.

    None where PyTorch's own functions are to do it: they say what is wrong with windows, and know what to do with those
    that have no element inside the input.
    """
    if len(kernel) != 2 or len(shape) not in (3, 4) or dtype != torch.float32 or math.prod(kernel) > 256:
        return None
    counts = []
    for size, places, step, zeros, spread in zip(shape[-2:], kernel, stride, padding, dilation, strict=True):
        if places < 1 or step < 1 or not 1 <= spread <= size or not 0 <= 2 * zeros <= places:
            return None
        counts.append((size + 2 * zeros - spread * (places - 1) - 1) // step + 1)
    found = counts if outputs is None else outputs
    if not all(1 <= one <= count + 1 for one, count in zip(found, counts, strict=True)):
        return None
    return Windows(*(tuple(values) for values in (shape[-2:], found, kernel, stride, padding, dilation)))


def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Compute maxima over windows of two dimensions, and their places in them; None where PyTorch's own is to do it."""
    windows = _windows(x.shape, x.dtype, None, kernel, stride, padding, dilation) if x.is_contiguous() else None
    library = _library_for(x.numel()) if windows is not None else None
    if windows is None or library is None:
        return None
    out = x.new_empty(*x.shape[:-2], *windows.outputs)
    places = torch.empty_like(out, dtype=torch.uint8)
    planes = math.prod(x.shape[:-2])
    library.blpa_max_pool(windows, planes, torch.get_num_threads(), x.data_ptr(), out.data_ptr(), places.data_ptr())
    return out, places


def max_pool_grad(
    grad: Tensor, places: Tensor, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor | None:  # fmt: skip
    """Compute dX [shape] from the gradient of maxima and their places; None where PyTorch's own is to do it."""
    windows = _windows(shape, grad.dtype, grad.shape[-2:], kernel, stride, padding, dilation)
    library = _library_for(math.prod(shape)) if places.shape == grad.shape else None
    if windows is None or library is None:
        return None
    grad, places, out = grad.contiguous(), places.contiguous(), grad.new_empty(shape)
    planes = math.prod(shape[:-2])
    library.blpa_max_pool_grad(
        windows, planes, torch.get_num_threads(), grad.data_ptr(), places.data_ptr(), out.data_ptr()
    )
    return out


# ---- one bit per element; bits.py says what they do


def pack_between(y: Tensor, low: float, high: float) -> Tensor | None:
    """Pack whether low < y < high; None where this does not serve. y is contiguous."""
    library = _library_for_bits(y)
    if library is None:
        return None
    packed = y.new_empty(-(-y.numel() // 8), dtype=torch.uint8)
    library.blpa_pack_between(Array(*_array(y)), y.numel(), low, high, torch.get_num_threads(), packed.data_ptr())
    return packed


def masked(grad: Tensor, packed: Tensor) -> Tensor | None:
    """Return grad, 0 where the bit is not set; None where this does not serve. grad is contiguous."""
    library = _library_for_bits(grad)
    if library is None:
        return None
    out = torch.empty_like(grad)
    library.blpa_masked(Array(*_array(grad)), grad.numel(), packed.data_ptr(), torch.get_num_threads(), out.data_ptr())
    return out


def _library_for_bits(x: Tensor) -> Any:
    return _library_for(x.numel(), x) if x.is_contiguous() and x.dtype != torch.float64 else None
