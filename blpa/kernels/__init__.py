"""The functions that process every element of an activation, and their backends.

An activation [N, C, H, W] in channels-last memory is the matrix x [M, C], M = N H W. With the per-channel vectors of
`Norm` and the codec of codec.py:

    channel_stats             mean, var over M, and the Norm from them
    normalise_rectify_encode  x_hat = (x - mean) rstd, y = gamma x_hat + beta;  a = max(y, 0), and the code of x_hat
    decode                    a~ = max(gamma x_hat~ + beta, 0) where relu_mask, else 0
    backward                  dY = dA relu_mask;  dbeta = sum dY, dgamma = sum dY x_hat~
                              dX = gamma rstd (dY - mean(dY) - x_hat~ mean(dY x_hat~)),  the means are the sums / M

    pointwise_weight_grad     dW = G^T a~ of a 1x1 convolution, if a backend can compute it without writing a~

PyTorch's batch norm reads the saved x in its backward pass; these functions read codes. With codec=None, x itself is
saved: x_hat~ is x_hat, and every function is exact.

Backends: `torch` is the specification, in eager PyTorch (reference.py); `inductor` is the same source compiled by
torch.compile (compiled.py); `triton` is written by hand for CUDA (triton_ops.py). Arithmetic is in `compute_dtype` for
every dtype of the activation.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blpa.codec import Codec, Grid
from blpa.kernels.available import log_once, missing, supports_triton


class Norm(NamedTuple):
    """Per-channel vectors of one batch normalisation, [C] each.

    They are passed and saved as one tensor, torch.stack(norm) [9, C] in the compute dtype: a call with one small tensor
    costs less than with nine. Its size is that of the 4-bit codes of 72 rows, less than a hundredth of a layer of 8 x 8
    pixels at batch 128.
    """

    mean: Tensor
    """Mean of x."""
    var: Tensor
    """Biased variance of x."""
    rstd: Tensor
    """1 / sqrt(var + eps)."""
    gamma: Tensor
    """Scale, of either sign or zero."""
    beta: Tensor
    """Shift."""
    bins_per_unit: Tensor
    """This and the next three: the bins of the codec (codec.Grid); 0 without a codec."""
    bin_width: Tensor
    frac: Tensor
    zero: Tensor

    @staticmethod
    def of(
        mean: Tensor,
        var: Tensor,
        gamma: Tensor,
        beta: Tensor,
        *,
        eps: float,
        codec: Codec | None,
        data: "Norm | None" = None,
    ) -> "Norm":
        """Compute all nine vectors from the statistics and gamma, beta; the result has var's dtype.

        `data` is the Norm of x itself where the statistics are others, which the codec's bins then follow.
        """
        gamma, beta, mean = gamma.to(var.dtype), beta.to(var.dtype), mean.to(var.dtype)
        rstd = (var + eps).rsqrt()
        if codec is None:
            grid = Grid(*(torch.zeros_like(gamma),) * len(Grid._fields))
        elif data is None:
            grid = codec.grid(gamma, beta)
        else:
            grid = codec.grid(gamma, beta, mean=(data.mean - mean) * rstd, deviation=rstd / data.rstd)
        return Norm(mean, var, rstd, gamma, beta, *grid)

    @property
    def grid(self) -> Grid:
        """The bins of the codec."""
        return Grid(self.bins_per_unit, self.bin_width, self.frac, self.zero)


class RunningStats(NamedTuple):
    """Running statistics of a batch norm, [C] each, of any floating-point dtype; updated in place."""

    mean: Tensor
    var: Tensor
    """Running average of the unbiased variance."""
    momentum: float
    """Weight of the new value."""
    batches: Tensor | None = None
    """Number of batches so far, int64 []."""

    def update(self, mean: Tensor, var: Tensor, rows: int | Tensor) -> None:
        """Update with a batch of `rows` rows, whose mean and biased variance [C] are given, and count it."""
        unbiased = var * (rows / (rows - 1))
        self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
        self.var.lerp_(unbiased.to(self.var.dtype), self.momentum)
        if self.batches is not None:
            self.batches.add_(1)


class Kernels(Protocol):
    """The contract of a backend.

    x, a, grad and out are contiguous [M, C]; `vectors` is a Norm [9, C]. Every element of `out` is written, and `out`
    may be the input. `saved` is the packed codes, uint8 [codec.packed_rows(M), C], or x where codec is None.

    `counter` is int32 [C], zero before and after a call: a backend may count finished programs in it, so that the last
    one adds up the partial sums. Concurrent calls need one each; None allocates one.
    """

    name: str

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
        """Compute the Norm [9, C] from the mean and biased variance of each column.

        Args:
            x: [M, C].
            gamma: scale [C], of either sign or zero.
            beta: shift [C].
            eps: added to the variance.
            codec: its grid is part of the result; None leaves that 0.
            running_stats: updated with the mean and the unbiased variance; its `batches` rises by 1.
            add: [M, C]; x is first overwritten by x + add.
            counter: see the class.
        """

    def normalise_rectify_encode(
        self, x: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor
    ) -> Tensor | None:
        """Write a [M, C] to `out`, which may be x, and encode x_hat.

        Args:
            x: [M, C].
            vectors: Norm [9, C].
            codec: of the codes; None makes none.
            out: [M, C].

        Returns:
            The packed codes, uint8 [codec.packed_rows(M), C]; None without a codec.
        """

    def decode(self, saved: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor) -> None:
        """Write a~ [M, C] to `out`, from the saved codes, or from x without a codec; vectors as above."""

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
        """Write dX to `out`, which may be grad = dA, and return dbeta and dgamma.

        Args:
            grad: dA [M, C].
            saved: see the class.
            vectors: Norm [9, C].
            codec: of the saved codes.
            constant_stats: the statistics do not depend on x, so dX = gamma rstd dY.
            out: [M, C].
            add: another gradient of x [M, C], which is added to dX.
            counter: see the class.
            means: maps the two sums to the means that dX takes, [2, C], contiguous, where the statistics are of more
                rows than these; it is called between the sums and dX. None divides by M.

        Returns:
            The two sums [2, C], in the dtype of the vectors.
        """

    def pointwise_weight_grad(
        self, grad: Tensor, saved: Tensor, vectors: Tensor, *, codec: Codec | None
    ) -> Tensor | None:
        """Compute dW = G^T a~ of a 1x1 convolution from grad = G [M, N], without writing a~.

        Returns:
            float32 [N, C]; None where it would be slower than PyTorch's product with the decoded a~, or less exact.
        """


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of the per-channel vectors: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Measured on two CPU cores, fp32, 4 bits: per element and step, eager PyTorch takes about 25 ns longer than compiled
# code; compiling the functions without a cache takes about 40 s.
_COMPILE_SECONDS = 40.0
_SAVED_SECONDS_PER_ELEMENT = 25e-9


class NotAvailable(RuntimeError):
    """The requested backend cannot run on this machine or device."""


def choose(name: str, device: torch.device, *, elements: float = float("inf")) -> Kernels:
    """Choose the backend of a run.

    Args:
        name: torch, inductor, triton or auto. auto is triton on a supported GPU; on other devices it is inductor if
            the run is long enough to repay compiling; and torch where these fail on a tiny tensor, which is tried once
            per process and logged.
        device: of the run; on the meta device, which only counts bytes, every backend is allowed.
        elements: activation elements that the run encodes in total.

    Returns:
        The backend.

    Raises:
        ValueError: the name is unknown.
        NotAvailable: the requested backend cannot run on this machine or device.
    """
    if name not in ("auto", "torch", "inductor", "triton"):
        raise ValueError(f"kernels = {name}: must be auto, torch, inductor or triton")
    if name == "auto":
        name = _automatic(device, elements)
    elif reason := missing(name, device):
        raise NotAvailable(f"kernels = {name}: {reason}; use kernels auto or torch")
    if name == "torch":
        from blpa.kernels.reference import REFERENCE

        return REFERENCE
    if name == "inductor":
        from blpa.kernels.compiled import COMPILED

        return COMPILED
    from blpa.kernels.triton_ops import TRITON

    return TRITON


def _automatic(device: torch.device, elements: float) -> str:
    """Name the backend of auto: the fastest one that works here; one that does not work is logged."""
    if device.type == "cuda":
        return "triton" if supports_triton(device) else "torch"
    if elements * _SAVED_SECONDS_PER_ELEMENT <= _COMPILE_SECONDS:
        return "torch"
    if reason := missing("inductor", device):
        log_once(f"kernels = auto: torch and not inductor, which is faster: {reason}")
        return "torch"
    return "inductor"
