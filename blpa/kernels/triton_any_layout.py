"""The functions of any_layout.py in Triton, for CUDA; library.py chooses them for a GPU that Triton supports.

A program takes some positions of some channels, in a tensor of any layout: 64 channels where those are neighbours in
memory, else one channel, whose positions are. So what is per channel is loaded once per program.

                      launches   bytes per element, fp32, K bits
    channel_stats     1 or 2     4                reads x
    grid_vectors      1          of channels only
    batch_norm_vec..  1 or 2     4                reads x; channel_stats, averages and grid at once
    encode            1          4 + 4 + K/8      reads x, and y where it is another tensor; writes codes
    normalise_encode  1          4 + K/8 + 4      reads x; writes codes and y or relu(y)
    decode            1          K/8 + 4          reads codes, writes f(y~)
    elementwise_grad  1          4 + K/8 + 4      reads dA and codes, writes dY
    gradient_sums     1 or 2     4 + K/8          reads dY, or dA of a ReLU, and codes
    row_means         1          4 + K/8          reads dY and codes
    input_grad        1          4 + K/8 + 4      reads dY or dA and codes, writes dX; no codes without means

A sum of few elements takes one launch. Else several programs share a channel: of gradient_sums PyTorch sums their
partial results; those of channel_stats the last program combines, and a first launch sets the counter of programs to 0.

Fused multiply-adds are off, and square roots and divisions of grids and codes correctly rounded: codes, and what they
decode to, are any_layout's to the bit, given the same vectors. Sums have another order. Smooth functions are computed
with the GPU's exponential, whose relative error grows with its argument: f(y~) and f'(y~) are within 1e-6 (1 + |y~|).
float64, and channels or samples of 2^30 elements, are left to any_layout.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from blpa.codec import RECTIFIED_CLIP, Codec
from blpa.kernels import RunningStats, any_layout
from blpa.kernels.any_layout import Elementwise, Vectors
from blpa.kernels.order import Order
from blpa.kernels.triton_elements import _decode, _elementwise_grad, _encode, _input_grad, _normalise_encode
from blpa.kernels.triton_ops import LANE_ROWS, OPTIONS, PROGRAMS
from blpa.kernels.triton_sums import _batch_norm_vectors, _channel_stats, _gradient_sums, _grid_vectors, _row_means

TILE_ELEMENTS, SUM_TILE_ELEMENTS = 2048, 4096
"""Elements of a tile, for 4 warps and for the 8 of a sum: 16 per thread, as in triton_ops.py. Of 16 bits, channels
last, a tile has twice as many, but for sums, whose registers would spill: so a thread has four 16-byte loads in flight
there too, and loads what is per channel for more elements."""
THREAD_ELEMENTS = 16
"""Elements of a tile per thread, or twice as many; a small tile has fewer warps."""
TILE_CHANNELS = 64
"""Channels of a tile, where they are neighbours in memory."""
ROW_CHANNELS = 128
"""Channels of a tile of row_means."""
TILES_ALONE = 4
"""Largest number of tiles that one program sums alone: to read them takes less time than another launch."""
VECTOR_CHANNELS = 128
"""Channels of a program of grid_vectors."""

once = functools.lru_cache(maxsize=4096)
"""Compute what follows from a shape once: it takes longer than a launch."""


def _refuses(order: Order, dtype: torch.dtype) -> bool:
    """Return whether plain PyTorch has to compute: in float64, or where offsets within a tile might need 64 bits."""
    sample = order.channels * (order.inner + SUM_TILE_ELEMENTS)
    return dtype == torch.float64 or sample >= 2**30 or order.outer * order.inner >= 2**30


def _packed(order: Order, bits: int) -> Order:
    return order.packed(bits) if bits else order


def _has_channels_last(order: Order) -> bool:
    return order.channels_last or order.inner == 1


@once
def _sizes(order: Order, bits: int) -> tuple[int, ...]:
    """Return C, outer, inner and the packed outer and inner."""
    packed = _packed(order, bits)
    return order.channels, order.outer, order.inner, packed.outer, packed.inner


def _constants(order: Order, bits: int, positions: int, elements: int, per_thread: int) -> dict[str, int]:
    """Return the kernel constants of tiles, and their warps; `positions` and `elements` are the most of a tile."""
    blocks = 8 // bits if bits else 1
    channels_last = _has_channels_last(order)
    channels = min(triton.next_power_of_2(order.channels), TILE_CHANNELS) if channels_last else 1
    positions = min(triton.next_power_of_2(max(positions, 1)), max(elements // (channels * blocks), 1))
    warps = positions * channels * blocks // (32 * per_thread)
    return {
        "BITS": bits, "BLOCKS": blocks, "POSITIONS": positions, "CHANNELS": channels, "CHANNELS_LAST": channels_last,
        "OUTER_FIRST": order.outer_first(bits), "num_warps": max(warps, 1),
    }  # fmt: skip


@once
def _tiles(order: Order, bits: int, element_bytes: int) -> tuple[int, dict[str, int]]:
    """Return the number of tiles of a tensor, one per program, and their constants."""
    packed, times = _packed(order, bits), 4 // element_bytes if bits and _has_channels_last(order) else 1
    positions = packed.outer * packed.inner
    constants = _constants(order, bits, positions, times * TILE_ELEMENTS, times * THREAD_ELEMENTS)
    across = triton.cdiv(order.channels, constants["CHANNELS"])
    return triton.cdiv(positions, constants["POSITIONS"]) * across, constants


@once
def _sum_tiles(order: Order, bits: int, per_sample: bool) -> tuple[int, int, int, dict[str, int]]:
    """Divide sums among programs.

    Returns:
        The number of sums of different channels or samples, those of programs per sum and of tiles per program, and
        the constants of tiles.
    """
    packed = _packed(order, bits)
    samples, positions = (packed.outer, packed.inner) if per_sample else (1, packed.outer * packed.inner)
    constants = _constants(order, bits, positions, SUM_TILE_ELEMENTS, THREAD_ELEMENTS)
    sums = samples * triton.cdiv(order.channels, constants["CHANNELS"])
    tiles = triton.cdiv(positions, constants["POSITIONS"])
    steps = max(min(triton.cdiv(tiles * sums, PROGRAMS), LANE_ROWS), min(tiles, TILES_ALONE))
    return sums, triton.cdiv(tiles, steps), steps, constants


@once
def _row_tiles(order: Order, bits: int) -> dict[str, int]:
    """Return the constants of tiles of row_means."""
    blocks, channels = 8 // bits if bits else 1, min(triton.next_power_of_2(order.channels), ROW_CHANNELS)
    positions = max(SUM_TILE_ELEMENTS // (channels * blocks), 1)
    return {"BITS": bits, "BLOCKS": blocks, "POSITIONS": positions, "CHANNELS": channels, "num_warps": 8}


def _given(*vectors: Tensor | None) -> tuple[list[Tensor | None], dict[str, bool]]:
    """Return tensors [..., outer or 1, C or 1] dense and of one shape, and whether they have samples and channels."""
    shapes = {vector.shape[-2:] for vector in vectors if vector is not None}
    outer, channels = (max(sizes) for sizes in zip(*shapes, strict=True)) if shapes else (1, 1)
    if len(shapes) > 1:
        vectors = tuple(v if v is None else v.expand(*v.shape[:-2], outer, channels) for v in vectors)
    return [v if v is None else v.contiguous() for v in vectors], {"PER_OUTER": outer > 1, "PER_CHANNEL": channels > 1}


def _launch(kernel: "triton.JITFunction", programs: int, *args: object, **constants: object) -> None:
    """Launch a kernel on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **(OPTIONS | constants))


def _stats_launch(x: Tensor, order: Order, stats: Tensor) -> tuple[int, list[Tensor], list[int], dict[str, Any]]:
    """Return what launches of statistics share: programs, memory for their parts, sizes, and constants."""
    sums, parts, steps, constants = _sum_tiles(order, 0, False)
    partial = counter = stats
    if parts > 1:
        partial = stats.new_empty(parts, 4, order.channels)
        counter = x.new_zeros(sums, dtype=torch.int32)
    constants = {name: constants[name] for name in ("POSITIONS", "CHANNELS", "CHANNELS_LAST", "num_warps")}
    return parts * sums, [partial, counter], [*_sizes(order, 0)[:3], parts, steps], constants | {"ALONE": parts == 1}


def channel_stats(x: Tensor, order: Order, centre: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """See any_layout."""
    if _refuses(order, x.dtype):
        return any_layout.channel_stats(x, order, centre, scale)
    (centre, scale), flags = _given(centre, scale)
    stats = x.new_empty(4, order.channels, dtype=torch.float32)
    programs, parts, sizes, constants = _stats_launch(x, order, stats)
    _launch(_channel_stats, programs, x, centre, scale, *parts, stats, *sizes, **constants, **flags)
    return stats


def batch_norm_vectors(
    x: Tensor,
    order: Order,
    gamma: Tensor,
    beta: Tensor,
    running: RunningStats | None,
    eps: float,
    codec: Codec | None,
    rounded_to_zero: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See any_layout."""
    if _refuses(order, x.dtype):
        return any_layout.batch_norm_vectors(x, order, gamma, beta, running, eps, codec, rounded_to_zero)
    means = x.new_empty(2, order.channels, dtype=torch.float32)
    vectors = means.new_empty(len(Vectors._fields), order.channels)
    programs, parts, sizes, constants = _stats_launch(x, order, means)
    mean, var, momentum = running[:3] if running else (None, None, 0.0)
    widths, of_codec = _grid(codec)
    _launch(
        _batch_norm_vectors, programs, x, *parts, gamma.contiguous(), beta.contiguous(), mean, var, means, vectors,
        *sizes, float(eps), float(momentum), *widths, rounded_to_zero, **constants, **of_codec,
    )  # fmt: skip
    centre, rstd = means.unbind(0)
    return vectors, centre, rstd


def _grid(codec: Codec | None) -> tuple[tuple[float, float], dict[str, Any]]:
    """Return the width of a bin and the end of a rectified grid, in deviations, and the constants of a codec."""
    of_range = codec is not None and codec.clip == "range"
    widths = (0.0, 0.0) if codec is None or codec.clip == "range" else (codec.bin_width, RECTIFIED_CLIP * codec.clip)
    return widths, {"LEVELS": codec.levels if codec else 0, "OF_RANGE": of_range}


def grid_vectors(
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    codec: Codec | None,
    rounded_to_zero: float = 0.0,
) -> Tensor:
    """See any_layout."""
    if stats.dtype == torch.float64:
        return any_layout.grid_vectors(stats, gamma, beta, centre, scale, codec, rounded_to_zero)
    if centre is None or scale is None:
        centre = scale = None
    given = [v if v is None else v.contiguous() for v in (stats, gamma, beta, centre, scale)]
    channels = stats.shape[1]
    vectors = stats.new_empty(len(Vectors._fields), channels)
    widths, of_codec = _grid(codec)
    _launch(
        _grid_vectors, -(-channels // VECTOR_CHANNELS), *given, vectors, channels, *widths, rounded_to_zero,
        **of_codec, CHANNELS=VECTOR_CHANNELS,
    )  # fmt: skip
    return vectors


def encode(
    x: Tensor, y: Tensor, vectors: Tensor, order: Order, bits: int, centre: Tensor | None, scale: Tensor | None
) -> Tensor:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.encode(x, y, vectors, order, bits, centre, scale)
    (centre, scale), flags = _given(centre, scale)
    *_, packed_outer, packed_inner = _sizes(order, bits)
    count = order.channels * packed_outer * packed_inner if bits else 2 * order.numel
    values = vectors.new_empty(count, dtype=torch.uint8 if bits else vectors.dtype)
    programs, constants = _tiles(order, bits, x.itemsize)
    _launch(
        _encode, programs, x, None if y is x else y, centre, scale, values, vectors, *_sizes(order, bits), **constants,
        **flags,
    )  # fmt: skip
    return values


def normalise_encode(
    x: Tensor, vectors: Tensor, order: Order, bits: int, mean: Tensor, rstd: Tensor, rectify: bool, out: Tensor
) -> Tensor:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.normalise_encode(x, vectors, order, bits, mean, rstd, rectify, out)
    *_, packed_outer, packed_inner = _sizes(order, bits)
    count = order.channels * packed_outer * packed_inner if bits else 2 * order.numel
    values = vectors.new_empty(count, dtype=torch.uint8 if bits else vectors.dtype)
    programs, constants = _tiles(order, bits, x.itemsize)
    _launch(
        _normalise_encode, programs, x, out, mean.contiguous(), rstd.contiguous(), values, vectors,
        *_sizes(order, bits), **constants, RECTIFIED=rectify,
    )  # fmt: skip
    return values


def decode(values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise | None, out: Tensor) -> None:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.decode(values, vectors, order, bits, function, out)
    name, options = function or ("", ())
    a, b = (*map(float, options), 0.0, 0.0)[:2]
    programs, constants = _tiles(order, bits, out.itemsize)
    _launch(_decode, programs, out, values, vectors, *_sizes(order, bits), a, b, **constants, FUNCTION=name)


def elementwise_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise, out: Tensor
) -> None:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.elementwise_grad(grad, values, vectors, order, bits, function, out)
    (a,) = (*map(float, function.options), 0.0)[:1]
    programs, constants = _tiles(order, bits, grad.itemsize)
    _launch(
        _elementwise_grad, programs, grad, out, values, vectors, *_sizes(order, bits), a, **constants,
        FUNCTION=function.name,
    )  # fmt: skip


def gradient_sums(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, *, per_sample: bool, rectified: bool = False
) -> Tensor:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.gradient_sums(grad, values, vectors, order, bits, per_sample=per_sample, rectified=rectified)
    sums, parts, steps, constants = _sum_tiles(order, bits, per_sample)
    partial = vectors.new_empty(parts, 2, order.outer if per_sample else 1, order.channels)
    _launch(
        _gradient_sums, sums * parts, grad, values, vectors, partial, *_sizes(order, bits), parts, steps, **constants,
        PER_SAMPLE=per_sample, RECTIFIED=rectified,
    )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0)


def row_means(grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int) -> Tensor:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.row_means(grad, values, vectors, order, bits)
    constants, packed_outer = _row_tiles(order, bits), _sizes(order, bits)[3]
    means = vectors.new_empty(2, order.outer, 1)
    _launch(
        _row_means, -(-packed_outer // constants["POSITIONS"]), grad, values, vectors, means, order.channels,
        order.outer, packed_outer, **constants,
    )  # fmt: skip
    return means


def input_grad(
    grad: Tensor,
    values: Tensor,
    vectors: Tensor,
    order: Order,
    bits: int,
    scale: Tensor,
    means: Tensor | None,
    out: Tensor,
    *,
    rectified: bool = False,
) -> None:
    """See any_layout."""
    if _refuses(order, vectors.dtype):
        return any_layout.input_grad(grad, values, vectors, order, bits, scale, means, out, rectified=rectified)
    (scales, means), flags = _given(scale, means)
    bits = 0 if means is None else bits
    apart = 0 if means is None else means[0].numel()
    programs, constants = _tiles(order, bits, grad.itemsize)
    _launch(
        _input_grad, programs, grad, out, values, vectors, scales, means, apart, *_sizes(order, bits), **constants,
        **flags, RECTIFIED=rectified,
    )  # fmt: skip
