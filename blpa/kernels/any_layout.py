"""The functions for activations of any layout, in plain PyTorch: the specification for networks in general.

A tensor [outer, C, inner] around its channel dimension (N C H W: outer N, inner H W; tokens: outer all rows, inner 1)
lies densely in memory, in that order or with the channels last (order.py). Codes that share a byte are of different
samples or, where that packs with less waste, of different pixels: of rows [R, S, C], R being outer or inner.

    channel_stats      mean, variance, low and high of each channel of z
    grid_vectors       the grid of each channel
    batch_norm_vectors both, for a batch norm in training, and its running averages
    encode             code of z, with the sign of y
    normalise_encode   y, or relu(y), of a batch norm, and the code of z
    decode             f(y~)
    elementwise_grad   dY = f'(y~) dA
    gradient_sums      sum dY and sum dY z~ of each channel, for the gradients of a norm
    row_means          mean(gamma dY) and mean(gamma dY z~) of each row, for that of a layer norm
    input_grad         dX = scale (gamma dY - mean0 - z~ mean1) of a norm

where z = (x - centre) scale is a normalised activation, or x itself, and y = gamma z + beta. A `rectified` norm has its
ReLU in it: its gradients take dA for dY, which is dA where y > 0, else 0. Without a codec (bits = 0) z and y themselves
are saved. reference.py does the same for one BN-ReLU-conv at a time, fused and for matrices [M, C];
codec and codes are the same. library.py makes operations of these functions, which kernels for a device may replace.

A function works through a tensor in parts, so its temporaries take a few times PART_BYTES and not the tensor's size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from blpa.codec import Codec, Grid, where_positive
from blpa.kernels import RunningStats, compute_dtype
from blpa.kernels.order import Order

PART_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of one temporary: a CPU's cache holds a few; on a GPU a kernel of 64 MiB hides the time of its launch."""


def largest_rounded_to_zero(dtype: torch.dtype) -> float:
    """Return the largest positive number that a 16-bit dtype rounds to 0: half of its least one; else 0."""
    return {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}.get(dtype, 0.0)


class Elementwise(NamedTuple):
    """An elementwise function a = f(y) and its derivative, both PyTorch's own.

    Args:
        name: relu, leaky_relu, hardtanh, silu, gelu, gelu_tanh (its approximation) or hardswish.
        options: numbers after y in torch.nn.functional's function.
    """

    name: str
    options: tuple[float, ...] = ()

    @property
    def is_smooth(self) -> bool:
        """Whether the derivative depends on more than the sign of y, so that it is approximate at y~."""
        return self.name in ("silu", "gelu", "gelu_tanh", "hardswish")

    def __call__(self, y: Tensor) -> Tensor:
        """Compute f(y)."""
        if self.name == "gelu_tanh":
            return torch.nn.functional.gelu(y, approximate="tanh")
        function = getattr(torch.nn.functional, self.name)
        result: Tensor = function(y, *self.options)
        return result

    def grad(self, grad: Tensor, y: Tensor) -> Tensor:
        """Compute f'(y) grad."""
        aten = torch.ops.aten
        if self.name == "relu":
            return where_positive(y, grad)
        if self.name == "leaky_relu":
            result: Tensor = aten.leaky_relu_backward(grad, y, self.options[0], False)
        elif self.name == "gelu_tanh":
            result = aten.gelu_backward(grad, y, approximate="tanh")
        else:
            result = getattr(aten, f"{self.name}_backward")(grad, y)
        return result


class Vectors(NamedTuple):
    """What decodes the codes of a tensor, [C] each; passed and saved as one tensor [7, C] in the compute dtype."""

    frac: Tensor
    """Shift of the codec's grid; see codec.Grid for this, the width and zero."""
    zero: Tensor
    width: Tensor
    """Of a bin of z, negative where gamma is."""
    mean: Tensor
    """Mean of z: the grid is about it."""
    gamma: Tensor
    beta: Tensor
    floor: Tensor
    """Lower end of y~; 0 for a rectified tensor, whose code 0 is exactly 0, else minus infinity."""


Place = tuple[slice, slice]
"""Some rows and columns of [R, S, C]."""


class Part(NamedTuple):
    """Places that share bytes: that of block k has the k-th bits of each byte."""

    packed: Place
    blocks: list[Place]


def parts(x: Tensor, codec: Codec | None) -> Iterator[Part]:
    """Split x [R, S, C] into parts of about PART_BYTES.

    Args:
        x: [R, S, C].
        codec: whose rows share bytes; without one every row is by itself.
    """
    rows, columns, channels = x.shape
    per_byte = codec.codes_per_byte if codec else 1
    packed = -(-rows // per_byte)
    part_bytes = PART_BYTES.get(x.device.type, PART_BYTES["cuda"])
    column_bytes = channels * compute_dtype(x.dtype).itemsize * per_byte
    column_step = min(columns, max(1, part_bytes // column_bytes))
    row_step = max(1, part_bytes // (column_bytes * column_step))
    for row in range(0, packed, row_step):
        end = min(row + row_step, packed)
        starts_and_ends = [(k * packed + row, min(k * packed + end, rows)) for k in range(per_byte)]
        for column in range(0, columns, column_step):
            some = slice(column, min(column + column_step, columns))
            blocks = [(slice(first, last), some) for first, last in starts_and_ends if first < last]
            yield Part((slice(row, end), some), blocks)


def of_place(x: Tensor, place: Place) -> Tensor:
    """Slice a tensor that broadcasts to [R, S, C]: vectors [C], or [R or 1, S or 1, C or 1]."""
    if x.dim() == 1:
        return x
    rows, columns = place
    return x[rows if x.shape[0] > 1 else slice(None), columns if x.shape[1] > 1 else slice(None)]


def normalised(x: Tensor, place: Place, centre: Tensor | None, scale: Tensor | None) -> Tensor:
    """Compute z of a part of x [R, S, C], in the compute dtype; x itself without centre and scale."""
    x = x[place].to(compute_dtype(x.dtype))
    if centre is not None:
        x = x - of_place(centre, place)
    return x if scale is None else x * of_place(scale, place)


def channel_stats(x: Tensor, order: Order, centre: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Compute mean, biased variance, low and high of each channel of z.

    Parts are combined by the parallel axis theorem (Chan, Golub and LeVeque 1983).

    Args:
        x: dense, in this order.
        order: of x.
        centre: [outer or 1, C or 1]; None is 0.
        scale: [outer or 1, C or 1]; None is 1.

    Returns:
        [4, C] in the compute dtype.
    """
    rows = order.rows(x, 0)
    centre, scale = (None if vector is None else order.of_rows(vector, 0) for vector in (centre, scale))
    done = 0
    mean, squares, low, high = x.new_zeros(4, order.channels, dtype=compute_dtype(x.dtype)).unbind(0)
    for part in parts(rows, None):
        (place,) = part.blocks
        z = normalised(rows, place, centre, scale)
        count = z.shape[0] * z.shape[1]
        part_var, part_mean = torch.var_mean(z, (0, 1), correction=0)
        part_low, part_high = z.amin((0, 1)), z.amax((0, 1))
        if done:
            delta = part_mean - mean
            mean = mean + delta * (count / (done + count))
            squares = squares + part_var * count + delta.square() * (done * count / (done + count))
            low, high = torch.minimum(low, part_low), torch.maximum(high, part_high)
        else:
            mean, squares, low, high = part_mean, part_var * count, part_low, part_high
        done += count
    return torch.stack((mean, squares / max(done, 1), low, high))


def grid_vectors(
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    codec: Codec | None,
    rounded_to_zero: float = 0.0,
) -> Tensor:
    """Place the grid of each channel: about z's mean, in its standard deviations or over its range.

    Without gamma and beta y is z, and a rectified channel gets the grid for it.

    Args:
        stats: from channel_stats of z [4, C]; of x, where centre and scale are given.
        gamma: scale of y [C], of either sign or zero; None is 1.
        beta: shift of y [C]; None is 0.
        centre: z = (x - centre) scale [C], scale > 0; None if the statistics are those of z.
        scale: see centre.
        codec: None makes no grid.
        rounded_to_zero: y of a channel whose gamma is 0 is 0 for a beta up to this (largest_rounded_to_zero).

    Returns:
        Vectors [7, C].
    """
    mean, var, low, high = stats
    if centre is not None and scale is not None:
        mean, low, high = ((value - centre) * scale for value in (mean, low, high))
        var = var * scale.square()
    is_input = gamma is None and beta is None
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    beta = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    floor = torch.full_like(mean, -torch.inf)
    if codec is None:
        return torch.stack(Vectors(*(torch.zeros_like(mean),) * 4, gamma, beta, floor))
    deviation = _root(var).clamp_min_(torch.finfo(mean.dtype).tiny ** 0.5)
    # t = (z - mean) / deviation is standardised, and y = (gamma deviation) t + (gamma mean + beta).
    slope, shift = gamma * deviation, gamma * mean + beta
    # y of a channel whose gamma is 0 is beta: one sign, which must not take codes from z. All of them mean that sign.
    is_flat, is_positive = gamma == 0, beta > rounded_to_zero
    flat_zero = torch.where(is_positive, 0.0, float(codec.levels))
    shift = torch.where(is_flat, torch.where(is_positive, 1.0, -1.0), shift)
    if codec.clip == "range":
        grid = codec.grid_of_range(slope, shift, (low - mean) / deviation, (high - mean) / deviation)
    else:
        grid = codec.grid(slope, shift)
    frac, zero, width = grid.frac, torch.where(is_flat, flat_zero, grid.zero), grid.bin_width * deviation
    if is_input:
        rectified = codec.rectified_grid(high, _root(var + mean.square()))
        # A channel that starts at 0 was rectified. One above 0 has the better of both grids.
        is_rectified = (low == 0) | ((low > 0) & (rectified.bin_width <= width.abs()))
        frac, zero, width, mean, floor = (
            torch.where(is_rectified, one, other)
            for one, other in (
                (rectified.frac, frac),
                (rectified.zero, zero),
                (rectified.bin_width, width),
                (torch.zeros_like(mean), mean),
                (torch.zeros_like(mean), floor),
            )
        )
    return torch.stack(Vectors(frac, zero, width, mean, gamma, beta, floor))


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
    """Compute the statistics of a batch norm in training, place the grid of its z, and update its averages.

    Args:
        x: dense, in this order, of at least two elements per channel.
        order: of x.
        gamma: scale of y [C].
        beta: shift of y [C].
        running: averages in the compute dtype, updated with the mean and the unbiased variance; None if there are none.
        eps: added to the variance.
        codec: see grid_vectors.
        rounded_to_zero: see grid_vectors.

    Returns:
        Vectors [7, C], the mean [C] and 1 / deviation [C].
    """
    stats = channel_stats(x, order)
    mean, var, *_ = stats
    if running is not None:
        running.update(mean, var, order.outer * order.inner)
    rstd = (var + eps).rsqrt()
    return grid_vectors(stats, gamma, beta, mean, rstd, codec, rounded_to_zero), mean, rstd


def _root(x: Tensor) -> Tensor:
    """Compute a square root, to the nearest number as other kernels do; PyTorch's own of fp32 is not, on a CPU."""
    return x.double().sqrt().to(x.dtype) if x.is_cpu else x.sqrt()


def encode(
    x: Tensor, y: Tensor, vectors: Tensor, order: Order, bits: int, centre: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Encode z = (x - centre) scale, with the sign of y.

    Args:
        x: dense, in this order.
        y: of the same shape and order; may be x.
        vectors: Vectors [7, C].
        order: of x and y.
        bits: of the codes; 0 saves z and y themselves.
        centre: [outer or 1, C or 1]; None is 0.
        scale: [outer or 1, C or 1]; None is 1.

    Returns:
        Packed codes, uint8, in the order order.packed(bits); for 0 bits z and y, one after the other, in this order,
        in the compute dtype. One dimension.
    """
    x_rows, y_rows = order.rows(x, bits), order.rows(y, bits)
    centre, scale = (None if vector is None else order.of_rows(vector, bits) for vector in (centre, scale))
    if not bits:
        exact = vectors.new_empty(2, order.numel)
        z_out, y_out = order.rows(exact[0], 0), order.rows(exact[1], 0)
        for part in parts(x_rows, None):
            (place,) = part.blocks
            z_out[place] = normalised(x_rows, place, centre, scale)
            y_out[place] = y_rows[place]
        return exact.view(-1)
    codec = Codec(bits)
    frac, zero, width, mean, *_ = vectors
    grid = Grid(width.reciprocal(), width, frac, zero)
    values = torch.empty(order.saved_elements(bits), dtype=torch.uint8, device=x.device)
    packed = order.packed_rows(values, bits)
    for part in parts(x_rows, codec):
        codes = [
            codec.encode(normalised(x_rows, place, centre, scale) - mean, y_rows[place].to(vectors.dtype), grid)
            for place in part.blocks
        ]
        codec.pack(codes, packed[part.packed])
    return values


def normalise_encode(
    x: Tensor, vectors: Tensor, order: Order, bits: int, mean: Tensor, rstd: Tensor, rectify: bool, out: Tensor
) -> Tensor:
    """Write y = gamma (x - mean) rstd + beta of a batch norm to out, and encode z = (x - mean) rstd with its sign.

    As PyTorch computes it: y = x (gamma rstd) + (beta - mean (gamma rstd)).

    Args:
        x: dense, in this order.
        vectors: Vectors [7, C].
        order: of x and out.
        bits: of the codes; 0 saves z and y themselves.
        mean: [C] in the compute dtype.
        rstd: 1 / deviation [C] in the compute dtype.
        rectify: write relu(y).
        out: as x; may be x.

    Returns:
        As encode.
    """
    _, _, _, _, gamma, beta, _ = vectors
    slope = rstd * gamma
    shift = beta - mean * slope
    y_out = torch.empty_like(x) if out is x else out  # codes need both
    x_rows, y_rows = order.rows(x, 0), order.rows(y_out, 0)
    for part in parts(x_rows, None):
        (place,) = part.blocks
        y_rows[place] = (x_rows[place].to(slope.dtype) * slope).add_(shift)
    values = encode(x, y_out, vectors, order, bits, mean.unsqueeze(0), rstd.unsqueeze(0))
    if rectify:
        y_out.relu_()
    if out is x:
        out.copy_(y_out)
    return values


def values_of(codes: Tensor, vectors: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Decode codes.

    Args:
        codes: whole numbers [..., C], not packed, in the dtype of the vectors; overwritten.
        vectors: Vectors [7, C].
        bits: of the codes.

    Returns:
        z~ and y~ [..., C]; y~ > 0 exactly where y > 0.
    """
    frac, zero, width, mean, gamma, beta, floor = vectors
    z, sign = Codec(bits).decode(codes, Grid(width, width, frac, zero))
    z.add_(mean)
    y = (z * gamma).add_(beta)
    # The middle of an outermost bin may have the other sign, if the sign changes beyond the range.
    positive = where_positive(sign, y.clamp_min(torch.finfo(y.dtype).tiny))
    y = positive.add_(where_positive(sign.neg_(), y.clamp_max_(0)))
    return z, torch.maximum(y, floor)


def decoded(values: Tensor, vectors: Tensor, order: Order, bits: int) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Decode part by part.

    Args:
        values: from `encode`; so are the others.
        vectors: Vectors [7, C].
        order: of the tensor.
        bits: of the codes.

    Yields:
        Places in rows [R, S, C], and their z~ and y~, which the caller may overwrite; y~ > 0 exactly where y > 0.
    """
    if not bits:
        z_rows, y_rows = (order.rows(exact, 0) for exact in values.view(2, -1))
        for part in parts(z_rows, None):
            (place,) = part.blocks
            yield place, z_rows[place].clone(), y_rows[place].clone()
        return
    codec = Codec(bits)
    packed = order.packed_rows(values, bits)
    rows = order.outer if order.outer_first(bits) else order.inner
    columns = order.inner if order.outer_first(bits) else order.outer
    for part in parts(vectors.new_empty(()).expand(rows, columns, order.channels), codec):
        for k, place in enumerate(part.blocks):
            codes = codec.unpack(packed[part.packed], k, place[0].stop - place[0].start, vectors.dtype)
            yield place, *values_of(codes, vectors, bits)


def decode(values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise | None, out: Tensor) -> None:
    """Write f(y~) to out, dense in this order; y~ without a function. The other arguments are as in `decoded`."""
    out_rows = order.rows(out, bits)
    for place, _, y in decoded(values, vectors, order, bits):
        out_rows[place] = y if function is None else function(y)


def elementwise_grad(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, function: Elementwise, out: Tensor
) -> None:
    """Write dY = f'(y~) dA to out from grad = dA, both dense in this order. The others are as in `decoded`."""
    grad_rows, out_rows = order.rows(grad, bits), order.rows(out, bits)
    for place, _, y in decoded(values, vectors, order, bits):
        out_rows[place] = function.grad(grad_rows[place].to(y.dtype), y)


def gradient_sums(
    grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int, *, per_sample: bool, rectified: bool = False
) -> Tensor:
    """Sum dY and dY z~ of each channel.

    Args:
        grad: dY, dense in this order; dA of a = relu(y), if rectified.
        values: from `encode`; so are the next two.
        vectors: Vectors [7, C].
        order: of grad.
        bits: of the codes.
        per_sample: do not sum over `outer`.
        rectified: see grad.

    Returns:
        [2, outer or 1, C], in the compute dtype.
    """
    grad_rows = order.rows(grad, bits)
    sums = vectors.new_zeros(2, order.outer if per_sample else 1, order.channels)
    of_rows = [order.of_rows(total, bits) for total in sums]
    axes = (1 if order.outer_first(bits) else 0,) if per_sample else (0, 1)
    for place, z, y in decoded(values, vectors, order, bits):
        dy = grad_rows[place].to(vectors.dtype)
        dy = where_positive(y, dy) if rectified else dy
        of_place(of_rows[0], place).add_(dy.sum(axes, keepdim=True))
        of_place(of_rows[1], place).add_(z.mul_(dy).sum(axes, keepdim=True))
    return sums


def row_means(grad: Tensor, values: Tensor, vectors: Tensor, order: Order, bits: int) -> Tensor:
    """Compute mean(gamma dY) and mean(gamma dY z~) over the channels; the arguments are as in gradient_sums, inner 1.

    Returns:
        [2, outer, 1], in the compute dtype.
    """
    gamma = Vectors(*vectors).gamma
    grad_rows = order.rows(grad, bits)
    means = vectors.new_empty(2, order.outer, 1)
    for place, z, _ in decoded(values, vectors, order, bits):
        du = grad_rows[place].to(vectors.dtype) * gamma
        means[0][place[0]] = du.mean(-1)
        means[1][place[0]] = z.mul_(du).mean(-1)
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
    """Write dX = scale (gamma dY - mean0 - z~ mean1) of a norm to out.

    Args:
        grad: dY, dense in this order; dA of a = relu(y), if rectified.
        values: from `encode`; so are the next two.
        vectors: Vectors [7, C].
        order: of grad and out.
        bits: of the codes.
        scale: 1 / deviation [outer or 1, C or 1].
        means: [2, outer or 1, C or 1]; None is 0, if the statistics are constant.
        out: dense in this order.
        rectified: see grad; then there are means.
    """
    gamma = Vectors(*vectors).gamma
    grad_rows, out_rows, scale = order.rows(grad, bits), order.rows(out, bits), order.of_rows(scale, bits)
    if means is None:
        for part in parts(grad_rows, None):
            (place,) = part.blocks
            out_rows[place] = grad_rows[place].to(vectors.dtype).mul(gamma).mul_(of_place(scale, place))
        return
    mean_dy, mean_dy_z = (order.of_rows(mean, bits) for mean in means)
    for place, z, y in decoded(values, vectors, order, bits):
        dy = grad_rows[place].to(vectors.dtype)
        dx = (where_positive(y, dy) if rectified else dy) * gamma
        dx.sub_(of_place(mean_dy, place)).sub_(z.mul_(of_place(mean_dy_z, place)))
        out_rows[place] = dx.mul_(of_place(scale, place))
