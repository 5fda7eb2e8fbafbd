"""The functions for activations of any layout, in plain PyTorch: the specification for networks in general.

A tensor is viewed as [outer, C, inner] around its channel dimension (N C H W: outer N, inner H W, in either memory
format; tokens: outer all rows, inner 1), and as rows [R, S, C], R being outer or inner, whichever packs with less
waste. Vectors [C] broadcast over it, and codes of different rows share a byte (codec.py).

    channel_stats      mean, variance, low and high of each channel of z
    encode             code of z, with the sign of y
    decode             f(y~)
    elementwise_grad   dY = f'(y~) dA
    norm_grad          dX, dgamma, dbeta of batch and group norm
    layer_norm_grad    the same of layer norm

where z = (x - centre) scale is a normalised activation, or x itself, and y = gamma z + beta. kernels/reference.py does
the same for one BN-ReLU-conv at a time, fused and for matrices [M, C]; codec and codes are the same.

A function works through a tensor in parts, so its temporaries take a few times PART_BYTES and not the tensor's size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blpa.codec import Codec, Grid, where_positive
from blpa.kernels import compute_dtype

PART_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of one temporary: a CPU's cache holds a few; on a GPU a kernel of 64 MiB hides the time of its launch."""


class Elementwise(NamedTuple):
    """An elementwise function a = f(y) and its derivative, both PyTorch's own.

    Args:
        name: relu, leaky_relu, hardtanh, silu, gelu or hardswish.
        options: arguments after y of torch.nn.functional's function.
    """

    name: str
    options: tuple[Any, ...] = ()

    @property
    def is_smooth(self) -> bool:
        """Whether the derivative depends on more than the sign of y, so that it is approximate at y~."""
        return self.name in ("silu", "gelu", "hardswish")

    def __call__(self, y: Tensor) -> Tensor:
        """Compute f(y)."""
        if self.name == "gelu":
            return torch.nn.functional.gelu(y, approximate=self.options[0])
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
        elif self.name == "gelu":
            result = aten.gelu_backward(grad, y, approximate=self.options[0])
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


class Stats(NamedTuple):
    """Statistics of each channel, [C] each, in the compute dtype."""

    mean: Tensor
    var: Tensor
    """Biased variance."""
    low: Tensor
    high: Tensor

    def of_normalised(self, centre: Tensor, scale: Tensor) -> "Stats":
        """Return the statistics of (x - centre) scale, scale > 0."""
        if scale.is_meta:
            return self
        low, high = (self.low - centre) * scale, (self.high - centre) * scale
        return Stats((self.mean - centre) * scale, self.var * scale.square(), low, high)


def rows_of(x: Tensor, channel: int, codes_per_byte: int) -> Tensor:
    """View x as [R, S, C]; copied if its memory allows no such view.

    Args:
        x: of any shape.
        channel: dimension of the channels.
        codes_per_byte: decides which of outer and inner is R.
    """
    channel %= x.dim()
    outer, inner = x.shape[:channel].numel(), x.shape[channel + 1 :].numel()
    matrix = x.reshape(outer, x.shape[channel], inner).transpose(1, 2)
    return matrix if outer_first(outer, inner, codes_per_byte) else matrix.transpose(0, 1)


def outer_first(outer: int, inner: int, codes_per_byte: int) -> bool:
    """Return whether R is the outer dimension: unless the inner one packs with less waste."""

    def waste(rows: int) -> float:
        return -rows % codes_per_byte / rows

    return waste(outer) <= waste(inner)


Place = tuple[slice, slice]
"""Some rows and columns of [R, S, C]."""


class Part(NamedTuple):
    """Places that share bytes: that of block k has the k-th bits of each byte."""

    packed: Place
    blocks: list[Place]


def parts(x: Tensor, codec: Codec | None) -> Iterator[Part]:
    """Split x [R, S, C] into parts of about PART_BYTES; none on the meta device, where nothing is computed.

    Args:
        x: [R, S, C].
        codec: whose rows share bytes; without one every row is by itself.
    """
    if x.is_meta:
        return
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


def channel_stats(x: Tensor, centre: Tensor | None = None, scale: Tensor | None = None) -> Stats:
    """Compute the statistics of each channel of z.

    Parts are combined by the parallel axis theorem (Chan, Golub and LeVeque 1983).

    Args:
        x: [R, S, C].
        centre: broadcasts to x; None is 0.
        scale: broadcasts to x; None is 1.
    """
    done = 0
    mean, squares, low, high = x.new_zeros(4, x.shape[2], dtype=compute_dtype(x.dtype)).unbind(0)
    for part in parts(x, None):
        (place,) = part.blocks
        z = normalised(x, place, centre, scale)
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
    return Stats(mean, squares / max(done, 1), low, high)


def vectors_of(stats: Stats, gamma: Tensor | None, beta: Tensor | None, codec: Codec | None) -> Tensor:
    """Place the grid of each channel: about z's mean, in its standard deviations or over its range.

    Without gamma and beta y is z, and a rectified channel gets the grid for it.

    Args:
        stats: of z.
        gamma: scale [C], of either sign or zero; None is 1.
        beta: shift [C]; None is 0.
        codec: None makes no grid.

    Returns:
        Vectors [7, C].
    """
    mean, var, low, high = stats
    if mean.is_meta:
        return mean.new_empty(len(Vectors._fields), mean.shape[0])
    is_input = gamma is None and beta is None
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    beta = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    floor = torch.full_like(mean, -torch.inf)
    if codec is None:
        return torch.stack(Vectors(*(torch.zeros_like(mean),) * 4, gamma, beta, floor))
    deviation = var.sqrt().clamp_min_(torch.finfo(mean.dtype).tiny ** 0.5)
    # t = (z - mean) / deviation is standardised, and y = (gamma deviation) t + (gamma mean + beta).
    scale, shift = gamma * deviation, gamma * mean + beta
    # y of a channel whose gamma is 0 has one sign, which must not take codes from z: all of them mean that sign.
    is_flat, flat_zero = scale == 0, torch.where(shift > 0, 0.0, float(codec.levels))
    shift = torch.where(is_flat, torch.where(shift > 0, 1.0, -1.0), shift)
    if codec.clip == "range":
        grid = codec.grid_of_range(scale, shift, (low - mean) / deviation, (high - mean) / deviation)
    else:
        grid = codec.grid(scale, shift)
    frac, zero, width = grid.frac, torch.where(is_flat, flat_zero, grid.zero), grid.bin_width * deviation
    if is_input:
        rectified = codec.rectified_grid(high, (var + mean.square()).sqrt_())
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


def encode(
    x: Tensor,
    y: Tensor,
    vectors: Tensor,
    codec: Codec | None,
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Encode z = (x - centre) scale, with the sign of y.

    Args:
        x: [R, S, C].
        y: [R, S, C]; may be x.
        vectors: Vectors [7, C].
        codec: None saves z and y themselves.
        centre: broadcasts to x; None is 0.
        scale: broadcasts to x; None is 1.

    Returns:
        Packed codes, uint8 [codec.packed_rows(R), S, C]; without a codec z and y [2, R, S, C] in the compute dtype.
    """
    if codec is None:
        exact = torch.empty((2, *x.shape), dtype=vectors.dtype, device=x.device)
        for part in parts(x, None):
            (place,) = part.blocks
            exact[0][place] = normalised(x, place, centre, scale)
            exact[1][place] = y[place]
        return exact
    frac, zero, width, mean, *_ = vectors
    grid = Grid(width.reciprocal(), width, frac, zero)
    packed = torch.empty_like(x[: codec.packed_rows(x.shape[0])], dtype=torch.uint8)
    for part in parts(x, codec):
        codes = [
            codec.encode(normalised(x, place, centre, scale) - mean, y[place].to(vectors.dtype), grid)
            for place in part.blocks
        ]
        codec.pack(codes, packed[part.packed])
    return packed


def decoded(x: Tensor, saved: Tensor, vectors: Tensor, codec: Codec | None) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Decode part by part.

    Args:
        x: [R, S, C], for its shape alone.
        saved: from `encode`; so are the others.
        vectors: Vectors [7, C].
        codec: of the codes.

    Yields:
        Places, and their z~ and y~, which the caller may overwrite; y~ > 0 exactly where y > 0.
    """
    frac, zero, width, mean, gamma, beta, floor = vectors
    grid = Grid(width, width, frac, zero)
    for part in parts(x, codec):
        if codec is None:
            (place,) = part.blocks
            yield place, saved[0][place].clone(), saved[1][place].clone()
            continue
        for k, place in enumerate(part.blocks):
            codes = codec.unpack(saved[part.packed], k, place[0].stop - place[0].start, vectors.dtype)
            z, sign = codec.decode(codes, grid)
            z.add_(mean)
            y = (z * gamma).add_(beta)
            # The middle of an outermost bin may have the other sign, if the sign changes beyond the range.
            positive = where_positive(sign, y.clamp_min(torch.finfo(y.dtype).tiny))
            y = positive.add_(where_positive(sign.neg_(), y.clamp_max_(0)))
            yield place, z, torch.maximum(y, floor)


def decode(saved: Tensor, vectors: Tensor, codec: Codec | None, function: Elementwise | None, out: Tensor) -> None:
    """Write f(y~) to out [R, S, C]; y~ without a function. The other arguments are as in `decoded`."""
    for place, _, y in decoded(out, saved, vectors, codec):
        out[place] = y if function is None else function(y)


def elementwise_grad(
    grad: Tensor, saved: Tensor, vectors: Tensor, codec: Codec | None, function: Elementwise, out: Tensor
) -> None:
    """Write dY = f'(y~) dA to out [R, S, C], from grad = dA. The other arguments are as in `decoded`."""
    for place, _, y in decoded(grad, saved, vectors, codec):
        out[place] = function.grad(grad[place].to(y.dtype), y)


def norm_grad(
    grad: Tensor,
    saved: Tensor,
    vectors: Tensor,
    codec: Codec | None,
    scale: Tensor,
    out: Tensor | None,
    *,
    constant_stats: bool,
    groups: int | None = None,
    pixels: int = 1,
) -> tuple[Tensor, Tensor]:
    """Write dX of a batch norm or group norm to `out`, and return dgamma and dbeta.

    dX = gamma scale (dY - mean(dY) - z~ mean(dY z~)) of batch norm; in a group norm gamma stands inside the means.

    Args:
        grad: dY [R, S, C].
        saved: from `encode`; so are the next two.
        vectors: Vectors [7, C].
        codec: of the codes.
        scale: 1 / deviation, as in `encode`.
        out: [R, S, C]; None where dX is not wanted.
        constant_stats: the statistics do not depend on x, so dX = gamma scale dY.
        groups: of channels, in a group norm, whose statistics are those of one sample.
        pixels: in a group norm, the dimension that is not the samples', 0 or 1; there `scale` has size 1.

    Returns:
        dgamma and dbeta [C], in the compute dtype.
    """
    gamma = Vectors(*vectors).gamma
    if grad.is_meta:
        return torch.empty_like(gamma), torch.empty_like(gamma)
    if groups is None:
        sums = vectors.new_zeros(2, grad.shape[2])
        for place, z, _ in decoded(grad, saved, vectors, codec):
            dy = grad[place].to(vectors.dtype)
            sums[0] += dy.sum((0, 1))
            sums[1] += z.mul_(dy).sum((0, 1))
        dbeta, dgamma = sums.unbind(0)
        count = grad.shape[0] * grad.shape[1]
        mean_dy, mean_dy_z = gamma * dbeta / count, gamma * dgamma / count
    else:
        sums = vectors.new_zeros(2, *scale.shape)
        for place, z, _ in decoded(grad, saved, vectors, codec):
            dy = grad[place].to(vectors.dtype)
            of_place(sums[0], place).add_(dy.sum(pixels, keepdim=True))
            of_place(sums[1], place).add_(z.mul_(dy).sum(pixels, keepdim=True))
        dbeta, dgamma = sums.sum((1, 2))
        count = grad.shape[pixels] * grad.shape[2] // groups
        of_groups = (sums * gamma).unflatten(-1, (groups, -1)).sum(-1, keepdim=True) / count
        mean_dy, mean_dy_z = of_groups.expand(*of_groups.shape[:-1], grad.shape[2] // groups).flatten(-2).unbind(0)
    if out is None:
        return dgamma, dbeta
    for place, z, _ in decoded(grad, saved, vectors, codec):
        dx = grad[place].to(vectors.dtype) * gamma
        if not constant_stats:
            dx = dx.sub_(of_place(mean_dy, place)).sub_(z.mul_(of_place(mean_dy_z, place)))
        out[place] = dx.mul_(of_place(scale, place))
    return dgamma, dbeta


def layer_norm_grad(
    grad: Tensor,
    saved: Tensor,
    vectors: Tensor,
    codec: Codec | None,
    scale: Tensor,
    out: Tensor | None,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """Write dX of a layer norm over C to `out`, and return dgamma and dbeta.

    dU = gamma dY, dX = scale (dU - mean(dU) - z~ mean(dU z~)), means over C

    Args:
        grad: dY [R, 1, C].
        saved: from `encode`; so are the next two.
        vectors: Vectors [7, C].
        codec: of the codes.
        scale: 1 / deviation of each row [R, 1, 1].
        out: [R, 1, C]; None where dX is not wanted.
        centred: false for a root mean square norm, whose dX has no mean(dU).

    Returns:
        dgamma and dbeta [C], in the compute dtype.
    """
    gamma = Vectors(*vectors).gamma
    if grad.is_meta:
        return torch.empty_like(gamma), torch.empty_like(gamma)
    sums = vectors.new_zeros(2, grad.shape[2])
    for place, z, _ in decoded(grad, saved, vectors, codec):
        dy = grad[place].to(vectors.dtype)
        sums[0] += dy.sum((0, 1))
        sums[1] += (z * dy).sum((0, 1))
        if out is not None:
            du = dy * gamma
            dx = du - z * (du * z).mean(-1, keepdim=True)
            if centred:
                dx -= du.mean(-1, keepdim=True)
            out[place] = dx.mul_(scale[place])
    dbeta, dgamma = sums.unbind(0)
    return dgamma, dbeta
