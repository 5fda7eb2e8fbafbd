"""The functions in plain PyTorch: the specification that every other backend is held to.

Each is a body that only writes to tensors it is given, and a method that allocates them. The bodies see an activation
as the row blocks whose codes share bytes (Code.row_blocks), so that compiled code reads and writes each element once,
in one loop, in place where out is the input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Code, where_positive
from blpa.kernels import Averages, Norm, compute_dtype

Body = Callable[..., None]


STRIP_ROWS = 64
"""Rows of a strip. Sums over rows are made strip by strip, then over the strips: rounding grows with M / 64, not M, and
a strip stays in a processor's nearest cache while its columns are summed one after another."""

SMALL_ELEMENTS = 1 << 18
"""Of an activation whose temporaries, a megabyte each, stay in a CPU's cache: a call costs what reading it does."""


def strips(x: Tensor) -> list[Tensor]:
    """View [M, C] as whole strips [M // 64, 64, C] and, where rows are left over, [1, M % 64, C]."""
    if x.shape[0] <= STRIP_ROWS:
        return [x.unsqueeze(0)]
    whole = x.shape[0] - x.shape[0] % STRIP_ROWS
    parts = [x[:whole].unflatten(0, (-1, STRIP_ROWS)), x[whole:].unsqueeze(0)]
    return parts if x.shape[0] % STRIP_ROWS else parts[:1]


def total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape; a single one is its own, without a call."""
    return functools.reduce(torch.add, parts)


def column_sum(x: Tensor) -> Tensor:
    """Sum [C] of x [M, C] over M."""
    return total([strip.sum(1).sum(0) for strip in strips(x)])


def channel_stats(
    x: Sequence[Tensor], vectors: Tensor, gamma: Tensor, beta: Tensor, eps: float, code: Code | None
) -> None:
    """Norm of the columns of x, one block [M, C], in one reading of it.

    A strip's mean and sum of squares are taken about its first row, a value of the same size as the others, so nothing
    cancels; strips combine by the parallel axis theorem (Chan, Golub and LeVeque 1983).
    """
    parts = []
    (block,) = x
    for strip in strips(block.to(vectors.dtype)):
        rows, first = strip.shape[1], strip[:, :1]
        centred = strip - first
        offset = centred.mean(1)
        squares = centred.square_().sum(1).addcmul_(offset, offset, value=-rows).clamp_min_(0)
        parts.append((rows, offset.add_(first[:, 0]), squares))
    # The sum is of what means differ by, so that its rounding does not scale with the mean.
    pivot = block[0].to(vectors.dtype)
    mean = pivot + total([(means - pivot).sum(0).mul_(rows) for rows, means, _ in parts]) / block.shape[0]
    about_mean = []
    for rows, means, squares in parts:
        off_mean = means - mean
        about_mean.append(squares.addcmul_(off_mean, off_mean, value=rows).sum(0))
    var = total(about_mean) / block.shape[0]
    torch.stack(Norm.of(mean, var, gamma, beta, eps=eps, code=code), out=vectors)


def normalise_rectify_encode(
    x: Sequence[Tensor], out: Sequence[Tensor] | None, codes: Tensor | None, vectors: Tensor, code: Code | None
) -> None:
    """Activation a, in place of x where out is None, and the packed codes of the blocks x."""
    norm = Norm(*vectors.unbind(0))
    block_codes = []
    for x_block, out_block in zip(x, x if out is None else out, strict=True):
        x_hat = (x_block.to(vectors.dtype) - norm.mean).mul_(norm.rstd)
        y = (norm.gamma * x_hat).add_(norm.beta)
        if code is not None:
            block_codes.append(code.encode(x_hat, y, norm.grid))
        out_block.copy_(y.clamp_min_(0))
    if code is not None and codes is not None:
        code.pack(block_codes, codes)


def recover(kept: Tensor, block: int, rows: int, norm: Norm, code: Code | None) -> tuple[Tensor, Tensor]:
    """x_hat~, and a number of the sign of y, [rows, C] of one block."""
    if code is not None:
        return code.decode(code.unpack(kept, block, rows, norm.rstd.dtype), norm.grid)
    x_hat = (kept.to(norm.rstd.dtype) - norm.mean).mul_(norm.rstd)
    return x_hat, (norm.gamma * x_hat).add_(norm.beta)


def decode(out: Sequence[Tensor], kept: Tensor, vectors: Tensor, code: Code | None) -> None:
    """a~ of the blocks out."""
    norm = Norm(*vectors.unbind(0))
    for k, out_block in enumerate(out):
        x_hat, sign = recover(kept, k, out_block.shape[0], norm, code)
        y = x_hat.mul_(norm.gamma).add_(norm.beta)
        out_block.copy_(where_positive(sign, y).clamp_min_(0))


def backward(
    grad: Sequence[Tensor],
    out: Sequence[Tensor] | None,
    kept: Tensor,
    sums: Tensor,
    vectors: Tensor,
    add: Sequence[Tensor] | None,
    code: Code | None,
    constant_stats: bool,
) -> None:
    """Sums dbeta and dgamma over the blocks grad, and the input gradient of each, in its place where out is None."""
    norm = Norm(*vectors.unbind(0))
    parts = []
    for k, grad_block in enumerate(grad):
        x_hat, sign = recover(kept, k, grad_block.shape[0], norm, code)
        dy = where_positive(sign, grad_block.to(sums.dtype))
        parts.append(torch.stack([column_sum(dy), column_sum(x_hat.mul_(dy))]))
        del x_hat, sign, dy  # before the next block's are made
    sums.copy_(total(parts))
    # A product for each element costs nothing, a quotient would.
    mean_dy, mean_dy_x_hat = sums * (1 / sum(block.shape[0] for block in grad))
    scale = norm.gamma * norm.rstd
    for k, (grad_block, out_block) in enumerate(zip(grad, grad if out is None else out, strict=True)):
        x_hat, sign = recover(kept, k, grad_block.shape[0], norm, code)
        dx = where_positive(sign, grad_block.to(sums.dtype))
        if not constant_stats:
            dx.sub_(mean_dy).sub_(x_hat.mul_(mean_dy_x_hat))
        dx.mul_(scale)
        out_block.copy_(dx if add is None else dx.add_(add[k]))


class RowBlockKernels:
    """A back end made of the bodies above; see kernels.Kernels for the contract.

    Args:
        name: the back end's name.
        fuse: turns a body into one that computes the same without allocating anything as large as an activation. Called
            with the body, a variant (what else about the arguments changes the shape of the computation), and values
            for the body's last parameters. Where rows do not divide evenly it may still need a temporary. None leaves
            the bodies alone.
    """

    def __init__(self, name: str, fuse: Callable[..., Body] | None = None) -> None:
        self.name = name
        self._fuse = fuse

    def __repr__(self) -> str:
        """The same in every process, as the representation of layers that hold this is."""
        return f"<kernels {self.name}>"

    def _blocks(self, x: Tensor, code: Code | None) -> list[Tensor]:
        """What a body is given of [M, C]: its row blocks, or where calls cost more than memory, all of them in one."""
        is_small = self._fuse is None and x.numel() <= SMALL_ELEMENTS
        return [x] if code is None or is_small else code.row_blocks(x)

    def _run(self, body: Body, blocks: list[Tensor], *args: Any, constants: tuple[Any, ...] = ()) -> None:
        if self._fuse is None:
            body(blocks, *args, *constants)
        elif not blocks[0].is_meta:  # there only what is allocated counts, and a fused body allocates nothing
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
        code: Code | None,
        averages: Averages | None = None,
        add: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> Tensor:
        """See Kernels."""
        if add is not None:
            x.add_(add)
        vectors = x.new_empty(len(Norm._fields), x.shape[1], dtype=compute_dtype(x.dtype))
        # As plain tensors: torch.compile makes new code for each size of a Parameter.
        self._run(channel_stats, [x], vectors, gamma.detach(), beta.detach(), constants=(eps, code))
        if averages:
            mean, var = vectors[:2]
            unbiased = var * (x.shape[0] / (x.shape[0] - 1))
            averages.mean.lerp_(mean.to(averages.mean.dtype), averages.momentum)
            averages.var.lerp_(unbiased.to(averages.var.dtype), averages.momentum)
            if averages.batches is not None:
                averages.batches.add_(1)
        return vectors

    def normalise_rectify_encode(self, x: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> Tensor | None:
        """See Kernels."""
        codes = None if code is None else x.new_empty(code.packed_rows(x.shape[0]), x.shape[1], dtype=torch.uint8)
        out_blocks = None if out is x else self._blocks(out, code)
        self._run(normalise_rectify_encode, self._blocks(x, code), out_blocks, codes, vectors, constants=(code,))
        return codes

    def decode(self, kept: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> None:
        """See Kernels."""
        self._run(decode, self._blocks(out, code), kept, vectors, constants=(code,))

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
        sums = vectors.new_empty(2, grad.shape[1])
        out_blocks = None if out is grad else self._blocks(out, code)
        add_blocks = None if add is None else self._blocks(add, code)
        constants = code, constant_stats
        self._run(backward, self._blocks(grad, code), out_blocks, kept, sums, vectors, add_blocks, constants=constants)
        return sums

    def pointwise_weight_grad(self, grad: Tensor, kept: Tensor, vectors: Tensor, *, code: Code | None) -> Tensor | None:
        """See Kernels."""
        return None


@functools.cache
def _variant(rows: tuple[int, ...], channels: int, dtype: torch.dtype, absent: tuple[bool, ...]) -> tuple[Any, ...]:
    """What about the arguments changes the computation: above all how each block's rows divide into strips."""
    divisions = [(n == rows[0], n % STRIP_ROWS == 0, n <= STRIP_ROWS, min(n, 2)) for n in rows]
    return dtype, channels == 1, absent, *divisions


REFERENCE = RowBlockKernels("torch")
