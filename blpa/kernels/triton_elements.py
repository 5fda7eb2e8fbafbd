"""Triton kernels that go through the elements of a tensor of any layout; triton_any_layout.py launches them.

A tile is POSITIONS bytes of codes of CHANNELS channels, and the elements [BLOCKS, POSITIONS, CHANNELS] that share them;
without codes, elements take the place of bytes.
"""

import torch
import triton
import triton.language as tl

from blpa.kernels.any_layout import Vectors

FRAC, ZERO, WIDTH, MEAN, GAMMA, BETA, FLOOR = map(tl.constexpr, range(len(Vectors._fields)))
"""Rows of Vectors [7, C]."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _at_least(x, low):
    return tl.where(x < low, low, x)  # a NaN stays NaN


@triton.jit
def _at_most(x, high):
    return tl.where(x > high, high, x)


@triton.jit
def _place(C, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a program's first position and its channels: a number where there is one, which takes one load."""
    across, program = tl.cdiv(C, CHANNELS), tl.program_id(0)
    column = program % across
    if CHANNELS > 1:
        column = column * CHANNELS + tl.arange(0, CHANNELS)
    return program // across * POSITIONS, column


@triton.jit
def _bytes(first, end, c, C, packed_inner, POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return offsets and mask [POSITIONS, CHANNELS] of bytes (o, i) from position `first` on, and o and i.

    Only the first position's offset needs 64 bits.
    """
    r = tl.arange(0, POSITIONS)[:, None]
    p, o_first = first + r, first // packed_inner
    o = p // packed_inner
    i = p - o * packed_inner
    if CHANNELS_LAST:
        offset = first.to(tl.int64) * C + (r * C + c)
    else:
        offset = o_first.to(tl.int64) * C * packed_inner + (((o - o_first) * C + c) * packed_inner + i)
    return offset, (p < end) & (c < C), o, i


@triton.jit
def _elements(
    first, offset, mask, o, i, c, C, outer, inner, packed_outer, packed_inner,
    BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr,
):  # fmt: skip
    """Return offsets, mask and samples of the elements of bytes: (o + k packed_outer, i) or (o, i + k packed_inner)."""
    k = tl.arange(0, BLOCKS)[:, None, None]
    if OUTER_FIRST:
        offset = offset[None, :, :] + k.to(tl.int64) * (packed_outer.to(tl.int64) * C * inner)
        o = o[None, :, :] + k * packed_outer
        return offset, mask[None, :, :] & (o < outer), o
    else:
        o_first = first // packed_inner
        i = i[None, :, :] + k * packed_inner
        local = (o - o_first)[None, :, :]
        local = (local * inner + i) * C + c if CHANNELS_LAST else (local * C + c) * inner + i
        return o_first.to(tl.int64) * C * inner + local, mask[None, :, :] & (i < inner), o[None, :, :]


@triton.jit
def _tile(
    C, outer, inner, packed_outer, packed_inner,
    BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER_FIRST: tl.constexpr,
):  # fmt: skip
    """Return a program's channels, offsets and mask of its bytes, and offsets, mask and samples of their elements."""
    first, c = _place(C, POSITIONS, CHANNELS)
    byte_offset, byte_mask, o, i = _bytes(
        first, packed_outer * packed_inner, c, C, packed_inner, POSITIONS, CHANNELS_LAST
    )
    offset, mask, o = _elements(
        first, byte_offset, byte_mask, o, i, c, C, outer, inner, packed_outer, packed_inner, BLOCKS, CHANNELS_LAST,
        OUTER_FIRST,
    )  # fmt: skip
    return c, byte_offset, byte_mask, offset, mask, o


@triton.jit
def _vector(vectors, row: tl.constexpr, c, C):
    return tl.load(vectors + row * C + c, mask=c < C, other=0.0)


@triton.jit
def _broadcast(vector, o, c, C, mask, PER_OUTER: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Load from [outer or 1, C or 1]."""
    if PER_OUTER:
        return tl.load(vector + (o.to(tl.int64) * C + c if PER_CHANNEL else o + c * 0), mask=mask, other=0.0)
    elif PER_CHANNEL:
        return _vector(vector, 0, c, C)
    else:
        return tl.load(vector)


@triton.jit
def _normalised(
    x, centre, scale, offset, mask, o, c, C, PER_OUTER: tl.constexpr, PER_CHANNEL: tl.constexpr
):  # fmt: skip
    """Load x and compute z = (x - centre) scale."""
    z = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if centre is not None:
        z = z - _broadcast(centre, o, c, C, mask, PER_OUTER, PER_CHANNEL)
    if scale is not None:
        z = z * _broadcast(scale, o, c, C, mask, PER_OUTER, PER_CHANNEL)
    return z


@triton.jit
def _decoded(
    values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, inner, BITS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Return z~ and y~, as any_layout.values_of, or what was saved without a codec; y~ > 0 exactly where y > 0."""
    if BITS == 0:
        z = tl.load(values + offset, mask=mask, other=0.0)
        y = tl.load(values + outer.to(tl.int64) * C * inner + offset, mask=mask, other=0.0)
    else:
        packed = tl.load(values + byte_offset, mask=byte_mask, other=0).to(tl.int32)
        code = packed[None, :, :] >> (tl.arange(0, BLOCKS)[:, None, None] * BITS)
        code = (code & ((1 << BITS) - 1)).to(tl.float32)
        z = (code + (0.5 - (1 << (BITS - 1))) - _vector(vectors, FRAC, c, C)) * _vector(vectors, WIDTH, c, C)
        z = z + _vector(vectors, MEAN, c, C)
        y = z * _vector(vectors, GAMMA, c, C) + _vector(vectors, BETA, c, C)
        is_positive = code > _vector(vectors, ZERO, c, C) - 0.5
        y = tl.where(is_positive, _at_least(y, TINY), _at_most(y, 0.0))
        y = _at_least(y, _vector(vectors, FLOOR, c, C))
    return z, y


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _function(y, a, b, FUNCTION: tl.constexpr):
    """Compute f(y) with options a and b; gelu's tanh form is y sigmoid(2 u) = y (1 + tanh(u)) / 2."""
    if FUNCTION == "relu":
        return tl.where(y <= 0, 0.0, y)
    elif FUNCTION == "leaky_relu":
        return tl.where(y > 0, y, y * a)
    elif FUNCTION == "hardtanh":
        return _at_most(_at_least(y, a), b)
    elif FUNCTION == "hardswish":
        return y * _at_most(_at_least(y + 3.0, 0.0), 6.0) / 6.0
    elif FUNCTION == "silu":
        return y * _sigmoid(y)
    elif FUNCTION == "gelu_tanh":
        return y * _sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif FUNCTION == "gelu":
        return y * 0.5 * (1.0 + tl.math.erf(y * 0.7071067811865476))
    else:
        return y


@triton.jit
def _gradient(grad, y, a, FUNCTION: tl.constexpr):
    """Compute f'(y) grad; 0 where f is constant, whatever grad is."""
    if FUNCTION == "relu":
        return tl.where(y <= 0, 0.0, grad)
    elif FUNCTION == "leaky_relu":
        return tl.where(y > 0, grad, grad * a)
    elif FUNCTION == "hardswish":
        return tl.where(y <= -3.0, 0.0, tl.where(y < 3.0, grad * (y / 3.0 + 0.5), grad))
    elif FUNCTION == "silu":
        s = _sigmoid(y)
        return grad * s * (1.0 + y * (1.0 - s))
    elif FUNCTION == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        return grad * s * (1.0 + y * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * y * y)))
    else:
        tl.static_assert(FUNCTION == "gelu")
        density = 0.3989422804014327 * tl.exp(-0.5 * y * y)
        return grad * (0.5 * (1.0 + tl.math.erf(y * 0.7071067811865476)) + y * density)


@triton.jit
def _store_codes(
    values, vectors, z, y, byte_offset, byte_mask, mask, c, C, BITS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Encode z [BLOCKS, POSITIONS, CHANNELS] with the sign of y, and store the bytes."""
    zero, width = _vector(vectors, ZERO, c, C), _vector(vectors, WIDTH, c, C)
    is_negative = y <= 0  # a NaN counts as positive
    lowest = tl.where(is_negative, 0.0, zero)
    highest = tl.where(is_negative, zero - 1.0, (1 << BITS) - 1.0)
    bins = (z - _vector(vectors, MEAN, c, C)) * tl.div_rn(1.0, width) + _vector(vectors, FRAC, c, C)
    code = tl.minimum(tl.maximum(tl.floor(bins) + (1 << (BITS - 1)), lowest), highest)
    code = tl.where(mask & (bins == bins), code, 0.0).to(tl.int32) << (tl.arange(0, BLOCKS)[:, None, None] * BITS)
    tl.store(values + byte_offset, tl.sum(code, axis=0).to(tl.uint8), mask=byte_mask)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _encode(
    x, y, centre, scale, values, vectors, C, outer, inner, packed_outer, packed_inner,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, PER_OUTER: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    c, byte_offset, byte_mask, offset, mask, o = _tile(
        C, outer, inner, packed_outer, packed_inner, BLOCKS, POSITIONS, CHANNELS, CHANNELS_LAST, OUTER_FIRST
    )
    z = _normalised(x, centre, scale, offset, mask, o, c, C, PER_OUTER, PER_CHANNEL)
    y_value = tl.load((x if y is None else y) + offset, mask=mask, other=0.0).to(tl.float32)
    if BITS == 0:
        tl.store(values + offset, z, mask=mask)
        tl.store(values + outer.to(tl.int64) * C * inner + offset, y_value, mask=mask)
    else:
        _store_codes(values, vectors, z, y_value, byte_offset, byte_mask, mask, c, C, BITS, BLOCKS)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _normalise_encode(
    x, out, mean, rstd, values, vectors, C, outer, inner, packed_outer, packed_inner,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, RECTIFIED: tl.constexpr,
):  # fmt: skip
    """Write y or relu(y) to out, which may be x: a program reads all its elements before it writes them."""
    c, byte_offset, byte_mask, offset, mask, _ = _tile(
        C, outer, inner, packed_outer, packed_inner, BLOCKS, POSITIONS, CHANNELS, CHANNELS_LAST, OUTER_FIRST
    )
    centre, scale = _vector(mean, 0, c, C), _vector(rstd, 0, c, C)
    slope = scale * _vector(vectors, GAMMA, c, C)
    x_value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    y = (x_value * slope + (_vector(vectors, BETA, c, C) - centre * slope)).to(out.dtype.element_ty)
    z = (x_value - centre) * scale
    if BITS == 0:
        tl.store(values + offset, z, mask=mask)
        tl.store(values + outer.to(tl.int64) * C * inner + offset, y.to(tl.float32), mask=mask)
    else:
        _store_codes(values, vectors, z, y.to(tl.float32), byte_offset, byte_mask, mask, c, C, BITS, BLOCKS)
    tl.store(out + offset, tl.where(y < 0, 0.0, y).to(out.dtype.element_ty) if RECTIFIED else y, mask=mask)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _decode(
    out, values, vectors, C, outer, inner, packed_outer, packed_inner, a, b,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    c, byte_offset, byte_mask, offset, mask, _ = _tile(
        C, outer, inner, packed_outer, packed_inner, BLOCKS, POSITIONS, CHANNELS, CHANNELS_LAST, OUTER_FIRST
    )
    _, y = _decoded(values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, inner, BITS, BLOCKS)
    tl.store(out + offset, _function(y, a, b, FUNCTION).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _elementwise_grad(
    grad, out, values, vectors, C, outer, inner, packed_outer, packed_inner, a,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    c, byte_offset, byte_mask, offset, mask, _ = _tile(
        C, outer, inner, packed_outer, packed_inner, BLOCKS, POSITIONS, CHANNELS, CHANNELS_LAST, OUTER_FIRST
    )
    _, y = _decoded(values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, inner, BITS, BLOCKS)
    da = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, _gradient(da, y, a, FUNCTION).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "packed_outer"])
def _input_grad(
    grad, out, values, vectors, scale, means, apart, C, outer, inner, packed_outer, packed_inner,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER_FIRST: tl.constexpr, PER_OUTER: tl.constexpr, PER_CHANNEL: tl.constexpr,
    RECTIFIED: tl.constexpr,
):  # fmt: skip
    """Write dX to out; the second of the means is `apart` from the first."""
    c, byte_offset, byte_mask, offset, mask, o = _tile(
        C, outer, inner, packed_outer, packed_inner, BLOCKS, POSITIONS, CHANNELS, CHANNELS_LAST, OUTER_FIRST
    )
    dy = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    if means is None:
        dx = dy * _vector(vectors, GAMMA, c, C)
    else:
        z, y = _decoded(values, vectors, byte_offset, byte_mask, offset, mask, c, C, outer, inner, BITS, BLOCKS)
        dy = tl.where(y <= 0, 0.0, dy) if RECTIFIED else dy
        dx = dy * _vector(vectors, GAMMA, c, C)
        dx = dx - _broadcast(means, o, c, C, mask, PER_OUTER, PER_CHANNEL)
        dx = dx - z * _broadcast(means + apart, o, c, C, mask, PER_OUTER, PER_CHANNEL)
    dx = dx * _broadcast(scale, o, c, C, mask, PER_OUTER, PER_CHANNEL)
    tl.store(out + offset, dx.to(out.dtype.element_ty), mask=mask)
