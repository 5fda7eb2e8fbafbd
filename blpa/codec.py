"""The K-bit code of a normalised activation that never loses the sign of what it stands for.

A unit computes, per channel, y = gamma * x_hat + beta from the normalised activation x_hat. Kept for the backward pass
is the bin of x_hat among L = 2^K equal bins over [-clip, clip], which are d = 2 clip / L wide:

    s    = -1 where gamma < 0, else 1
    r    = beta / (|gamma| d)                     where y changes sign, in bins from the middle
    frac = r - round(r)                           shifts the bins by half of one at most: an edge lies just there
    zero = clamp(L/2 - round(r), 1, L - 1)        the first code that means "y is positive"

    code  = floor(s x_hat / d + frac) + L/2       kept in [zero, L - 1] where y > 0, in [0, zero - 1] where y <= 0
    y > 0 = code >= zero                          always, by construction
    x_hat ~ s (code - L/2 + 1/2 - frac) d         the middle of the bin

frac and zero follow from gamma and beta whenever they are wanted, so the codes are all that is stored: K bits an
element.

Source: Chakrabarti and Moseley, NeurIPS 2019, section 3.2. Departures: the grid stays over the data whatever beta /
gamma is, both ends of the range are guarded, and gamma may be negative or zero (README, "Departures").
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

ALLOWED_BITS = (8, 4, 2)


class Grid(NamedTuple):
    """Where the bins of each channel lie; all of shape [C], in the dtype of gamma."""

    bins_per_unit: Tensor
    """s / d: from x_hat to bins."""
    bin_width: Tensor
    """s d: from bins to x_hat."""
    frac: Tensor
    """Shift of the grid, in bins, within [-1/2, 1/2]."""
    zero: Tensor
    """The first code whose y is positive, a whole number within [1, L - 1]."""


@dataclass(frozen=True)
class Code:
    """A code of `bits` bits over x_hat in [-clip, clip].

    Args:
        bits: 8, 4 or 2.
        clip: half-width of the range in standard deviations, > 0. The paper's is 3.

    Raises:
        ValueError: bits or clip is not one of those.
    """

    bits: int
    clip: float = 3.0

    def __post_init__(self) -> None:
        """Refuse what no code exists for."""
        if self.bits not in ALLOWED_BITS:
            raise ValueError(f"bits = {self.bits}: must be 8, 4 or 2")
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip = {self.clip}: must be a positive number of standard deviations")

    @property
    def levels(self) -> int:
        """L = 2^bits."""
        return 1 << self.bits

    @property
    def codes_per_byte(self) -> int:
        """Codes that share a byte."""
        return 8 // self.bits

    @property
    def bin_width(self) -> float:
        """The paper's d = 2 clip / L, in standard deviations."""
        return 2 * self.clip / self.levels

    def packed_rows(self, rows: int) -> int:
        """Rows of the packed codes of an activation [rows, C]; each holds C bytes."""
        return -(-rows // self.codes_per_byte)

    def grid(self, gamma: Tensor, beta: Tensor) -> Grid:
        """Place the bins of each channel.

        Args:
            gamma: scale [C], of either sign or zero.
            beta: shift [C].

        Returns:
            The grid of this code, [C] each.
        """
        gamma = gamma + 0.0  # -0 becomes 0
        bin_width = torch.full_like(gamma, self.bin_width).copysign_(gamma)
        # An edge out of every range is put on a whole number, so that it shifts nothing.
        edge = (beta / (gamma * bin_width)).nan_to_num_(nan=0.0, posinf=2.0**30, neginf=-(2.0**30))
        nearest = edge.round()
        return Grid(
            bins_per_unit=bin_width.reciprocal(),
            bin_width=bin_width,
            frac=edge.sub_(nearest),
            zero=nearest.neg_().add_(self.levels // 2).clamp_(1, self.levels - 1),
        )

    def encode(self, x_hat: Tensor, y: Tensor, grid: Grid) -> Tensor:
        """Code of each element, a whole number in [0, L - 1] of the grid's dtype, not packed.

        Args:
            x_hat: normalised activation [M, C].
            y: gamma * x_hat + beta [M, C]; its sign, as computed, is what the code keeps.
            grid: this code's grid for that gamma and beta.
        """
        lowest = where_positive(y, grid.zero)
        highest = where_positive(y, self.levels - grid.zero).add_(grid.zero - 1)
        code = (x_hat * grid.bins_per_unit).add_(grid.frac).floor_().add_(self.levels // 2)
        return code.clamp_(lowest, highest).nan_to_num_(nan=0.0)  # a NaN would spoil the codes of its byte

    def decode(self, code: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Middle of the bin of each code, and a number that is positive where it stands for a positive y.

        Args:
            code: whole numbers [M, C] in the grid's dtype, not packed; x_hat~ may take their place.
            grid: the grid it was encoded on.

        Returns:
            x_hat~ [M, C], and [M, C] of the sign of y.
        """
        sign = code - (grid.zero - 0.5)
        x_hat = code.add_(0.5 - self.levels // 2).sub_(grid.frac).mul_(grid.bin_width)
        return x_hat, sign

    def row_blocks(self, x: Tensor) -> list[Tensor]:
        """View [M, C] as blocks of rows: byte row r holds the codes of row r of every block.

        Sharing a byte across rows, not across channels, keeps every block contiguous and lets C be any number. Where M
        is not a multiple of the codes in a byte, the last block is short, and few rows make fewer blocks.
        """
        return list(x.split(self.packed_rows(x.shape[0])))

    def pack(self, codes: list[Tensor], packed: Tensor) -> None:
        """Pack the codes into bytes [rows, C]; rows that a short block lacks count as code 0.

        Args:
            codes: the row blocks, in order, one or several of them a tensor; the first is written over.
            packed: uint8 [rows, C].
        """
        total, *others = [block for several in codes for block in several.split(packed.shape[0])]
        for k, block in enumerate(others, start=1):
            # Compiled code would store both for the sake of a slice, even of all rows.
            rows_in_both = total if block.shape[0] == total.shape[0] else total[: block.shape[0]]
            rows_in_both.add_(block, alpha=1 << (k * self.bits))
        packed.copy_(total.to(torch.int32))  # on a CPU, from a floating-point number to a byte is ten times slower

    def unpack(self, packed: Tensor, first_block: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Codes [rows, C] of one row block or several, in the given dtype, from the packed bytes."""
        packed = packed.to(torch.int32)  # which processors can shift, as they cannot bytes
        blocks: list[Tensor] = []
        for start in range(0, rows, packed.shape[0]):
            block = packed if rows - start >= packed.shape[0] else packed[: rows - start]
            shift = (first_block + len(blocks)) * self.bits
            block = block >> shift if shift else block
            blocks.append(block & (self.levels - 1) if shift + self.bits < 8 else block)
        return (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).to(dtype)


def where_positive(y: Tensor, value: Tensor) -> Tensor:
    """The value where y > 0, and 0 elsewhere, as torch.where, whose loop is twenty times slower on a CPU.

    Args:
        y: [M, C]; a NaN counts as positive.
        value: [M, C] or [C].
    """
    return cast(Tensor, torch.ops.aten.threshold_backward(value, y, 0))
