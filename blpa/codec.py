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
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        sign = torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype)
        edge = (beta / (gamma.abs() * self.bin_width)).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        nearest = edge.round()
        return Grid(
            bins_per_unit=sign / self.bin_width,
            bin_width=sign * self.bin_width,
            frac=(edge - nearest).nan_to_num(nan=0.0),  # inf - inf: no edge within reach, so no shift
            zero=(self.levels // 2 - nearest).clamp(1, self.levels - 1),
        )

    def encode(self, x_hat: Tensor, y: Tensor, grid: Grid) -> Tensor:
        """Code of each element, in [0, L - 1], not packed: int32, which processors can shift, as they cannot bytes.

        Args:
            x_hat: normalised activation [M, C].
            y: gamma * x_hat + beta [M, C]; its sign, as computed, is what the code keeps.
            grid: this code's grid for that gamma and beta.
        """
        is_positive = y > 0
        lowest = torch.where(is_positive, grid.zero, 0)
        highest = torch.where(is_positive, self.levels - 1, grid.zero - 1)
        code = torch.floor(x_hat * grid.bins_per_unit + grid.frac) + self.levels // 2
        return code.clamp(lowest, highest).to(torch.int32)

    def decode(self, code: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Middle of the bin of each code, and whether it stands for a positive y.

        Args:
            code: int32 [M, C], not packed.
            grid: the grid it was encoded on.

        Returns:
            x_hat~ [M, C] in the grid's dtype, and relu_mask [M, C], bool.
        """
        code = code.to(grid.zero.dtype)
        x_hat = (code + (0.5 - self.levels // 2) - grid.frac) * grid.bin_width
        return x_hat, code >= grid.zero

    def row_blocks(self, x: Tensor) -> list[Tensor]:
        """View [M, C] as blocks of rows: byte row r holds the codes of row r of every block.

        Sharing a byte across rows, not across channels, keeps every block contiguous and lets C be any number. Where M
        is not a multiple of the codes in a byte, the last block is short, and few rows make fewer blocks.
        """
        return list(x.split(self.packed_rows(x.shape[0])))

    def pack(self, codes: list[Tensor], rows: int) -> Tensor:
        """Pack the codes of each row block into bytes [rows, C]; rows that a short block lacks count as code 0."""
        packed = torch.zeros((), dtype=torch.int32, device=codes[0].device)
        for k, code in enumerate(codes):
            whole = code if code.shape[0] == rows else F.pad(code, (0, 0, 0, rows - code.shape[0]))
            packed = packed | (whole << (k * self.bits))
        return packed.to(torch.uint8)

    def unpack(self, packed: Tensor, block: int, rows: int) -> Tensor:
        """Codes of one row block, int32 [rows, C], from the packed bytes."""
        return (packed[:rows].to(torch.int32) >> (block * self.bits)) & (self.levels - 1)
