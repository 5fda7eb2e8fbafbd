"""The five functions in plain PyTorch: the specification that every other back end is held to.

Each is a body that only writes to tensors it is given, and a method that allocates them. The bodies see an activation
as the row blocks whose codes share bytes (Code.row_blocks), so that compiled code reads and writes each element once,
in one loop, in place where out is the input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blpa.codec import Code
from blpa.kernels import Norm, compute_dtype

Body = Callable[..., None]


STRIP_ROWS = 64
"""Rows of a strip. Sums over rows are made strip by strip, then over the strips: rounding grows with M / 64, not M, and
a strip stays in a processor's nearest cache while its columns are summed one after another."""


def strips(x: Tensor) -> list[Tensor]:
    """View [M, C] as whole strips [M // 64, 64, C] and, where rows are left over, [1, M % 64, C]."""
    if x.shape[0] <= STRIP_ROWS:
        return [x.unsqueeze(0)]
    whole = x.shape[0] - x.shape[0] % STRIP_ROWS
    parts = [x[:whole].unflatten(0, (-1, STRIP_ROWS)), x[whole:].unsqueeze(0)]
    return parts if x.shape[0] % STRIP_ROWS else parts[:1]


def column_sum(x: Tensor) -> Tensor:
    """Sum [C] of x [M, C] over M."""
    return torch.stack([strip.sum(1).sum(0) for strip in strips(x)]).sum(0)


def channel_stats(x: Sequence[Tensor], mean: Tensor, var: Tensor) -> None:
    """Column means and biased variances of x, one block [M, C], in one reading of it.

    A strip's mean and sum of squares are taken about its first row, a value of the same size as the others, so nothing
    cancels; strips combine by the parallel axis theorem (Chan, Golub and LeVeque 1983).
    """
    parts = []
    (block,) = x
    for strip in strips(block.to(mean.dtype)):
        rows, first = strip.shape[1], strip[:, :1]
        centred = strip - first
        offset = centred.sum(1) / rows
        squares = (centred * centred).sum(1) - rows * offset * offset
        parts.append((rows, offset + first[:, 0], squares.clamp_min(0)))
    pivot = block[0].to(
        mean.dtype
    )  # the sum is of what means differ by, so that its rounding does not scale with the mean
    off_pivot = [rows * (means - pivot).sum(0) for rows, means, _ in parts]
    mean.copy_(pivot + torch.stack(off_pivot).sum(0) / block.shape[0])
    about_mean = [(squares + rows * (means - mean).square()).sum(0) for rows, means, squares in parts]
    var.copy_(torch.stack(about_mean).sum(0) / block.shape[0])


def normalise_rectify_encode(
    x: Sequence[Tensor], out: Sequence[Tensor], codes: Tensor | None, norm: Norm, code: Code | None
) -> None:
    """Activation a and the packed codes of the blocks x."""
    block_codes = []
    for x_block, out_block in zip(x, out, strict=True):
        assert norm.mean is not None
        x_hat = (x_block.to(norm.rstd.dtype) - norm.mean) * norm.rstd
        y = norm.gamma * x_hat + norm.beta
        if code is not None and norm.grid is not None:
            block_codes.append(code.encode(x_hat, y, norm.grid))
        out_block.copy_(y.clamp_min(0))
    if code is not None and codes is not None:
        codes.copy_(code.pack(block_codes, codes.shape[0]))


def recover(kept: Tensor, block: int, rows: int, norm: Norm, code: Code | None) -> tuple[Tensor, Tensor]:
    """x_hat~ and relu_mask [rows, C] of one block."""
    if code is not None and norm.grid is not None:
        return code.decode(code.unpack(kept, block, rows), norm.grid)
    assert norm.mean is not None
    x_hat = (kept.to(norm.rstd.dtype) - norm.mean) * norm.rstd
    return x_hat, norm.gamma * x_hat + norm.beta > 0


def decode(out: Sequence[Tensor], kept: Tensor, norm: Norm, code: Code | None) -> None:
    """a~ of the blocks out."""
    for k, out_block in enumerate(out):
        x_hat, relu_mask = recover(kept, k, out_block.shape[0], norm, code)
        out_block.copy_(torch.where(relu_mask, norm.gamma * x_hat + norm.beta, 0).clamp_min(0))


def grad_sums(
    grad: Sequence[Tensor], kept: Tensor, dbeta: Tensor, dgamma: Tensor, norm: Norm, code: Code | None
) -> None:
    """Sums dbeta and dgamma over the blocks grad."""
    sums = []
    for k, grad_block in enumerate(grad):
        x_hat, relu_mask = recover(kept, k, grad_block.shape[0], norm, code)
        if not grad_block.shape[0]:
            continue
        dy = torch.where(relu_mask, grad_block.to(dbeta.dtype), 0)
        sums.append((column_sum(dy), column_sum(dy * x_hat)))
    dbeta.copy_(torch.stack([s for s, _ in sums]).sum(0))
    dgamma.copy_(torch.stack([s for _, s in sums]).sum(0))


def input_grad(
    grad: Sequence[Tensor],
    out: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    mean_dy: Tensor,
    mean_dy_x_hat: Tensor,
    norm: Norm,
    code: Code | None,
) -> None:
    """Input gradient scale (dY - mean(dY) - x_hat~ mean(dY x_hat~)) of the blocks, scale = gamma rstd."""
    for k, (grad_block, out_block) in enumerate(zip(grad, out, strict=True)):
        x_hat, relu_mask = recover(kept, k, grad_block.shape[0], norm, code)
        dy = torch.where(relu_mask, grad_block.to(scale.dtype), 0)
        out_block.copy_(scale * (dy - mean_dy - x_hat * mean_dy_x_hat))


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

    def _run(self, body: Body, blocks: list[Tensor], *args: Any, constants: tuple[Code | None, ...] = ()) -> None:
        if self._fuse is None:
            body(blocks, *args, *constants)
        elif not blocks[0].is_meta:  # there only what is allocated counts, and a fused body allocates nothing
            in_place = any(argument is blocks for argument in args)
            self._fuse(body, (in_place, *_variant(blocks)), *constants)(blocks, *args)

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Kernels."""
        mean, var = _channel_vectors(x)
        self._run(channel_stats, [x], mean, var)
        return mean, var

    def normalise_rectify_encode(self, x: Tensor, norm: Norm, *, code: Code | None, out: Tensor) -> Tensor | None:
        """See Kernels."""
        codes = None if code is None else x.new_empty(code.packed_rows(x.shape[0]), x.shape[1], dtype=torch.uint8)
        x_blocks = _row_blocks(x, code)
        out_blocks = x_blocks if out is x else _row_blocks(out, code)
        self._run(normalise_rectify_encode, x_blocks, out_blocks, codes, norm, constants=(code,))
        return codes

    def decode(self, kept: Tensor, norm: Norm, *, code: Code | None, out: Tensor) -> None:
        """See Kernels."""
        self._run(decode, _row_blocks(out, code), kept, norm, constants=(code,))

    def grad_sums(self, grad: Tensor, kept: Tensor, norm: Norm, *, code: Code | None) -> tuple[Tensor, Tensor]:
        """See Kernels."""
        dbeta, dgamma = _channel_vectors(grad)
        self._run(grad_sums, _row_blocks(grad, code), kept, dbeta, dgamma, norm, constants=(code,))
        return dbeta, dgamma

    def input_grad(
        self, grad: Tensor, kept: Tensor, norm: Norm, dbeta: Tensor, dgamma: Tensor, *, code: Code | None, out: Tensor
    ) -> None:
        """See Kernels."""
        grad_blocks = _row_blocks(grad, code)
        out_blocks = grad_blocks if out is grad else _row_blocks(out, code)
        scale, rows = norm.gamma * norm.rstd, grad.shape[0]
        args = (out_blocks, kept, scale, dbeta / rows, dgamma / rows, norm)
        self._run(input_grad, grad_blocks, *args, constants=(code,))


def _variant(blocks: list[Tensor]) -> tuple[Any, ...]:
    """Dtype, whether there is one channel, and how each block's rows divide into strips."""
    rows = [block.shape[0] for block in blocks]
    divisions = [(n == rows[0], n % STRIP_ROWS == 0, n <= STRIP_ROWS, min(n, 2)) for n in rows]
    return blocks[0].dtype, blocks[0].shape[1] == 1, *divisions


def _row_blocks(x: Tensor, code: Code | None) -> list[Tensor]:
    return [x] if code is None else code.row_blocks(x)


def _channel_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


REFERENCE = RowBlockKernels("torch")
