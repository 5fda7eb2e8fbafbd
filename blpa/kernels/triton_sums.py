"""Triton kernels of sums and of per-channel vectors, for tensors of any layout; triton_any_layout.py launches them.

Tiles are those of triton_elements.py. A lane of a tile sums at most triton_ops.LANE_ROWS values of a place in its byte,
a program sums its lanes, and the programs' sums are combined in their order: the order depends on the shape only.
"""

import torch
import triton
import triton.language as tl

from blpa.kernels.triton_elements import (
    BETA,
    FLOOR,
    FRAC,
    GAMMA,
    MEAN,
    WIDTH,
    ZERO,
    _at_least,
    _at_most,
    _bytes,
    _decoded,
    _elements,
    _normalised,
    _vector,
)
from blpa.kernels.triton_ops import _is_last, _lerp

MAX_LANES = tl.constexpr(256)
"""Largest number of parts that the last program loads at once: there are few more."""
TINY_ROOT = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)


@triton.jit(do_not_specialize=["outer", "packed_outer", "parts", "steps"])
def _gradient_sums(
    grad, values, vectors, partial, C, outer, inner, packed_outer, packed_inner, parts, steps,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, PER_SAMPLE: tl.constexpr, RECTIFIED: tl.constexpr,
):  # fmt: skip
    """Write sums of dY and dY z~ to partial [parts, 2, outer if PER_SAMPLE else 1, C], `steps` tiles per program."""
    across, program = tl.cdiv(C, CHANNELS), tl.program_id(0)
    column, part, sample = program % across, program // across % parts, program // across // parts
    columns = column * CHANNELS + tl.arange(0, CHANNELS)
    c = column if CHANNELS == 1 else columns
    length = packed_inner if PER_SAMPLE else packed_outer * packed_inner
    end = (sample + 1) * length
    sum_dy = tl.full([BLOCKS, POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    sum_dy_z = tl.full([BLOCKS, POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        first = sample * length + (part * steps + step) * POSITIONS
        byte_offset, byte_mask, o, i = _bytes(first, end, c, C, packed_inner, POSITIONS, CHANNELS_LAST)
        offset, mask, _ = _elements(
            first, byte_offset, byte_mask, o, i, c, C, outer, inner, packed_outer, packed_inner, BLOCKS, CHANNELS_LAST,
            OUTER_FIRST,
        )  # fmt: skip
        z, y = _decoded(values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, inner, BITS, BLOCKS)
        dy = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.where(y <= 0, 0.0, dy) if RECTIFIED else dy
        sum_dy += dy
        sum_dy_z += tl.where(mask, z * dy, 0.0)
    of_blocks, of_blocks_z = tl.sum(sum_dy, axis=1), tl.sum(sum_dy_z, axis=1)
    here = columns < C
    if PER_SAMPLE:
        apart = outer.to(tl.int64) * C
        to = partial + part * 2 * apart + columns
        if OUTER_FIRST:  # the codes of a byte are of different samples
            row = sample + tl.arange(0, BLOCKS)[:, None] * packed_outer
            to, here = to[None, :] + row.to(tl.int64) * C, (row < outer) & here[None, :]
            tl.store(to, of_blocks, mask=here)
            tl.store(to + apart, of_blocks_z, mask=here)
        else:
            to += sample.to(tl.int64) * C
            tl.store(to, tl.sum(of_blocks, axis=0), mask=here)
            tl.store(to + apart, tl.sum(of_blocks_z, axis=0), mask=here)
    else:
        to = partial + part * 2 * C + columns
        tl.store(to, tl.sum(of_blocks, axis=0), mask=here)
        tl.store(to + C, tl.sum(of_blocks_z, axis=0), mask=here)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _row_means(
    grad, values, vectors, means, C, outer, packed_outer,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write mean(gamma dY) and mean(gamma dY z~) over the channels to means [2, outer]."""
    first = tl.program_id(0) * POSITIONS
    sum_du = tl.full([BLOCKS, POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    sum_du_z = tl.full([BLOCKS, POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        byte_offset, byte_mask, o, i = _bytes(first, packed_outer, c, C, 1, POSITIONS, True)
        offset, mask, _ = _elements(
            first, byte_offset, byte_mask, o, i, c, C, outer, 1, packed_outer, 1, BLOCKS, True, True
        )
        z, _ = _decoded(values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, 1, BITS, BLOCKS)
        du = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32) * _vector(vectors, GAMMA, c, C)
        sum_du += du
        sum_du_z += tl.where(mask, du * z, 0.0)
    row = (first + tl.arange(0, POSITIONS))[None, :]
    here = row < packed_outer
    row = row + tl.arange(0, BLOCKS)[:, None] * packed_outer
    here = here & (row < outer)
    tl.store(means + row, tl.sum(sum_du, axis=2) / C, mask=here)
    tl.store(means + outer + row, tl.sum(sum_du_z, axis=2) / C, mask=here)


@triton.jit
def _lower(z, low):
    return tl.where((z < low) | (z != z), z, low)  # a NaN stays


@triton.jit
def _higher(z, high):
    return tl.where((z > high) | (z != z), z, high)


@triton.jit
def _extremes(low, high):
    """Reduce lanes [POSITIONS, CHANNELS] as amin and amax do, to NaN if there is one."""
    is_nan = tl.max((low != low).to(tl.int32), axis=0) > 0
    low, high = tl.min(low, axis=0), tl.max(high, axis=0)
    return tl.where(is_nan, float("nan"), low), tl.where(is_nan, float("nan"), high)


@triton.jit
def _part(partial, row: tl.constexpr, p, parts, c, C, other):
    """Load a vector of each part p from partial [parts, 4, C], bypassing caches with stale values."""
    mask = (p < parts) & (c < C)
    return tl.load(partial + (p * 4 + row) * C + c, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def _store_stats(stats, mean, second, low, high, c, C):
    tl.store(stats + c, mean, mask=c < C)
    tl.store(stats + C + c, second, mask=c < C)
    tl.store(stats + 2 * C + c, low, mask=c < C)
    tl.store(stats + 3 * C + c, high, mask=c < C)


@triton.jit
def _stats_of_columns(
    x, centre, scale, partial, counter, C, outer, inner, parts, steps,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_OUTER: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Return a program's columns, whether it knows all of them, and mean, variance, low and high of their z if so.

    As in triton_ops.py lanes are summed about a typical value, that of the program's first position, and lanes and
    parts are combined by the parallel axis theorem; `steps` tiles per program. Unless a program sums ALONE, the last
    one of its columns knows them, from partial [parts, 4, C].
    """
    across, program = tl.cdiv(C, CHANNELS), tl.program_id(0)
    column, part, lane = program % across, program // across, tl.arange(0, POSITIONS)[:, None]
    columns = column * CHANNELS + tl.arange(0, CHANNELS)
    c = column if CHANNELS == 1 else columns
    begin, length = part * steps * POSITIONS, outer * inner
    typical_offset, here, sample, _within = _bytes(begin, length, c, C, inner, 1, CHANNELS_LAST)
    typical = _normalised(x, centre, scale, typical_offset, here, sample, c, C, PER_OUTER, PER_CHANNEL)
    total = tl.full([POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    squares = tl.full([POSITIONS, CHANNELS], 0.0, dtype=tl.float32)
    low = tl.full([POSITIONS, CHANNELS], float("inf"), dtype=tl.float32)
    high = tl.full([POSITIONS, CHANNELS], -float("inf"), dtype=tl.float32)
    for step in range(steps):
        first = begin + step * POSITIONS
        offset, mask, o, _ = _bytes(first, length, c, C, inner, POSITIONS, CHANNELS_LAST)
        z = _normalised(x, centre, scale, offset, mask, o, c, C, PER_OUTER, PER_CHANNEL)
        low = tl.where(mask, _lower(z, low), low)
        high = tl.where(mask, _higher(z, high), high)
        centred = tl.where(mask, z - typical, 0.0)
        total += centred
        squares += centred * centred
    count = tl.minimum(steps * POSITIONS, length - begin)
    lane_count = (tl.maximum(count - lane + POSITIONS - 1, 0) // POSITIONS).to(tl.float32)
    lane_mean = total / tl.maximum(lane_count, 1.0)
    lane_squares = tl.maximum(squares - lane_count * lane_mean * lane_mean, 0.0)
    mean = tl.sum(total, axis=0) / count.to(tl.float32)
    off_mean = lane_mean - mean[None, :]
    squares = tl.sum(lane_squares + lane_count * off_mean * off_mean, axis=0)
    lowest, highest = _extremes(low, high)
    mean += tl.sum(typical, axis=0)  # of one row
    variance = squares / count.to(tl.float32)
    if ALONE:
        return columns, True, mean, variance, lowest, highest
    else:
        _store_stats(partial + part.to(tl.int64) * 4 * C, mean, squares, lowest, highest, columns, C)
        is_last = _is_last(counter + column, parts)
        if is_last:
            # Sum the differences from a pivot, so that rounding error does not grow with the mean.
            LANES: tl.constexpr = POSITIONS if POSITIONS < MAX_LANES else MAX_LANES
            part_lane = tl.arange(0, LANES)[:, None]
            pivot = _part(partial, 0, tl.full([1, 1], 0, tl.int32), parts, columns, C, 0.0)
            part_total = tl.full([LANES, CHANNELS], 0.0, dtype=tl.float32)
            part_squares = tl.full([LANES, CHANNELS], 0.0, dtype=tl.float32)
            part_low = tl.full([LANES, CHANNELS], float("inf"), dtype=tl.float32)
            part_high = tl.full([LANES, CHANNELS], -float("inf"), dtype=tl.float32)
            for start in range(0, parts, LANES):
                p = start + part_lane
                counts = tl.minimum(steps * POSITIONS, length - p * steps * POSITIONS).to(tl.float32)
                deltas = _part(partial, 0, p, parts, columns, C, 0.0) - pivot
                part_total += tl.where(p < parts, counts * deltas, 0.0)
                part_low = _lower(_part(partial, 2, p, parts, columns, C, float("inf")), part_low)
                part_high = _higher(_part(partial, 3, p, parts, columns, C, -float("inf")), part_high)
            mean = tl.sum(pivot, axis=0) + tl.sum(part_total, axis=0) / length.to(tl.float32)
            for start in range(0, parts, LANES):
                p = start + part_lane
                counts = tl.minimum(steps * POSITIONS, length - p * steps * POSITIONS).to(tl.float32)
                deltas = _part(partial, 0, p, parts, columns, C, 0.0) - mean[None, :]
                squares_of = _part(partial, 1, p, parts, columns, C, 0.0) + counts * deltas * deltas
                part_squares += tl.where(p < parts, squares_of, 0.0)
            variance = tl.sum(part_squares, axis=0) / length.to(tl.float32)
            lowest, highest = _extremes(part_low, part_high)
        return columns, is_last, mean, variance, lowest, highest


@triton.jit(do_not_specialize=["outer", "parts", "steps"])
def _channel_stats(
    x, centre, scale, partial, counter, stats, C, outer, inner, parts, steps,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_OUTER: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Write mean, variance, low and high of z to stats [4, C]."""
    c, is_last, mean, variance, low, high = _stats_of_columns(
        x, centre, scale, partial, counter, C, outer, inner, parts, steps, POSITIONS, CHANNELS, CHANNELS_LAST,
        PER_OUTER, PER_CHANNEL, ALONE,
    )  # fmt: skip
    if is_last:
        _store_stats(stats, mean, variance, low, high, c, C)


@triton.jit
def _rounded(x):
    """Round to whole numbers, halves to even; a NaN stays NaN."""
    down = tl.floor(x)
    rest = x - down
    is_odd = down - 2 * tl.floor(down / 2) == 1
    return down + tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), 1.0, 0.0)


@triton.jit
def _finite(x):
    x = tl.where(x == float("inf"), 1073741824.0, tl.where(x == -float("inf"), -1073741824.0, x))
    return tl.where(x == x, x, 0.0)


@triton.jit
def _place_grid(
    mean, var, low, high, gamma, beta, vectors, c, C, bin_width, rectified_top, rounded_to_zero,
    LEVELS: tl.constexpr, OF_RANGE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Do as any_layout.grid_vectors and codec.py, operation by operation; LEVELS is 0 without a codec."""
    here = c < C
    nothing = tl.full([CHANNELS], 0.0, dtype=tl.float32)
    slope, shift = nothing + 1.0, nothing
    if gamma is not None:
        slope = _vector(gamma, 0, c, C).to(tl.float32)
    if beta is not None:
        shift = _vector(beta, 0, c, C).to(tl.float32)
    tl.store(vectors + GAMMA * C + c, slope, mask=here)
    tl.store(vectors + BETA * C + c, shift, mask=here)
    frac, zero, width, grid_mean, floor = nothing, nothing, nothing, nothing, nothing - float("inf")
    if LEVELS > 0:
        half: tl.constexpr = LEVELS // 2
        most: tl.constexpr = LEVELS - 1.0
        deviation = _at_least(tl.sqrt_rn(var), TINY_ROOT)
        is_flat, is_positive = slope == 0, shift > rounded_to_zero
        flat_zero = tl.where(is_positive, 0.0, LEVELS)
        shift = tl.where(is_flat, tl.where(is_positive, 1.0, -1.0), slope * mean + shift)
        slope = slope * deviation + 0.0  # -0 becomes 0
        sign = tl.where(slope < 0, -1.0, 1.0)
        if OF_RANGE:
            one, other = tl.div_rn(low - mean, deviation) * sign, tl.div_rn(high - mean, deviation) * sign
            least, largest = tl.where(slope < 0, other, one), tl.where(slope < 0, one, other)
            width = _at_least(tl.div_rn(largest - least, nothing + most), TINY_ROOT)
            edge = tl.div_rn(-shift, tl.abs(slope))
            bins, lowest = _finite(tl.div_rn(edge, width)), tl.div_rn(least, width)
            is_inside = (edge > least) & (edge < largest)
            frac = tl.where(is_inside, tl.ceil(bins) - bins, -lowest)
            first = tl.where(is_inside, tl.floor(lowest + frac), tl.where(edge <= least, -1.0, 0.0))
            zero = _rounded(bins + frac) - first
            frac = frac - first - half
            width = sign * width
        else:
            width = sign * bin_width
            edge = _finite(tl.div_rn(shift, slope * width))
            nearest = _rounded(edge)
            frac, zero = edge - nearest, half - nearest
        zero = tl.where(is_flat, flat_zero, _at_most(_at_least(zero, 1.0), most))
        width, grid_mean = width * deviation, mean
        if gamma is None and beta is None:
            top = high
            if not OF_RANGE:
                root_mean_square = tl.sqrt_rn(var + mean * mean)
                top = _at_most(high, rectified_top * root_mean_square)
                top = tl.where(root_mean_square == root_mean_square, top, root_mean_square)
            rectified_width = _at_least(tl.div_rn(top, nothing + most), TINY_ROOT)
            # A channel that starts at 0 was rectified. One above 0 has the better of both grids.
            is_rectified = (low == 0) | ((low > 0) & (rectified_width <= tl.abs(width)))
            frac = tl.where(is_rectified, 1.0 - half, frac)
            zero = tl.where(is_rectified, 1.0, zero)
            width = tl.where(is_rectified, rectified_width, width)
            grid_mean = tl.where(is_rectified, 0.0, mean)
            floor = tl.where(is_rectified, 0.0, floor)
    tl.store(vectors + FRAC * C + c, frac, mask=here)
    tl.store(vectors + ZERO * C + c, zero, mask=here)
    tl.store(vectors + WIDTH * C + c, width, mask=here)
    tl.store(vectors + MEAN * C + c, grid_mean, mask=here)
    tl.store(vectors + FLOOR * C + c, floor, mask=here)


@triton.jit
def _grid_vectors(
    stats, gamma, beta, centre, scale, vectors, C, bin_width, rectified_top, rounded_to_zero,
    LEVELS: tl.constexpr, OF_RANGE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write Vectors [7, C] from the statistics of z, or of x where centre and scale are given."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean, var = _vector(stats, 0, c, C), _vector(stats, 1, c, C)
    low, high = _vector(stats, 2, c, C), _vector(stats, 3, c, C)
    if centre is not None:
        middle, factor = _vector(centre, 0, c, C), _vector(scale, 0, c, C)
        mean, low, high = (mean - middle) * factor, (low - middle) * factor, (high - middle) * factor
        var = var * (factor * factor)
    _place_grid(
        mean, var, low, high, gamma, beta, vectors, c, C, bin_width, rectified_top, rounded_to_zero, LEVELS, OF_RANGE,
        CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["outer", "parts", "steps"])
def _batch_norm_vectors(
    x, partial, counter, gamma, beta, running_mean, running_var, means, vectors, C, outer, inner, parts, steps, eps,
    momentum, bin_width, rectified_top, rounded_to_zero,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALONE: tl.constexpr,
    LEVELS: tl.constexpr, OF_RANGE: tl.constexpr,
):  # fmt: skip
    """Write the mean and 1 / deviation of x to means [2, C], the grid to vectors [7, C], and the new averages."""
    c, is_last, mean, variance, low, high = _stats_of_columns(
        x, None, None, partial, counter, C, outer, inner, parts, steps, POSITIONS, CHANNELS, CHANNELS_LAST, False,
        False, ALONE,
    )  # fmt: skip
    if is_last:
        here = c < C
        rstd = tl.div_rn(tl.full([CHANNELS], 1.0, dtype=tl.float32), tl.sqrt_rn(variance + eps))
        tl.store(means + c, mean, mask=here)
        tl.store(means + C + c, rstd, mask=here)
        if running_mean is not None:
            count = (outer * inner).to(tl.float64)
            unbiased = variance * (count / (count - 1)).to(tl.float32)
            new_mean = _lerp(_vector(running_mean, 0, c, C), mean, momentum)
            new_var = _lerp(_vector(running_var, 0, c, C), unbiased, momentum)
            tl.store(running_mean + c, new_mean, mask=here)
            tl.store(running_var + c, new_var, mask=here)
        low, high = (low - mean) * rstd, (high - mean) * rstd
        _place_grid(
            (mean - mean) * rstd, variance * (rstd * rstd), low, high, gamma, beta, vectors, c, C, bin_width,
            rectified_top, rounded_to_zero, LEVELS, OF_RANGE, CHANNELS,
        )  # fmt: skip
