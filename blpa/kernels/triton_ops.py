"""The functions of a backend as Triton kernels, written by hand: backend `triton`.

A program processes a tile [BLOCKS, ROWS, CHANNELS] of the activation: the rows that share ROWS rows of bytes (the row
blocks of Codec.row_blocks) in CHANNELS neighbouring columns. Every row of a tile is contiguous in memory, one program
writes each byte of codes, and a kernel reads and writes each element once, in place where out is the input:

                                bytes per element, fp32, K bits
    channel_stats               4                    reads x; with a shortcut 12: reads both, writes the sum
    normalise_rectify_encode    4 + 4 + K/8          reads x, writes a and the codes
    decode                      K/8 + 4              reads the codes, writes a~
    backward                    2 (4 + K/8) + 4      reads dA and the codes twice, writes dX
    pointwise_weight_grad       K/8, and 4 of G      reads the codes and G, writes partial sums

The order of a sum over rows depends on the shape only, so the same input gives the same bits. For statistics and
gradients, a lane of a tile sums at most 64 rows, a program sums its lanes, and the last program to finish sums the
partial results of all; an atomic counter shows which one is last. A weight gradient takes at most 64 tiles of 64 rows
per program, and a second launch sums the partial results.

Fused multiply-adds are off: the sign of y decides the mask in two kernels, and codes equal the reference's to the bit.
The offset of a tile needs 64 bits; offsets within a tile fit in 32.

Each kernel is an operation of torch.library, one node for torch.compile and torch.export.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import Norm, RunningStats

TILE_ELEMENTS, SUM_TILE_ELEMENTS = 2048, 4096
"""Elements of a tile, for 4 warps and for the 8 of a sum: 16 per thread, so that a thread has four 16-byte loads in
flight in fp32, and registers remain for other programs."""
TILE_CHANNELS = 64
"""Largest number of columns of a tile. With 128, the per-channel vectors would pass through shared memory."""
PROGRAMS = 264
"""Number of programs a sum is split into: two per multiprocessor of a large GPU, and the last program's sum stays
short."""
LANE_ROWS = 64
"""Largest number of rows that one lane sums, the reference's strip."""
PRODUCT_ROWS = 64
"""Rows of a tile of a weight gradient: with twice as many, a thread needs up to all of its 255 registers."""
PRODUCT_ELEMENTS = 64 * 256
"""Largest number of weights for pointwise_weight_grad, as in the paper's largest 1x1 convolution: with more, arithmetic
decides the time, and cuDNN's tiles are larger than these."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Compiler options: threads for one tile, and no fused multiply-adds."""
SUM_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""The same for weight gradients, which need registers, and sums, whose last program needs many loads in flight."""

MEAN, VAR, RSTD, GAMMA, BETA, BINS_PER_UNIT, BIN_WIDTH, FRAC, ZERO = map(tl.constexpr, range(len(Norm._fields)))
"""Rows of a Norm [9, C]."""


@triton.jit
def _vector(vectors, row: tl.constexpr, c, C):
    return tl.load(vectors + row * C + c, mask=c < C, other=0.0)


@triton.jit
def _tile(row, column, M, C, R, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the columns, and the offsets and mask of a tile of the activation and of its bytes of codes."""
    c = column * CHANNELS + tl.arange(0, CHANNELS)
    first, r = row * ROWS, tl.arange(0, ROWS)
    byte_offset = first.to(tl.int64) * C + (r[:, None] * C + c[None, :])
    byte_mask = (first + r < R)[:, None] & (c < C)[None, :]
    block = tl.arange(0, BLOCKS)[:, None, None]
    offset = block.to(tl.int64) * R * C + byte_offset[None, :, :]
    mask = (block * R + first + r[None, :, None] < M) & byte_mask[None, :, :]
    return c, offset, mask, byte_offset, byte_mask


@triton.jit
def _recover(saved, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Decode x_hat~, y~ and relu_mask of a tile from its codes, or from x where BITS is 0."""
    gamma, beta = _vector(vectors, GAMMA, c, C), _vector(vectors, BETA, c, C)
    if BITS == 0:
        x = tl.load(saved + offset, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - _vector(vectors, MEAN, c, C)) * _vector(vectors, RSTD, c, C)
        y = gamma * x_hat + beta
        relu_mask = y > 0
    else:
        packed = tl.load(saved + byte_offset, mask=byte_mask, other=0).to(tl.int32)
        shift = tl.arange(0, BLOCKS)[:, None, None] * BITS
        code = ((packed[None, :, :] >> shift) & ((1 << BITS) - 1)).to(tl.float32)
        centre = code + (0.5 - (1 << (BITS - 1))) - _vector(vectors, FRAC, c, C)
        x_hat = centre * _vector(vectors, BIN_WIDTH, c, C)
        y = gamma * x_hat + beta
        relu_mask = code >= _vector(vectors, ZERO, c, C)
    return x_hat, y, relu_mask


@triton.jit
def _decoded(y, relu_mask):
    """Return a~ >= 0; y~ may have the wrong sign where y is close to 0."""
    return tl.where(relu_mask & ~(y <= 0), y, 0.0)


@triton.jit(do_not_specialize=["M", "R"])
def _normalise_rectify_encode(
    x, out, codes, vectors, M, C, R,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c, offset, mask, byte_offset, byte_mask = _tile(tl.program_id(0), tl.program_id(1), M, C, R, BLOCKS, ROWS, CHANNELS)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    x_hat = (value - _vector(vectors, MEAN, c, C)) * _vector(vectors, RSTD, c, C)
    y = _vector(vectors, GAMMA, c, C) * x_hat + _vector(vectors, BETA, c, C)
    if BITS > 0:
        zero = _vector(vectors, ZERO, c, C)
        is_positive = y > 0
        lowest = tl.where(is_positive, zero, 0.0)
        highest = tl.where(is_positive, (1 << BITS) - 1.0, zero - 1.0)
        bins = _vector(vectors, BINS_PER_UNIT, c, C) * x_hat + _vector(vectors, FRAC, c, C)
        code = tl.minimum(tl.maximum(tl.floor(bins) + (1 << (BITS - 1)), lowest), highest).to(tl.int32)
        code = tl.where(mask, code, 0) << (tl.arange(0, BLOCKS)[:, None, None] * BITS)
        tl.store(codes + byte_offset, tl.sum(code, axis=0).to(tl.uint8), mask=byte_mask)
    a = tl.where(y <= 0, 0.0, y)  # a NaN stays NaN, so that it shows
    tl.store(out + offset, a.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "R"])
def _decode(
    out, saved, vectors, M, C, R,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c, offset, mask, byte_offset, byte_mask = _tile(tl.program_id(0), tl.program_id(1), M, C, R, BLOCKS, ROWS, CHANNELS)
    _, y, relu_mask = _recover(saved, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
    tl.store(out + offset, _decoded(y, relu_mask).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _is_last(counter, programs):
    """Return whether all other programs of these columns have stored their part; if so, reset the counter."""
    tl.debug_barrier()  # all threads store their part before one of them counts
    before = tl.atomic_add(counter + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
    is_last = before == programs - 1
    if is_last:
        tl.store(counter + tl.program_id(1), 0)
    return is_last


@triton.jit
def _part(partial, row: tl.constexpr, p, programs, c, C):
    """Load a vector of each program p from partial [programs, 2, C], bypassing caches with stale values."""
    mask = (p < programs)[:, None] & (c < C)[None, :]
    return tl.load(partial + (p[:, None] * 2 + row) * C + c[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["M", "R", "steps"])
def _weight_gradient(
    grad, saved, vectors, partial, M, C, R, N, steps,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write G^T a~ of `steps` tiles per program to partial [programs, N, C], for G [M, N]."""
    program, column, output = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.full([OUTPUTS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        tile = program * steps + step
        c, offset, mask, byte_offset, byte_mask = _tile(tile, column, M, C, R, BLOCKS, ROWS, CHANNELS)
        _, y, relu_mask = _recover(saved, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
        _, offset, mask, _, _ = _tile(tile, output, M, N, R, BLOCKS, ROWS, OUTPUTS)
        g = tl.load(grad + offset, mask=mask, other=0.0)
        a = _decoded(y, relu_mask).to(g.dtype)
        g, a = tl.reshape(g, [BLOCKS * ROWS, OUTPUTS]), tl.reshape(a, [BLOCKS * ROWS, CHANNELS])
        total = tl.dot(tl.trans(g), a, total, input_precision="tf32")
    n, c = output * OUTPUTS + tl.arange(0, OUTPUTS), column * CHANNELS + tl.arange(0, CHANNELS)
    to = partial + program.to(tl.int64) * N * C + n[:, None] * C + c[None, :]
    tl.store(to, total, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["M", "R", "steps", "programs"])
def _gradient_sums(
    grad, saved, vectors, partial, counter, sums, M, C, R, steps, programs,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write dbeta, dgamma and both divided by M to sums [4, C]; `steps` tiles per program."""
    program, column = tl.program_id(0), tl.program_id(1)
    columns = column * CHANNELS + tl.arange(0, CHANNELS)
    here = columns < C
    sum_dy = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    sum_dy_x_hat = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        tile = program * steps + step
        c, offset, mask, byte_offset, byte_mask = _tile(tile, column, M, C, R, BLOCKS, ROWS, CHANNELS)
        x_hat, _, relu_mask = _recover(saved, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
        dy = tl.where(relu_mask, tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32), 0.0)
        sum_dy += tl.sum(dy, axis=0)
        sum_dy_x_hat += tl.sum(dy * x_hat, axis=0)
    to = partial + program.to(tl.int64) * 2 * C + columns
    tl.store(to, tl.sum(sum_dy, axis=0), mask=here)
    tl.store(to + C, tl.sum(sum_dy_x_hat, axis=0), mask=here)
    if _is_last(counter, programs):
        sum_dy = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
        sum_dy_x_hat = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
        for start in range(0, programs, ROWS):
            p = start + tl.arange(0, ROWS)
            sum_dy += _part(partial, 0, p, programs, columns, C)
            sum_dy_x_hat += _part(partial, 1, p, programs, columns, C)
        dbeta, dgamma = tl.sum(sum_dy, axis=0), tl.sum(sum_dy_x_hat, axis=0)
        share = (1.0 / M.to(tl.float64)).to(tl.float32)
        tl.store(sums + columns, dbeta, mask=here)
        tl.store(sums + C + columns, dgamma, mask=here)
        tl.store(sums + 2 * C + columns, dbeta * share, mask=here)
        tl.store(sums + 3 * C + columns, dgamma * share, mask=here)


@triton.jit(do_not_specialize=["M", "R"])
def _input_gradient(
    grad, out, saved, vectors, means, add, M, C, R,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    CONSTANT_STATS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    c, offset, mask, byte_offset, byte_mask = _tile(tl.program_id(0), tl.program_id(1), M, C, R, BLOCKS, ROWS, CHANNELS)
    x_hat, _, relu_mask = _recover(saved, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
    dx = tl.where(relu_mask, tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32), 0.0)
    if not CONSTANT_STATS:
        dx = dx - _vector(means, 0, c, C) - x_hat * _vector(means, 1, c, C)
    dx = _vector(vectors, GAMMA, c, C) * _vector(vectors, RSTD, c, C) * dx
    if ADDS:
        dx += tl.load(add + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, dx.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lerp(start, end, weight):
    """Interpolate as torch.lerp, which is exact at both ends."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def _write_norm(
    mean, var, gamma, beta, vectors, running_mean, running_var, batches, c, M, C, eps, bin_width, momentum,
    LEVELS: tl.constexpr, HAS_RUNNING_STATS: tl.constexpr, COUNTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the Norm [9, C] of these columns; update the running statistics and the count of batches."""
    here = c < C
    scale = tl.load(gamma + c, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(beta + c, mask=here, other=0.0).to(tl.float32)
    tl.store(vectors + MEAN * C + c, mean, mask=here)
    tl.store(vectors + VAR * C + c, var, mask=here)
    tl.store(vectors + RSTD * C + c, tl.rsqrt(var + eps), mask=here)
    tl.store(vectors + GAMMA * C + c, scale, mask=here)
    tl.store(vectors + BETA * C + c, shift, mask=here)
    sign = tl.where(scale < 0, -1.0, 1.0)
    nothing = tl.full([CHANNELS], 0.0, dtype=tl.float32)
    bins_per_unit, width, frac, zero = nothing, nothing, nothing, nothing
    if LEVELS > 0:
        edge = tl.div_rn(shift, tl.abs(scale) * bin_width)
        edge = tl.where(edge == edge, edge, 0.0)  # 0 / 0
        down = tl.floor(edge)
        rest = edge - down
        is_odd = down - 2 * tl.floor(down / 2) == 1
        nearest = down + tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), 1.0, 0.0)  # halves to even
        frac = edge - nearest
        frac = tl.where(frac == frac, frac, 0.0)  # infinity minus infinity: no edge in range, so no shift
        zero = tl.minimum(tl.maximum(LEVELS // 2 - nearest, 1.0), LEVELS - 1.0)
        bins_per_unit = tl.div_rn(sign, tl.full([CHANNELS], bin_width, dtype=tl.float32))
        width = sign * bin_width
    tl.store(vectors + BINS_PER_UNIT * C + c, bins_per_unit, mask=here)
    tl.store(vectors + BIN_WIDTH * C + c, width, mask=here)
    tl.store(vectors + FRAC * C + c, frac, mask=here)
    tl.store(vectors + ZERO * C + c, zero, mask=here)
    if HAS_RUNNING_STATS:
        unbiased = var * (M.to(tl.float64) / (M - 1)).to(tl.float32)
        old_mean = tl.load(running_mean + c, mask=here, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + c, mask=here, other=0.0).to(tl.float32)
        new_mean, new_var = _lerp(old_mean, mean, momentum), _lerp(old_var, unbiased, momentum)
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=here)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=here)
    if COUNTS:  # noqa: SIM102  Triton needs a constexpr condition of its own
        if tl.program_id(1) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit(do_not_specialize=["M", "steps", "programs"])
def _channel_stats(
    x, add, partial, counter, gamma, beta, vectors, running_mean, running_var, batches,
    M, C, steps, programs, eps, bin_width, momentum,
    LEVELS: tl.constexpr, HAS_RUNNING_STATS: tl.constexpr, COUNTS: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the Norm of x from partial [programs, 2, C]: mean and sum of squares about it of `steps` tiles per program.

    If ADDS, x is first overwritten by x + add. Lanes are summed about the program's first row, a typical value, so
    nothing cancels. Lanes and programs are combined by the parallel axis theorem.
    """
    program, column, lane = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    c = column * CHANNELS + tl.arange(0, CHANNELS)
    here = c < C
    begin = program * steps * ROWS
    first_offset = begin.to(tl.int64) * C + c
    first = tl.load(x + first_offset, mask=here, other=0.0).to(tl.float32)
    if ADDS:
        first += tl.load(add + first_offset, mask=here, other=0.0).to(tl.float32)
        first = first.to(x.dtype.element_ty).to(tl.float32)
        tl.debug_barrier()  # all threads read the first row before one overwrites it
    total = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    squares = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        _, _, _, offset, mask = _tile(program * steps + step, column, M, C, M, 1, ROWS, CHANNELS)  # one block
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if ADDS:
            value += tl.load(add + offset, mask=mask, other=0.0).to(tl.float32)
            stored = value.to(x.dtype.element_ty)
            tl.store(x + offset, stored, mask=mask)
            value = stored.to(tl.float32)
        centred = tl.where(mask, value - first, 0.0)
        total += centred
        squares += centred * centred
    rows = tl.minimum(steps * ROWS, M - begin)
    lane_rows = (tl.maximum(rows - lane + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]
    lane_mean = total / tl.maximum(lane_rows, 1.0)
    lane_squares = tl.maximum(squares - lane_rows * lane_mean * lane_mean, 0.0)
    mean = tl.sum(total, axis=0) / rows.to(tl.float32)
    off_mean = lane_mean - mean
    to = partial + program.to(tl.int64) * 2 * C + c
    tl.store(to, first + mean, mask=here)
    tl.store(to + C, tl.sum(lane_squares + lane_rows * off_mean * off_mean, axis=0), mask=here)
    if _is_last(counter, programs):
        # Sum the differences from a pivot, so that rounding error does not grow with the mean.
        pivot = tl.load(partial + c, mask=here, other=0.0, cache_modifier=".cg")
        lanes = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
        for start in range(0, programs, ROWS):
            p = start + lane
            rows_of = tl.minimum(steps * ROWS, M - p * steps * ROWS).to(tl.float32)[:, None]
            means = _part(partial, 0, p, programs, c, C)
            lanes += tl.where((p < programs)[:, None], rows_of * (means - pivot), 0.0)
        mean = pivot + tl.sum(lanes, axis=0) / M.to(tl.float32)
        lanes = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
        for start in range(0, programs, ROWS):
            p = start + lane
            rows_of = tl.minimum(steps * ROWS, M - p * steps * ROWS).to(tl.float32)[:, None]
            off_mean = _part(partial, 0, p, programs, c, C) - mean
            parts = _part(partial, 1, p, programs, c, C) + rows_of * off_mean * off_mean
            lanes += tl.where((p < programs)[:, None], parts, 0.0)
        var = tl.sum(lanes, axis=0) / M.to(tl.float32)
        _write_norm(
            mean, var, gamma, beta, vectors, running_mean, running_var, batches, c, M, C, eps, bin_width, momentum,
            LEVELS, HAS_RUNNING_STATS, COUNTS, CHANNELS,
        )  # fmt: skip


def _launch(kernel: "triton.JITFunction", grid: tuple[int, ...], *args: object, **constants: object) -> None:
    kernel[grid](*args, **(OPTIONS | constants))


def _division(tiles: int, across: int, longest: int) -> tuple[int, int]:
    """Return the number of tiles per program of a sum, at most `longest`, and the number of programs."""
    steps = min(triton.cdiv(tiles * across, PROGRAMS), longest)
    return steps, triton.cdiv(tiles, steps)


def _launch_channel_stats(
    x: Tensor, add: Tensor | None, gamma: Tensor, beta: Tensor, vectors: Tensor, counter: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float,
    bin_width: float, levels: int,
) -> None:  # fmt: skip
    rows, channels = x.shape
    (tiles, across), _, constants = _tiles(x, 0, SUM_TILE_ELEMENTS)
    steps, programs = _division(tiles, across, LANE_ROWS)
    partial = vectors.new_empty(programs, 2, channels)
    _launch(
        _channel_stats, (programs, across), x, x if add is None else add, partial, _zeros(counter, x),
        gamma, beta, vectors,
        *(vectors if given is None else given for given in (running_mean, running_var, batches)),
        rows, channels, steps, programs, eps, bin_width, momentum,
        LEVELS=levels, HAS_RUNNING_STATS=running_mean is not None, COUNTS=batches is not None, ADDS=add is not None,
        ROWS=constants["ROWS"], CHANNELS=constants["CHANNELS"], **SUM_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("blpa::channel_stats", mutates_args=("vectors", "running_mean", "running_var", "batches"))
def channel_stats(
    x: Tensor, gamma: Tensor, beta: Tensor, vectors: Tensor, counter: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float, bin_width: float, levels: int,
) -> None:  # fmt: skip
    """Write the Norm of x [M, C] to `vectors` [9, C], and update the running statistics, if given."""
    running_stats = running_mean, running_var, batches, momentum
    _launch_channel_stats(x, None, gamma, beta, vectors, counter, *running_stats, eps, bin_width, levels)


@torch.library.custom_op(
    "blpa::add_channel_stats", mutates_args=("x", "vectors", "running_mean", "running_var", "batches")
)
def add_channel_stats(
    x: Tensor, add: Tensor, gamma: Tensor, beta: Tensor, vectors: Tensor, counter: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float,
    bin_width: float, levels: int,
) -> None:  # fmt: skip
    """Write x + add to x, then do as channel_stats."""
    running_stats = running_mean, running_var, batches, momentum
    _launch_channel_stats(x, add, gamma, beta, vectors, counter, *running_stats, eps, bin_width, levels)


def _zeros(counter: Tensor | None, x: Tensor) -> Tensor:
    """Return the counter, or zeros int32 [C] for x [M, C], of which each tile of columns uses one."""
    return x.new_zeros(x.shape[1], dtype=torch.int32) if counter is None else counter


@torch.library.custom_op("blpa::normalise_rectify_encode", mutates_args=("out", "codes"))
def normalise_rectify_encode(x: Tensor, vectors: Tensor, out: Tensor, codes: Tensor | None, bits: int) -> None:
    """Write a to `out` and the packed codes to `codes`; bits is 0 without codes."""
    grid, sizes, constants = _tiles(x, bits)
    codes = vectors if codes is None else codes  # not read
    _launch(_normalise_rectify_encode, grid, x, out, codes, vectors, *sizes, **constants)


@torch.library.custom_op("blpa::decode", mutates_args=("out",))
def decode(saved: Tensor, vectors: Tensor, out: Tensor, bits: int) -> None:
    """Write a~ to `out`, from codes, or from x where bits is 0."""
    grid, sizes, constants = _tiles(out, bits)
    _launch(_decode, grid, out, saved, vectors, *sizes, **constants)


def _launch_gradient_sums(
    grad: Tensor, saved: Tensor, vectors: Tensor, counter: Tensor | None, sums: Tensor, bits: int
) -> None:
    (tiles, across), sizes, constants = _tiles(grad, bits, SUM_TILE_ELEMENTS)
    steps, programs = _division(tiles, across, LANE_ROWS // constants["BLOCKS"])
    partial = sums.new_empty(programs, 2, grad.shape[1])
    _launch(
        _gradient_sums, (programs, across), grad, saved, vectors, partial, _zeros(counter, grad), sums, *sizes, steps,
        programs, **constants, **SUM_OPTIONS,
    )  # fmt: skip


def _launch_input_gradient(
    grad: Tensor, saved: Tensor, vectors: Tensor, means: Tensor, out: Tensor, add: Tensor | None, bits: int,
    constant_stats: bool,
) -> None:  # fmt: skip
    grid, sizes, constants = _tiles(grad, bits)
    _launch(
        _input_gradient, grid, grad, out, saved, vectors, means, grad if add is None else add, *sizes, **constants,
        CONSTANT_STATS=constant_stats, ADDS=add is not None,
    )  # fmt: skip


@torch.library.custom_op("blpa::backward", mutates_args=("out", "sums"))
def backward(
    grad: Tensor, saved: Tensor, vectors: Tensor, counter: Tensor | None, out: Tensor, sums: Tensor, add: Tensor | None,
    bits: int, constant_stats: bool,
) -> None:  # fmt: skip
    """Write dX, plus `add` if given, to `out`, and dbeta, dgamma and both divided by M to `sums` [4, C]."""
    _launch_gradient_sums(grad, saved, vectors, counter, sums, bits)
    _launch_input_gradient(grad, saved, vectors, sums[2:], out, add, bits, constant_stats)


@torch.library.custom_op("blpa::gradient_sums", mutates_args=("sums",))
def gradient_sums(
    grad: Tensor, saved: Tensor, vectors: Tensor, counter: Tensor | None, sums: Tensor, bits: int
) -> None:
    """Write dbeta, dgamma and both divided by M to `sums` [4, C]: the first half of backward."""
    _launch_gradient_sums(grad, saved, vectors, counter, sums, bits)


@torch.library.custom_op("blpa::input_grad", mutates_args=("out",))
def input_grad(
    grad: Tensor, saved: Tensor, vectors: Tensor, means: Tensor, out: Tensor, add: Tensor | None, bits: int,
    constant_stats: bool,
) -> None:  # fmt: skip
    """Write dX, plus `add` if given, to `out`, from the means [2, C]: the second half of backward."""
    _launch_input_gradient(grad, saved, vectors, means, out, add, bits, constant_stats)


def _tiles(
    x: Tensor, bits: int, elements: int | None = None
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """Return the grid over an activation, its sizes M, C and R, and the constants of tiles of `elements`."""
    rows, channels = x.shape
    blocks = 8 // bits if bits else 1
    width = min(triton.next_power_of_2(channels), TILE_CHANNELS)
    tile_rows = (elements or TILE_ELEMENTS) // (width * blocks)
    packed_rows = triton.cdiv(rows, blocks)
    constants = {"BITS": bits, "BLOCKS": blocks, "ROWS": tile_rows, "CHANNELS": width}
    grid = triton.cdiv(packed_rows, tile_rows), triton.cdiv(channels, width)
    return grid, (rows, channels, packed_rows), constants


@torch.library.custom_op("blpa::pointwise_weight_grad", mutates_args=("partial",))
def pointwise_weight_grad(grad: Tensor, saved: Tensor, vectors: Tensor, partial: Tensor, bits: int, steps: int) -> None:
    """Write G^T a~ of `steps` tiles per program to `partial` [programs, N, C], for G [M, N]."""
    programs, outputs, channels = partial.shape
    sizes, constants = _product_tiles(grad, channels, bits)
    grid = programs, triton.cdiv(channels, constants["CHANNELS"]), triton.cdiv(outputs, constants["OUTPUTS"])
    _launch(_weight_gradient, grid, grad, saved, vectors, partial, *sizes, steps, **constants, **SUM_OPTIONS)


def _product_tiles(grad: Tensor, channels: int, bits: int) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """Return sizes M, C, R, N of a weight gradient and its tiles' constants; tensor cores need sides >= 16."""
    rows, outputs = grad.shape
    blocks = 8 // bits if bits else 1
    wide, high = (min(max(triton.next_power_of_2(n), 16), TILE_CHANNELS) for n in (channels, outputs))
    constants = {"BITS": bits, "BLOCKS": blocks, "ROWS": PRODUCT_ROWS // blocks, "CHANNELS": wide, "OUTPUTS": high}
    return (rows, channels, triton.cdiv(rows, blocks), outputs), constants


for operation in (
    channel_stats, add_channel_stats, normalise_rectify_encode, decode, backward, gradient_sums, input_grad,
    pointwise_weight_grad,
):  # fmt: skip
    operation.register_fake(lambda *args: None)  # they only write to their arguments


class TritonKernels:
    """The backend; see kernels.Kernels for the contract."""

    name = "triton"

    def __repr__(self) -> str:
        """Return the same text in every process, for the text of layers that contain this."""
        return f"<kernels {self.name}>"

    def channel_stats(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        *,
        eps: float,
        codec: Codec | None,
        running_stats: RunningStats | None = None,
        add: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> Tensor:
        """See Kernels."""
        _check_dtype(x)
        vectors = x.new_empty(len(Norm._fields), x.shape[1], dtype=torch.float32)
        mean, var, momentum, batches = running_stats or (None, None, 0.0, None)
        bin_width, levels = (codec.bin_width, codec.levels) if codec else (0.0, 0)
        others = gamma.detach(), beta.detach(), vectors, counter, mean, var, batches, momentum, eps, bin_width, levels
        if add is None:
            channel_stats(x, *others)
        else:
            add_channel_stats(x, add, *others)
        return vectors

    def normalise_rectify_encode(
        self, x: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor
    ) -> Tensor | None:
        """See Kernels."""
        _check_dtype(x)
        codes = None if codec is None else x.new_empty(codec.packed_rows(x.shape[0]), x.shape[1], dtype=torch.uint8)
        normalise_rectify_encode(x, vectors, out, codes, codec.bits if codec else 0)
        return codes

    def decode(self, saved: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor) -> None:
        """See Kernels."""
        _check_dtype(out)
        decode(saved, vectors, out, codec.bits if codec else 0)

    def backward(
        self,
        grad: Tensor,
        saved: Tensor,
        vectors: Tensor,
        *,
        codec: Codec | None,
        constant_stats: bool,
        out: Tensor,
        add: Tensor | None = None,
        counter: Tensor | None = None,
        means: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See Kernels."""
        _check_dtype(grad)
        sums = vectors.new_empty(4, grad.shape[1])
        bits = codec.bits if codec else 0
        if means is None:
            backward(grad, saved, vectors, counter, out, sums, add, bits, constant_stats)
        else:
            gradient_sums(grad, saved, vectors, counter, sums, bits)
            input_grad(grad, saved, vectors, means(sums[:2]), out, add, bits, constant_stats)
        return sums[:2]

    def pointwise_weight_grad(
        self, grad: Tensor, saved: Tensor, vectors: Tensor, *, codec: Codec | None
    ) -> Tensor | None:
        """See Kernels."""
        (_, outputs), (_, channels) = grad.shape, saved.shape
        if outputs * channels > PRODUCT_ELEMENTS or not _has_tensor_cores_for(grad):
            return None
        bits = codec.bits if codec else 0
        (rows, *_), constants = _product_tiles(grad, channels, bits)
        across = triton.cdiv(channels, constants["CHANNELS"]) * triton.cdiv(outputs, constants["OUTPUTS"])
        steps, programs = _division(triton.cdiv(rows, PRODUCT_ROWS), across, LANE_ROWS)
        partial = vectors.new_empty(programs, outputs, channels)
        pointwise_weight_grad(grad, saved, vectors, partial, bits, steps)
        return partial.sum(0)


def _has_tensor_cores_for(x: Tensor) -> bool:
    """Return whether tensor cores may multiply this dtype; strict float32 may not be rounded to tf32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    may_round = x.dtype != torch.float32 or convolutions.fp32_precision == "tf32"
    if x.device.type == "cuda":
        return may_round and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return may_round and not x.is_meta  # count a~ there, the upper bound


def _check_dtype(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("kernels = triton: computes in float32, not float64; use kernels torch or inductor")


TRITON = TritonKernels()
