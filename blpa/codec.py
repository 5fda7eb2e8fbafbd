"""The K-bit codec of normalised activations, which preserves the sign of ReLU's input.

Batch norm computes, per channel, y = gamma * x_hat + beta from the normalised activation x_hat. The code of x_hat is
its bin among L = 2^K bins of equal width d = 2 clip / L over [-clip, clip]:

    s    = -1 where gamma < 0, else 1
    r    = beta / (|gamma| d)                     where y changes sign, in bins from the middle
    frac = r - round(r)                           shifts the bins by at most half a bin: an edge lies at the sign change
    zero = clamp(L/2 - round(r), 1, L - 1)        the first code of a positive y

    code  = floor(s x_hat / d + frac) + L/2       clamped to [zero, L - 1] where y > 0, to [0, zero - 1] where y <= 0
    y > 0 = code >= zero                          always, by construction
    x_hat ~ s (code - L/2 + 1/2 - frac) d         the middle of the bin

A usual quantiser has a fixed grid, and values near ReLU's threshold decode to the wrong sign. Here the gradient of ReLU
is exact. frac and zero follow from gamma and beta, so K bits per element are all that is stored.

Running statistics, as of a frozen batch norm, need not be those of the data: x_hat then has a mean and a deviation of
its own, and the bins cover mean +- clip deviations, or what lies beyond +-clip would be cut off.

Two other grids serve activations in general (convert.py). With clip="range" the bins cover each channel's own
[low, high] with width d = (high - low) / (L - 1): at 8 bits rounding is small, so what a clip cuts off would decide.
And what is nowhere negative has no use for negative codes: code 0 is 0, L - 1 bins cover (0, top].

Source: Chakrabarti and Moseley, NeurIPS 2019, section 3.2. Departures: the grid covers the data for any beta / gamma,
both ends of the range are guarded, and gamma may be negative or zero (README, "Departures").
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

ALLOWED_BITS = (8, 4, 2)

RECTIFIED_CLIP = 1.5
"""Top of the grid of a rectified channel in root mean squares, over clip: 4.5 for clip 3. A rectified standard normal
has a root mean square of 0.71, so this is 3.2 standard deviations of what was rectified."""


class Grid(NamedTuple):
    """The bins of each channel: vectors [C] in the dtype of gamma."""

    bins_per_unit: Tensor
    """s / d: converts x_hat to bins."""
    bin_width: Tensor
    """s d: converts bins to x_hat."""
    frac: Tensor
    """Shift of the grid in bins, within [-1/2, 1/2] unless the range follows the channel's own."""
    zero: Tensor
    """The first code of a positive y, a whole number within [1, L - 1]."""


@dataclass(frozen=True)
class Codec:
    """Encode x_hat with `bits` bits per element, and decode it; values beyond +-clip fall into the outermost bins.

    Args:
        bits: 8, 4 or 2.
        clip: half-width of the range in standard deviations, > 0; 3 in the paper. "range" is each channel's own
            [low, high], for `convert` only.

    Raises:
        ValueError: bits or clip is not allowed.
    """

    bits: int
    clip: float | Literal["range"] = 3.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.bits not in ALLOWED_BITS:
            raise ValueError(f"bits = {self.bits}: must be 8, 4 or 2")
        if self.clip != "range" and not (isinstance(self.clip, int | float) and 0 < self.clip < float("inf")):
            raise ValueError(f'clip = {self.clip!r}: must be a positive number of standard deviations or "range"')

    @property
    def levels(self) -> int:
        """Number of codes, L = 2^bits."""
        return 1 << self.bits

    @property
    def codes_per_byte(self) -> int:
        """Number of codes in a byte."""
        return 8 // self.bits

    @property
    def bin_width(self) -> float:
        """Width of a bin, d = 2 clip / L, in standard deviations.

        Raises:
            ValueError: the range is the channel's own.
        """
        if self.clip == "range":
            raise ValueError('clip = "range": must be a number here')
        return 2 * self.clip / self.levels

    def packed_rows(self, rows: int) -> int:
        """Return the number of rows, of C bytes each, of the packed codes of an activation [rows, C]."""
        return -(-rows // self.codes_per_byte)

    def grid(self, gamma: Tensor, beta: Tensor, *, mean: Tensor | None = None, deviation: Tensor | None = None) -> Grid:
        """Place the bins of each channel.

        Args:
            gamma: scale [C], of either sign or zero.
            beta: shift [C].
            mean: of x_hat [C], where it is normalised by running statistics; None is 0. Where it is not finite, 0 too.
            deviation: of x_hat [C], likewise 1.

        Returns:
            The grid of this codec.
        """
        gamma = gamma + 0.0  # -0 becomes 0
        bin_width = torch.full_like(gamma, self.bin_width)
        if deviation is not None:
            width = deviation.nan_to_num(nan=1.0, posinf=1.0)
            bin_width = bin_width.mul_(width).clamp_min_(torch.finfo(gamma.dtype).tiny ** 0.5)
        bin_width = bin_width.copysign_(gamma)
        edge = beta / (gamma * bin_width)
        middle = None if mean is None else mean.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).div_(bin_width)
        if middle is not None:
            edge = edge.add_(middle)
        # An edge far out of range becomes a whole number, so that it does not shift the bins.
        edge = edge.nan_to_num_(nan=0.0, posinf=2.0**30, neginf=-(2.0**30))
        nearest = edge.round()
        frac = edge.sub_(nearest)
        return Grid(
            bins_per_unit=bin_width.reciprocal(),
            bin_width=bin_width,
            frac=frac if middle is None else frac.sub_(middle),
            zero=nearest.neg_().add_(self.levels // 2).clamp_(1, self.levels - 1),
        )

    def grid_of_range(self, gamma: Tensor, beta: Tensor, low: Tensor, high: Tensor) -> Grid:
        """Place the bins of each channel over its own range, an edge where y changes sign.

        Args:
            gamma: scale [C], of either sign or zero.
            beta: shift [C].
            low: least x_hat of each channel [C].
            high: largest x_hat of each channel [C].

        Returns:
            A grid for `encode` and `decode`, whatever the clip.
        """
        sign = torch.ones_like(gamma).copysign_(gamma + 0.0)
        low, high = torch.minimum(low * sign, high * sign), torch.maximum(low * sign, high * sign)  # of s x_hat
        # One bin to spare, since an edge in the range shifts the bins by up to one. A constant channel has no width.
        width = self._bin_widths(high - low).clamp_min_(torch.finfo(gamma.dtype).tiny ** 0.5)
        edge = -beta / gamma.abs()
        bins = (edge / width).nan_to_num_(nan=0.0, posinf=2.0**30, neginf=-(2.0**30))
        lowest = low / width
        is_inside = (edge > low) & (edge < high)
        # The bin that becomes code 0. Without an edge in the range that bin starts at low; where all y are positive it
        # is one below, since code 0 means a negative y.
        frac = torch.where(is_inside, bins.ceil() - bins, -lowest)
        first = torch.where(is_inside, (lowest + frac).floor(), -(edge <= low).to(width.dtype))
        return Grid(
            bins_per_unit=sign / width,
            bin_width=sign * width,
            frac=frac - first - self.levels // 2,
            zero=(bins + frac).round_().sub_(first).clamp_(1, self.levels - 1),
        )

    def rectified_grid(self, high: Tensor, root_mean_square: Tensor) -> Grid:
        """Place the bins of channels that are nowhere negative: 0 has code 0, to be decoded to max(., 0) = 0.

        Args:
            high: largest value of each channel [C].
            root_mean_square: of each channel [C].

        Returns:
            A grid for gamma = 1 and beta = 0.
        """
        top = high if self.clip == "range" else torch.minimum(high, RECTIFIED_CLIP * self.clip * root_mean_square)
        width = self._bin_widths(top).clamp_min_(torch.finfo(high.dtype).tiny ** 0.5)
        first = torch.ones_like(width)
        return Grid(width.reciprocal(), width, first - self.levels // 2, first)

    def _bin_widths(self, ranges: Tensor) -> Tensor:
        """Divide ranges into bins; by a Python number, PyTorch on CUDA would multiply by its reciprocal instead."""
        return ranges / torch.full_like(ranges, self.levels - 1)

    def encode(self, x_hat: Tensor, y: Tensor, grid: Grid) -> Tensor:
        """Compute the code of each element.

        Args:
            x_hat: normalised activation [M, C].
            y: gamma * x_hat + beta [M, C]; the code preserves its sign as computed.
            grid: from `grid` of the same gamma and beta.

        Returns:
            Whole numbers [M, C] in [0, L - 1], in the grid's dtype, not packed.
        """
        lowest = where_positive(y, grid.zero)
        highest = where_positive(y, self.levels - grid.zero).add_(grid.zero - 1)
        codes = (x_hat * grid.bins_per_unit).add_(grid.frac).floor_().add_(self.levels // 2)
        return codes.clamp_(lowest, highest).nan_to_num_(nan=0.0)  # a NaN would corrupt the other codes of its byte

    def decode(self, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Compute the middle of each code's bin, and the sign of y.

        Args:
            codes: whole numbers [M, C] in the grid's dtype, not packed; overwritten.
            grid: as in `encode`.

        Returns:
            x_hat~ [M, C], and numbers [M, C] with the sign of y.
        """
        sign = codes - (grid.zero - 0.5)
        x_hat = codes.add_(0.5 - self.levels // 2).sub_(grid.frac).mul_(grid.bin_width)
        return x_hat, sign

    def row_blocks(self, x: Tensor) -> list[Tensor]:
        """View [M, C] as blocks of rows: byte row r holds the codes of row r of every block.

        Codes of different rows share a byte, not codes of different channels, so every block is contiguous and C is any
        number. If M is not a multiple of the codes per byte, the last block is short; few rows make fewer blocks.
        """
        return list(x.split(self.packed_rows(x.shape[0])))

    def pack(self, codes: list[Tensor], packed: Tensor) -> None:
        """Pack the codes into bytes; missing rows of a short block count as code 0.

        Args:
            codes: the row blocks in order, one or several per tensor; the first tensor is overwritten.
            packed: output, uint8 [packed_rows, C].
        """
        total, *others = [block for several in codes for block in several.split(packed.shape[0])]
        for k, block in enumerate(others, start=1):
            # A slice, even of all rows, would make compiled code store both.
            rows_in_both = total if block.shape[0] == total.shape[0] else total[: block.shape[0]]
            rows_in_both.add_(block, alpha=1 << (k * self.bits))
        packed.copy_(total.to(torch.int32))  # on a CPU, float to byte is ten times slower

    def unpack(self, packed: Tensor, first_block: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Unpack the codes of one or several row blocks.

        Args:
            packed: uint8 [packed_rows, C].
            first_block: index of the first row block.
            rows: number of rows of the blocks together.
            dtype: of the result.

        Returns:
            Codes [rows, C].
        """
        packed = packed.to(torch.int32)  # processors have no shifts of bytes
        blocks: list[Tensor] = []
        # Their number decides the loop, not the rows: a compiled body then serves every number of rows.
        for number in range(-(-rows // packed.shape[0])):
            start = number * packed.shape[0]
            block = packed if rows - start >= packed.shape[0] else packed[: rows - start]
            shift = (first_block + number) * self.bits
            block = block >> shift if shift else block
            blocks.append(block & (self.levels - 1) if shift + self.bits < 8 else block)
        return (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).to(dtype)


def where_positive(y: Tensor, value: Tensor) -> Tensor:
    """Return the value where y > 0, and 0 elsewhere; on a CPU torch.where is twenty times slower.

    Args:
        y: [M, C]; a NaN counts as positive.
        value: [M, C] or [C].
    """
    return cast(Tensor, torch.ops.aten.threshold_backward(value, y, 0))
