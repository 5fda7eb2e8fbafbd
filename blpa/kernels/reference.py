"""The functions in plain PyTorch, backend `torch`: the specification of every other backend.

Each function is a body, which only writes to its arguments, and a method, which allocates them. A body gets an
activation as the row blocks whose codes share bytes (Codec.row_blocks), so that compiled code reads and writes each
element once, in one loop. It works in place where out is None. kernels/__init__.py has the formulas.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Codec, where_positive
from blpa.kernels import Norm, RunningStats, compute_dtype

Body = Callable[..., None]


STRIP_ROWS = 64
"""Rows of a strip. Rows are summed within strips, then over strips: rounding error grows with M / 64, not M, and the
first-level cache holds a strip."""

SMALL_ELEMENTS = 1 << 18
"""Elements of an activation whose temporaries, a megabyte each, fit in a CPU's cache: blocks would only add calls."""


def strips(x: Tensor) -> list[Tensor]:
    """View [M, C] as whole strips [M // 64, 64, C] and, if rows remain, [1, M % 64, C]."""
    if x.shape[0] <= STRIP_ROWS:
        return [x.unsqueeze(0)]
    whole = x.shape[0] - x.shape[0] % STRIP_ROWS
    parts = [x[:whole].unflatten(0, (-1, STRIP_ROWS)), x[whole:].unsqueeze(0)]
    return parts if x.shape[0] % STRIP_ROWS else parts[:1]


def total(parts: Sequence[Tensor]) -> Tensor:
    """Add tensors of one shape; a single tensor is returned as it is."""
    return functools.reduce(torch.add, parts)


def column_sum(x: Tensor) -> Tensor:
    """Sum x [M, C] over M."""
    return total([strip.sum(1).sum(0) for strip in strips(x)])


def channel_stats(
    x: Sequence[Tensor], vectors: Tensor, gamma: Tensor, beta: Tensor, eps: float, codec: Codec | None
) -> None:
    """Compute the Norm of x, one block [M, C], in one pass over it.

    A strip's mean and sum of squares are about its first row, a typical value, so nothing cancels. Strips are combined
    by the parallel axis theorem (Chan, Golub and LeVeque 1983).
    """
    parts = []
    (block,) = x
    for strip in strips(block.to(vectors.dtype)):
        rows, first = strip.shape[1], strip[:, :1]
        centred = strip - first
        offset = centred.mean(1)
        squares = torch.addcmul(centred.square_().sum(1), offset, offset, value=-rows).clamp_min_(0)
        parts.append((rows, offset.add_(first[:, 0]), squares))
    # Sum the differences from a pivot, so that rounding error does not grow with the mean.
    pivot = block[0].to(vectors.dtype)
    mean = pivot + total([(means - pivot).sum(0).mul_(rows) for rows, means, _ in parts]) / block.shape[0]
    about_mean = []
    for rows, means, squares in parts:
        off_mean = means - mean
        about_mean.append(torch.addcmul(squares, off_mean, off_mean, value=rows).sum(0))
    var = total(about_mean) / block.shape[0]
    torch.stack(Norm.of(mean, var, gamma, beta, eps=eps, codec=codec), out=vectors)


def normalise_rectify_encode(
    x: Sequence[Tensor], out: Sequence[Tensor] | None, codes: Tensor | None, vectors: Tensor, codec: Codec | None
) -> None:
    """Write a to out, or over x where out is None, and the packed codes of the blocks x to codes."""
    norm = Norm(*vectors.unbind(0))
    block_codes = []
    for x_block, out_block in zip(x, x if out is None else out, strict=True):
        x_hat = (x_block.to(vectors.dtype) - norm.mean).mul_(norm.rstd)
        y = (norm.gamma * x_hat).add_(norm.beta)
        if codec is not None:
            block_codes.append(codec.encode(x_hat, y, norm.grid))
        out_block.copy_(y.clamp_min_(0))
    if codec is not None and codes is not None:
        codec.pack(block_codes, codes)


def recover(saved: Tensor, block: int, rows: int, norm: Norm, codec: Codec | None) -> tuple[Tensor, Tensor]:
    """Decode x_hat~ [rows, C] of one block, and numbers [rows, C] with the sign of y."""
    if codec is not None:
        return codec.decode(codec.unpack(saved, block, rows, norm.rstd.dtype), norm.grid)
    x_hat = (saved.to(norm.rstd.dtype) - norm.mean).mul_(norm.rstd)
    return x_hat, (norm.gamma * x_hat).add_(norm.beta)


def decode(out: Sequence[Tensor], saved: Tensor, vectors: Tensor, codec: Codec | None) -> None:
    """Write a~ to the blocks out."""
    norm = Norm(*vectors.unbind(0))
    for k, out_block in enumerate(out):
        x_hat, sign = recover(saved, k, out_block.shape[0], norm, codec)
        y = x_hat.mul_(norm.gamma).add_(norm.beta)
        out_block.copy_(where_positive(sign, y).clamp_min_(0))


def gradient_sums(grad: Sequence[Tensor], saved: Tensor, sums: Tensor, vectors: Tensor, codec: Codec | None) -> None:
    """Write dbeta and dgamma to sums [2, C]."""
    norm = Norm(*vectors.unbind(0))
    parts = []
    for k, grad_block in enumerate(grad):
        x_hat, sign = recover(saved, k, grad_block.shape[0], norm, codec)
        dy = where_positive(sign, grad_block.to(sums.dtype))
        parts.append(torch.stack([column_sum(dy), column_sum(x_hat.mul_(dy))]))
        del x_hat, sign, dy  # before the next block allocates its own
    sums.copy_(total(parts))


def input_grad(
    grad: Sequence[Tensor],
    out: Sequence[Tensor] | None,
    saved: Tensor,
    means: Tensor,
    vectors: Tensor,
    add: Sequence[Tensor] | None,
    codec: Codec | None,
    constant_stats: bool,
) -> None:
    """Write dX to out, or over grad where out is None, from the means of dY and dY x_hat~ [2, C]."""
    norm = Norm(*vectors.unbind(0))
    mean_dy, mean_dy_x_hat = means
    scale = norm.gamma * norm.rstd
    for k, (grad_block, out_block) in enumerate(zip(grad, grad if out is None else out, strict=True)):
        x_hat, sign = recover(saved, k, grad_block.shape[0], norm, codec)
        dx = where_positive(sign, grad_block.to(means.dtype))
        if not constant_stats:
            dx.sub_(mean_dy).sub_(x_hat.mul_(mean_dy_x_hat))
        dx.mul_(scale)
        out_block.copy_(dx if add is None else dx.add_(add[k]))


def backward(
    grad: Sequence[Tensor],
    out: Sequence[Tensor] | None,
    saved: Tensor,
    sums: Tensor,
    vectors: Tensor,
    add: Sequence[Tensor] | None,
    codec: Codec | None,
    constant_stats: bool,
) -> None:
    """Do both; the means are over the rows of grad."""
    gradient_sums(grad, saved, sums, vectors, codec)
    # Multiply by 1 / M: a division per element would cost time.
    means = sums * (1 / sum(block.shape[0] for block in grad))
    input_grad(grad, out, saved, means, vectors, add, codec, constant_stats)


class RowBlockKernels:
    """A backend made of the bodies above; see kernels.Kernels for the contract.

    Args:
        name: the backend's name.
        fuse: called with a body, a variant (see _variant) and values of the body's last parameters; returns a function
            that computes the same without allocating activation-sized tensors, except perhaps one where rows do not
            divide evenly. None runs the bodies eagerly.
    """

    def __init__(self, name: str, fuse: Callable[..., Body] | None = None) -> None:
        self.name = name
        self._fuse = fuse

    def __repr__(self) -> str:
        """Return the same text in every process, for the text of layers that contain this."""
        return f"<kernels {self.name}>"

    def _blocks(self, x: Tensor, codec: Codec | None) -> list[Tensor]:
        """Split [M, C] into row blocks; not without a codec, nor if small and eager: calls cost more than memory."""
        is_small = self._fuse is None and x.numel() <= SMALL_ELEMENTS
        return [x] if codec is None or is_small else codec.row_blocks(x)

    def _run(self, body: Body, blocks: list[Tensor], *args: Any, constants: tuple[Any, ...] = ()) -> None:
        if self._fuse is None or torch.compiler.is_compiling():  # then what surrounds the body is compiled with it
            body(blocks, *args, *constants)
        elif not blocks[0].is_meta:  # on meta only allocations count, and a fused body has none
            rows = tuple(block.shape[0] for block in blocks)
            absent = tuple(arg is None for arg in args)
            variant = _variant(rows, blocks[0].shape[1], blocks[0].dtype, absent)
            self._fuse(body, variant, *constants)(blocks, *args)

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
        if add is not None:
            x.add_(add)
        vectors = x.new_empty(len(Norm._fields), x.shape[1], dtype=compute_dtype(x.dtype))
        # Detached: torch.compile would compile again for each size of a Parameter. It also asks whether x is a leaf,
        # which PyTorch refuses to say of a view of a sum that was just made in place.
        self._run(channel_stats, [x.detach()], vectors, gamma.detach(), beta.detach(), constants=(eps, codec))
        if running_stats:
            mean, var = vectors[:2]
            running_stats.update(mean, var, x.shape[0])
        return vectors

    def normalise_rectify_encode(
        self, x: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor
    ) -> Tensor | None:
        """See Kernels."""
        codes = None if codec is None else x.new_empty(codec.packed_rows(x.shape[0]), x.shape[1], dtype=torch.uint8)
        out_blocks = None if out is x else self._blocks(out, codec)
        self._run(normalise_rectify_encode, self._blocks(x, codec), out_blocks, codes, vectors, constants=(codec,))
        return codes

    def decode(self, saved: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor) -> None:
        """See Kernels."""
        self._run(decode, self._blocks(out, codec), saved, vectors, constants=(codec,))

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
        sums = vectors.new_empty(2, grad.shape[1])
        grad_blocks = self._blocks(grad, codec)
        out_blocks = None if out is grad else self._blocks(out, codec)
        add_blocks = None if add is None else self._blocks(add, codec)
        constants = codec, constant_stats
        if means is None:
            self._run(backward, grad_blocks, out_blocks, saved, sums, vectors, add_blocks, constants=constants)
        else:
            self._run(gradient_sums, grad_blocks, saved, sums, vectors, constants=(codec,))
            self._run(input_grad, grad_blocks, out_blocks, saved, means(sums), vectors, add_blocks, constants=constants)
        return sums

    def pointwise_weight_grad(
        self, grad: Tensor, saved: Tensor, vectors: Tensor, *, codec: Codec | None
    ) -> Tensor | None:
        """See Kernels."""
        return None


@functools.cache
def _variant(rows: tuple[int, ...], channels: int, dtype: torch.dtype, absent: tuple[bool, ...]) -> tuple[Any, ...]:
    """Return the properties of the arguments that change the computation, such as how rows divide into strips."""
    divisions = [(n == rows[0], n % STRIP_ROWS == 0, n <= STRIP_ROWS, min(n, 2)) for n in rows]
    return dtype, channels == 1, absent, *divisions


REFERENCE = RowBlockKernels("torch")
