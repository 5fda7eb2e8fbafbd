"""The functions that see every element of an activation, and their backends.

An activation [N, C, H, W] in channels-last memory is the matrix x [M, C], M = N H W. With the per-channel vectors of
`Norm` and the code of codec.py:

    channel_stats             mean, var over M, and the Norm that follows from them
    normalise_rectify_encode  x_hat = (x - mean) rstd, y = gamma x_hat + beta;  a = max(y, 0), and the code of x_hat
    decode                    a~ = max(gamma x_hat~ + beta, 0) where relu_mask, else 0
    backward                  dY = dA relu_mask;  dbeta = sum dY, dgamma = sum dY x_hat~
                              dX = gamma rstd (dY - dbeta / M - x_hat~ dgamma / M)

    pointwise_weight_grad     dW = G^T a~ of a 1x1 convolution, where a backend makes it without writing a~

`code=None` stands for keeping x itself: x_hat~ is x_hat, and every function is exact.

Back ends: `torch` is the specification, in eager PyTorch (reference.py); `inductor` is the same text through
torch.compile (compiled.py); `triton` is written by hand for CUDA (triton_ops.py). All arithmetic is in `compute_dtype`,
whatever the activation's dtype.
"""

import shutil
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blpa.codec import Code, Grid


class Norm(NamedTuple):
    """Per-channel vectors of one batch normalisation, [C] each.

    They travel as one tensor, torch.stack(norm) [9, C] in the compute dtype, which is also what is kept for the
    backward pass: a call with one small tensor costs less than one with nine. They weigh what the 4-bit codes of 72
    rows weigh, less than a hundredth of a layer of 8 x 8 pixels at batch 128.
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
    """This and the next three: where the code's bins lie (codec.Grid); 0 without a code."""
    bin_width: Tensor
    frac: Tensor
    zero: Tensor

    @staticmethod
    def of(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, code: Code | None) -> "Norm":
        """All of it, in the dtype of var, from what it follows from."""
        gamma, beta = gamma.to(var.dtype), beta.to(var.dtype)
        grid = code.grid(gamma, beta) if code else Grid(*(torch.zeros_like(gamma),) * len(Grid._fields))
        return Norm(mean.to(var.dtype), var, (var + eps).rsqrt(), gamma, beta, *grid)

    @property
    def grid(self) -> Grid:
        """Where the code's bins lie."""
        return Grid(self.bins_per_unit, self.bin_width, self.frac, self.zero)


class Averages(NamedTuple):
    """Running averages of a batch norm, [C] each, of any floating-point dtype."""

    mean: Tensor
    var: Tensor
    """Of the unbiased variance."""
    momentum: float
    """Weight of the new value."""
    batches: Tensor | None = None
    """How many batches there were, one whole number."""


class Kernels(Protocol):
    """The contract of a back end.

    x, a, grad and out are contiguous [M, C], `vectors` is a Norm [9, C]; out is written whole and may be the input.

    `counter` is int32 [C], zero before and after: a backend may count in it which of its programs have added up their
    rows, so that the last one adds up theirs. Two calls that may run at once need one each; where it is None, one is
    made.
    """

    name: str

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
        """Norm [9, C] of the mean and biased variance of each column; running averages, if given, move towards them.

        Their count of batches, if given, is one more. With `add` [M, C], x first becomes x + add.
        """

    def normalise_rectify_encode(self, x: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> Tensor | None:
        """Write a to `out`, which may be x; return the codes, uint8 [code.packed_rows(M), C], if there is a code."""

    def decode(self, kept: Tensor, vectors: Tensor, *, code: Code | None, out: Tensor) -> None:
        """Write a~ to `out`. `kept` is the packed codes, or x where code is None."""

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
        """Write dX to `out`, which may be grad = dA, and return dbeta and dgamma [2, C].

        Constant statistics do not depend on x, so that dX = gamma rstd dY. `add` [M, C] is a gradient that x has from
        another reader: then their sum is written.
        """

    def pointwise_weight_grad(self, grad: Tensor, kept: Tensor, vectors: Tensor, *, code: Code | None) -> Tensor | None:
        """Gradient dW [N, C] = G^T a~ of a 1x1 convolution, for grad = G [M, N], without a~ being written: float32.

        None where that would be slower than the product of G and the decoded a~, or less exact than PyTorch's of them.
        """


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the per-channel vectors: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Measured on two CPU cores, fp32, 4 bits: eager PyTorch needs about 25 ns an element and step more than compiled code,
# and compiling the functions with nothing cached about 40 s.
_COMPILE_SECONDS = 40.0
_SAVED_SECONDS_PER_ELEMENT = 25e-9


class NotAvailable(RuntimeError):
    """The backend that was asked for cannot run on this machine or device."""


def choose(name: str, device: torch.device, *, elements: float = float("inf")) -> Kernels:
    """Choose the backend of a run.

    Args:
        name: torch, inductor, triton, or auto: triton on a GPU that it supports; on a CPU inductor, but torch for work
            too small to repay compiling, and where there is no compiler.
        device: where the run computes; on the meta device, which only counts, every back end does.
        elements: activation elements that the run will encode in all; auto weighs them against the compiling.

    Raises:
        ValueError: the name is unknown.
        NotAvailable: the backend asked for cannot run on this machine or device.
    """
    if name not in ("auto", "torch", "inductor", "triton"):
        raise ValueError(f"kernels = {name}: must be auto, torch, inductor or triton")
    missing = {"torch": "", "inductor": _missing_for_inductor(device), "triton": _missing_for_triton(device)}
    if name == "auto":
        pays = elements * _SAVED_SECONDS_PER_ELEMENT > _COMPILE_SECONDS
        fastest_first = ("triton",) if device.type == "cuda" else ("inductor",) if pays else ()
        name = next((back_end for back_end in fastest_first if not missing[back_end]), "torch")
    if missing[name]:
        raise NotAvailable(f"kernels = {name}: {missing[name]}; ask for kernels auto or torch")
    if name == "torch":
        from blpa.kernels.reference import REFERENCE

        return REFERENCE
    if name == "inductor":
        from blpa.kernels.compiled import COMPILED

        return COMPILED
    from blpa.kernels.triton_ops import TRITON

    return TRITON


def _missing_for_inductor(device: torch.device) -> str:
    """What torch.compile lacks to make code for this device; empty if nothing."""
    if device.type == "meta":
        return ""
    if device.type == "cuda":
        return _missing_for_triton(device)
    compilers = ("g++", "clang++", "c++")
    return "" if any(map(shutil.which, compilers)) else f"no C++ compiler found (looked for {', '.join(compilers)})"


def _missing_for_triton(device: torch.device) -> str:
    """What kernels in Triton lack to run on this device; empty if nothing."""
    from torch.utils._triton import has_triton, has_triton_package

    if device.type == "meta":
        return "" if has_triton_package() else "triton is not installed"
    if device.type != "cuda":
        return f"it is for CUDA GPUs, and the run is on the {device.type}"
    return "" if has_triton() else "triton is missing or does not support this GPU"
