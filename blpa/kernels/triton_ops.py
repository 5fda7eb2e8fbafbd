"""The functions of a backend as Triton kernels, written by hand: backend `triton`.

A program takes a tile [BLOCKS, ROWS, CHANNELS] of the activation: the rows that share ROWS rows of bytes (the row
blocks of Code.row_blocks) in CHANNELS neighbouring columns. Every row of a tile is contiguous in memory, every byte of
codes has one owner, and each element is read once and written once a kernel, in place where out is the input:

                                bytes an element, fp32, K bits
    channel_stats               4                    reads x; with a shortcut 12: reads both, writes the sum
    normalise_rectify_encode    4 + 4 + K/8          reads x, writes a and the codes
    decode                      K/8 + 4              reads the codes, writes a~
    backward                    2 (4 + K/8) + 4      reads dA and the codes twice, writes dX
    pointwise_weight_grad       K/8, and 4 of G      reads the codes and G, writes sums of parts

Sums over rows are made in an order that depends on the shape alone, so that the same input gives the same bits. For
statistics and gradients a lane of a tile adds up at most 64 rows, a program its lanes, and the program that ends last
adds up what all of them left; a counter, the only thing that is atomic, shows which one that is. Products go through at
most 64 tiles of 64 rows per program, and a second launch adds those up.

Products and sums are not contracted to fused multiply-adds: the sign of y decides the mask in two kernels, and a code
must be the reference's, to the bit. A tile's first element is found in 64 bits; within a tile 32 are enough.

The kernels are operations of torch.library, which torch.compile and torch.export see as one node each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blpa.codec import Code
from blpa.kernels import Averages, Norm

TILE_ELEMENTS, SUM_TILE_ELEMENTS = 2048, 4096
"""Elements of a tile, for 4 warps and for the 8 of a sum: 16 per thread, so that four loads of 16 bytes are under way
in fp32, and registers are left for other programs."""
TILE_CHANNELS = 64
"""Columns of a tile at most. With 128 each thread would hold vectors of all of its rows' columns, and move them through
shared memory to get there."""
PROGRAMS = 264
"""Programs that sums are divided among before lanes grow longer: two for each multiprocessor of a large card, and few
enough for the last one to add up."""
LANE_ROWS = 64
"""Rows that one lane adds up at most, the reference's strip."""
PRODUCT_ROWS = 64
"""Rows of a tile of a product: with twice as many a thread needs up to all of its 255 registers."""
PRODUCT_ELEMENTS = 64 * 256
"""Weights of a product at most, those of the paper's largest 1x1 convolution: with more, arithmetic decides, and
cuDNN's tiles are larger than these."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the compiler: threads enough for a tile, and no fused multiply-adds."""
SUM_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""The same for products, which need registers, and for sums, whose last program needs many loads under way."""

MEAN, VAR, RSTD, GAMMA, BETA, BINS_PER_UNIT, BIN_WIDTH, FRAC, ZERO = map(tl.constexpr, range(len(Norm._fields)))
"""Rows of the Norm [9, C]."""


@triton.jit
def _vector(vectors, row: tl.constexpr, c, C):
    return tl.load(vectors + row * C + c, mask=c < C, other=0.0)


@triton.jit
def _tile(row, column, M, C, R, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Columns, offsets and mask of a tile of the activation, and of the bytes that its rows share."""
    c = column * CHANNELS + tl.arange(0, CHANNELS)
    first, r = row * ROWS, tl.arange(0, ROWS)
    byte_offset = first.to(tl.int64) * C + (r[:, None] * C + c[None, :])
    byte_mask = (first + r < R)[:, None] & (c < C)[None, :]
    block = tl.arange(0, BLOCKS)[:, None, None]
    offset = block.to(tl.int64) * R * C + byte_offset[None, :, :]
    mask = (block * R + first + r[None, :, None] < M) & byte_mask[None, :, :]
    return c, offset, mask, byte_offset, byte_mask


@triton.jit
def _recover(kept, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """x_hat~, y~ and relu_mask of a tile, from its codes, or from x where BITS is 0."""
    gamma, beta = _vector(vectors, GAMMA, c, C), _vector(vectors, BETA, c, C)
    if BITS == 0:
        x = tl.load(kept + offset, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - _vector(vectors, MEAN, c, C)) * _vector(vectors, RSTD, c, C)
        y = gamma * x_hat + beta
        relu_mask = y > 0
    else:
        packed = tl.load(kept + byte_offset, mask=byte_mask, other=0).to(tl.int32)
        shift = tl.arange(0, BLOCKS)[:, None, None] * BITS
        code = ((packed[None, :, :] >> shift) & ((1 << BITS) - 1)).to(tl.float32)
        centre = code + (0.5 - (1 << (BITS - 1))) - _vector(vectors, FRAC, c, C)
        x_hat = centre * _vector(vectors, BIN_WIDTH, c, C)
        y = gamma * x_hat + beta
        relu_mask = code >= _vector(vectors, ZERO, c, C)
    return x_hat, y, relu_mask


@triton.jit
def _decoded(y, relu_mask):
    """a~, which is never negative; the sign of y~ may be wrong where y is next to 0."""
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
    a = tl.where(y <= 0, 0.0, y)  # a NaN stays one, as it must to be noticed
    tl.store(out + offset, a.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "R"])
def _decode(
    out, kept, vectors, M, C, R,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c, offset, mask, byte_offset, byte_mask = _tile(tl.program_id(0), tl.program_id(1), M, C, R, BLOCKS, ROWS, CHANNELS)
    _, y, relu_mask = _recover(kept, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
    tl.store(out + offset, _decoded(y, relu_mask).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _is_last(counter, programs):
    """Whether the other programs of these columns have all stored their part; if so, the counter is zero again."""
    tl.debug_barrier()  # every thread of this program has stored its part before one of them counts
    before = tl.atomic_add(counter + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
    is_last = before == programs - 1
    if is_last:
        tl.store(counter + tl.program_id(1), 0)
    return is_last


@triton.jit
def _part(partial, row: tl.constexpr, p, programs, c, C):
    """One vector of each of the programs p, from partial [programs, 2, C], past caches that may hold older values."""
    mask = (p < programs)[:, None] & (c < C)[None, :]
    return tl.load(partial + (p[:, None] * 2 + row) * C + c[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["M", "R", "steps"])
def _weight_gradient(
    grad, kept, vectors, partial, M, C, R, N, steps,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """G^T a~ over `steps` tiles per program, into partial [programs, N, C] for G [M, N]; a~ is written nowhere."""
    program, column, output = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.full([OUTPUTS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        tile = program * steps + step
        c, offset, mask, byte_offset, byte_mask = _tile(tile, column, M, C, R, BLOCKS, ROWS, CHANNELS)
        _, y, relu_mask = _recover(kept, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
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
    grad, kept, vectors, partial, counter, sums, M, C, R, steps, programs,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma and both divided by M, into sums [4, C]: sums of dY and dY x_hat~, `steps` tiles per program."""
    program, column = tl.program_id(0), tl.program_id(1)
    columns = column * CHANNELS + tl.arange(0, CHANNELS)
    here = columns < C
    sum_dy = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    sum_dy_x_hat = tl.full([ROWS, CHANNELS], 0.0, dtype=tl.float32)
    for step in range(steps):
        tile = program * steps + step
        c, offset, mask, byte_offset, byte_mask = _tile(tile, column, M, C, R, BLOCKS, ROWS, CHANNELS)
        x_hat, _, relu_mask = _recover(kept, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
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
    grad, out, kept, vectors, means, add, M, C, R,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    CONSTANT_STATS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    c, offset, mask, byte_offset, byte_mask = _tile(tl.program_id(0), tl.program_id(1), M, C, R, BLOCKS, ROWS, CHANNELS)
    x_hat, _, relu_mask = _recover(kept, vectors, c, C, offset, mask, byte_offset, byte_mask, BITS, BLOCKS)
    dx = tl.where(relu_mask, tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32), 0.0)
    if not CONSTANT_STATS:
        dx = dx - _vector(means, 0, c, C) - x_hat * _vector(means, 1, c, C)
    dx = _vector(vectors, GAMMA, c, C) * _vector(vectors, RSTD, c, C) * dx
    if ADDS:
        dx += tl.load(add + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, dx.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp, which is exact at both ends."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def _write_norm(
    mean, var, gamma, beta, vectors, running_mean, running_var, batches, c, M, C, eps, bin_width, momentum,
    LEVELS: tl.constexpr, HAS_AVERAGES: tl.constexpr, COUNTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The Norm [9, C] of these columns; the running averages move, and the batch is counted."""
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
        nearest = down + tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), 1.0, 0.0)  # halves to the even one
        frac = edge - nearest
        frac = tl.where(frac == frac, frac, 0.0)  # infinity less infinity: no edge within reach, so no shift
        zero = tl.minimum(tl.maximum(LEVELS // 2 - nearest, 1.0), LEVELS - 1.0)
        bins_per_unit = tl.div_rn(sign, tl.full([CHANNELS], bin_width, dtype=tl.float32))
        width = sign * bin_width
    tl.store(vectors + BINS_PER_UNIT * C + c, bins_per_unit, mask=here)
    tl.store(vectors + BIN_WIDTH * C + c, width, mask=here)
    tl.store(vectors + FRAC * C + c, frac, mask=here)
    tl.store(vectors + ZERO * C + c, zero, mask=here)
    if HAS_AVERAGES:
        unbiased = var * (M.to(tl.float64) / (M - 1)).to(tl.float32)
        old_mean = tl.load(running_mean + c, mask=here, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + c, mask=here, other=0.0).to(tl.float32)
        new_mean, new_var = _lerp(old_mean, mean, momentum), _lerp(old_var, unbiased, momentum)
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=here)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=here)
    if COUNTS:  # noqa: SIM102  a constant, which Triton must meet by itself
        if tl.program_id(1) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit(do_not_specialize=["M", "steps", "programs"])
def _channel_stats(
    x, add, partial, counter, gamma, beta, vectors, running_mean, running_var, batches,
    M, C, steps, programs, eps, bin_width, momentum,
    LEVELS: tl.constexpr, HAS_AVERAGES: tl.constexpr, COUNTS: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The Norm of x, from means and sums of squares about them, `steps` tiles per program, in partial [programs, 2, C].

    Where ADDS, x first becomes x + add. Lanes are summed about the program's first row, a value of the same size as the
    others, so nothing cancels; lanes and programs combine by the parallel axis theorem.
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
        tl.debug_barrier()  # every thread has read the first row before one of them writes the sum there
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
        # The sum is of what means differ by, so that its rounding does not scale with the mean.
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
            LEVELS, HAS_AVERAGES, COUNTS, CHANNELS,
        )  # fmt: skip


def _launch(kernel: "triton.JITFunction", grid: tuple[int, ...], *args: object, **constants: object) -> None:
    kernel[grid](*args, **(OPTIONS | constants))


def _division(tiles: int, across: int, longest: int) -> tuple[int, int]:
    """How many tiles one program of a sum goes through, at most `longest`, and how many programs that makes."""
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
        LEVELS=levels, HAS_AVERAGES=running_mean is not None, COUNTS=batches is not None, ADDS=add is not None,
        ROWS=constants["ROWS"], CHANNELS=constants["CHANNELS"], **SUM_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("blpa::channel_stats", mutates_args=("vectors", "running_mean", "running_var", "batches"))
def channel_stats(
    x: Tensor, gamma: Tensor, beta: Tensor, vectors: Tensor, counter: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float, bin_width: float, levels: int,
) -> None:  # fmt: skip
    """Write the Norm of x [M, C] to `vectors` [9, C], move the running averages, if there are any, and count."""
    averages = running_mean, running_var, batches, momentum
    _launch_channel_stats(x, None, gamma, beta, vectors, counter, *averages, eps, bin_width, levels)


@torch.library.custom_op(
    "blpa::add_channel_stats", mutates_args=("x", "vectors", "running_mean", "running_var", "batches")
)
def add_channel_stats(
    x: Tensor, add: Tensor, gamma: Tensor, beta: Tensor, vectors: Tensor, counter: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float, eps: float,
    bin_width: float, levels: int,
) -> None:  # fmt: skip
    """Write x + add to x, and then as channel_stats."""
    averages = running_mean, running_var, batches, momentum
    _launch_channel_stats(x, add, gamma, beta, vectors, counter, *averages, eps, bin_width, levels)


def _zeros(counter: Tensor | None, x: Tensor) -> Tensor:
    """The counter of a sum over x [M, C], one for each tile of columns: as it is given, or made."""
    return x.new_zeros(x.shape[1], dtype=torch.int32) if counter is None else counter


@torch.library.custom_op("blpa::normalise_rectify_encode", mutates_args=("out", "codes"))
def normalise_rectify_encode(x: Tensor, vectors: Tensor, out: Tensor, codes: Tensor | None, bits: int) -> None:
    """Write a to `out` and the packed codes to `codes`; without any, bits is 0."""
    grid, sizes, constants = _tiles(x, bits)
    codes = vectors if codes is None else codes  # never looked at
    _launch(_normalise_rectify_encode, grid, x, out, codes, vectors, *sizes, **constants)


@torch.library.custom_op("blpa::decode", mutates_args=("out",))
def decode(kept: Tensor, vectors: Tensor, out: Tensor, bits: int) -> None:
    """Write a~ to `out`, from codes, or from x where bits is 0."""
    grid, sizes, constants = _tiles(out, bits)
    _launch(_decode, grid, out, kept, vectors, *sizes, **constants)


@torch.library.custom_op("blpa::backward", mutates_args=("out", "sums"))
def backward(
    grad: Tensor, kept: Tensor, vectors: Tensor, counter: Tensor | None, out: Tensor, sums: Tensor, add: Tensor | None,
    bits: int, constant_stats: bool,
) -> None:  # fmt: skip
    """Write dX, plus `add` if there is any, to `out`, and dbeta, dgamma and both divided by M to `sums` [4, C]."""
    (tiles, across), sizes, constants = _tiles(grad, bits, SUM_TILE_ELEMENTS)
    steps, programs = _division(tiles, across, LANE_ROWS // constants["BLOCKS"])
    partial = sums.new_empty(programs, 2, grad.shape[1])
    _launch(
        _gradient_sums, (programs, across), grad, kept, vectors, partial, _zeros(counter, grad), sums, *sizes, steps,
        programs, **constants, **SUM_OPTIONS,
    )  # fmt: skip
    grid, sizes, constants = _tiles(grad, bits)
    _launch(
        _input_gradient, grid, grad, out, kept, vectors, sums[2:], grad if add is None else add, *sizes, **constants,
        CONSTANT_STATS=constant_stats, ADDS=add is not None,
    )  # fmt: skip


def _tiles(
    x: Tensor, bits: int, elements: int | None = None
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """The grid over an activation, its sizes M, C and R, and the constants of its tiles of that many elements."""
    rows, channels = x.shape
    blocks = 8 // bits if bits else 1
    width = min(triton.next_power_of_2(channels), TILE_CHANNELS)
    tile_rows = (elements or TILE_ELEMENTS) // (width * blocks)
    packed_rows = triton.cdiv(rows, blocks)
    constants = {"BITS": bits, "BLOCKS": blocks, "ROWS": tile_rows, "CHANNELS": width}
    grid = triton.cdiv(packed_rows, tile_rows), triton.cdiv(channels, width)
    return grid, (rows, channels, packed_rows), constants


@torch.library.custom_op("blpa::pointwise_weight_grad", mutates_args=("partial",))
def pointwise_weight_grad(grad: Tensor, kept: Tensor, vectors: Tensor, partial: Tensor, bits: int, steps: int) -> None:
    """Write G^T a~ to `partial` [programs, N, C], for G [M, N], `steps` tiles by each program."""
    programs, outputs, channels = partial.shape
    sizes, constants = _product_tiles(grad, channels, bits)
    grid = programs, triton.cdiv(channels, constants["CHANNELS"]), triton.cdiv(outputs, constants["OUTPUTS"])
    _launch(_weight_gradient, grid, grad, kept, vectors, partial, *sizes, steps, **constants, **SUM_OPTIONS)


def _product_tiles(grad: Tensor, channels: int, bits: int) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """The sizes M, C, R and N of a weight gradient, and the constants of its tiles; tensor cores take 16 at least."""
    rows, outputs = grad.shape
    blocks = 8 // bits if bits else 1
    wide, high = (min(max(triton.next_power_of_2(n), 16), TILE_CHANNELS) for n in (channels, outputs))
    constants = {"BITS": bits, "BLOCKS": blocks, "ROWS": PRODUCT_ROWS // blocks, "CHANNELS": wide, "OUTPUTS": high}
    return (rows, channels, triton.cdiv(rows, blocks), outputs), constants


for operation in (channel_stats, add_channel_stats, normalise_rectify_encode, decode, backward, pointwise_weight_grad):
    operation.register_fake(lambda *args: None)  # they only write to what they are given


class TritonKernels:
    """The back end; see kernels.Kernels for the contract."""

    name = "triton"

    def __repr__(self) -> str:
        """The same in every process, as the representation of layers that hold this is."""
        return f"<kernels {self.name}>"

    def channel_stats(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        *,
        eps: float,
        code: Code | None,
        averages: Averages | None = None,
        add: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> Tensor:
        """See Kernels."""
        _refuse_float64(x)
        vectors = x.new_empty(len(Norm._fields), x.shape[1], dtype=torch.float32)
        mean, var, momentum, batches = averages or (None, None, 0.0, None)
        bin_width, levels = (code.bin_width, code.levels) if code else (0.0, 0)
        others = gamma.detach(), beta.detach(), vectors, counter, mean, var, batches, momentum, eps, bin_width, levels
        if add is None:
            channel_stats(x, *others)
        else:
            add_channel_stats(x, add, *others)
        return vectors

    def normalise_rectify_encode(self, x: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> Tensor | None:
        """See Kernels."""
        _refuse_float64(x)
        codes = None if code is None else x.new_empty(code.packed_rows(x.shape[0]), x.shape[1], dtype=torch.uint8)
        normalise_rectify_encode(x, vectors, out, codes, code.bits if code else 0)
        return codes

    def decode(self, kept: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> None:
        """See Kernels."""
        _refuse_float64(out)
        decode(kept, vectors, out, code.bits if code else 0)

    def backward(
        self,
        grad: Tensor,
        kept: Tensor,
        vectors: Tensor,
        *,
        code: Code | None,
        constant_stats: bool,
        out: Tensor,
        add: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> Tensor:
        """See Kernels."""
        _refuse_float64(grad)
        sums = vectors.new_empty(4, grad.shape[1])
        backward(grad, kept, vectors, counter, out, sums, add, code.bits if code else 0, constant_stats)
        return sums[:2]

    def pointwise_weight_grad(self, grad: Tensor, kept: Tensor, vectors: Tensor, *, code: Code | None) -> Tensor | None:
        """See Kernels."""
        (_, outputs), (_, channels) = grad.shape, kept.shape
        if outputs * channels > PRODUCT_ELEMENTS or not _has_tensor_cores_for(grad):
            return None
        bits = code.bits if code else 0
        (rows, *_), constants = _product_tiles(grad, channels, bits)
        across = triton.cdiv(channels, constants["CHANNELS"]) * triton.cdiv(outputs, constants["OUTPUTS"])
        steps, programs = _division(triton.cdiv(rows, PRODUCT_ROWS), across, LANE_ROWS)
        partial = vectors.new_empty(programs, outputs, channels)
        pointwise_weight_grad(grad, kept, vectors, partial, bits, steps)
        return partial.sum(0)


def _has_tensor_cores_for(x: Tensor) -> bool:
    """Whether factors of this dtype may be multiplied by tensor cores; strict float32 may not, by their tf32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    may_round = x.dtype != torch.float32 or convolutions.fp32_precision == "tf32"
    if x.device.type == "cuda":
        return may_round and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return may_round and not x.is_meta  # there a~ is counted, which is more


def _refuse_float64(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError(
            "kernels = triton: computes in float32 and is given float64; ask for kernels torch or inductor"
        )


TRITON = TritonKernels()
