"""Small codes without a grid: one bit per element for a mask, one byte per output for the place of a maximum."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blpa.kernels import compute_dtype


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes, eight elements each, in the order of its contiguous memory."""
    flat = mask.reshape(-1).view(torch.uint8)
    packed = flat.new_zeros(-(-flat.numel() // 8))
    for k, block in enumerate(flat.split(packed.numel())) if packed.numel() else ():
        packed[: block.numel()] |= block << k
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor of this shape that was packed."""
    flat = torch.empty(torch.Size(shape).numel(), dtype=torch.bool, device=packed.device)
    for k, block in enumerate(flat.split(packed.numel())) if packed.numel() else ():
        block.copy_((packed[: block.numel()] >> k) & 1)
    return flat.view(shape)


def pack_between(y: Tensor, low: float, high: float) -> Tensor:
    """Pack whether low < y < high, the ends in the compute dtype as in PyTorch's own functions."""
    low, high = _ends_in(y.dtype, low, high)
    return pack_bits((y > low) & (y < high))


@functools.lru_cache
def _ends_in(dtype: torch.dtype, low: float, high: float) -> tuple[float, float]:
    """Return numbers of a dtype that have the same of its numbers between them: low rounded down, high rounded up."""
    ends = torch.tensor((low, high), dtype=compute_dtype(dtype), device="cpu")
    rounded = ends.to(dtype)
    beyond = torch.nextafter(rounded, torch.tensor((-torch.inf, torch.inf), dtype=dtype, device="cpu"))
    is_inside = torch.stack((rounded[0] > ends[0], rounded[1] < ends[1]))
    first, last = torch.where(is_inside, beyond, rounded).tolist()
    return first, last


def masked(grad: Tensor, packed: Tensor) -> Tensor:
    """Return grad, 0 where the bit is not set."""
    return grad.masked_fill(~unpack_bits(packed, grad.shape), 0)


def places_of(
    index: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Turn PyTorch's indices of maxima into places in windows.

    Args:
        index: int64 [..., outputs in each dimension], into planes of x.
        size: of a plane of x; so are the others one number for each dimension.
        kernel: size of a window.
        stride: from window to window.
        padding: before the first element.
        dilation: between elements of a window.

    Returns:
        uint8, contiguous; int32 indices if windows have more than 256 elements.
    """
    if math.prod(kernel) > 256:
        return index.int().contiguous()
    offsets, starts = _offsets(size, kernel, dilation, index.device), _starts(index, size, stride, padding)
    # A table from offset to place takes one pass over the indices, where arithmetic takes several.
    last = sum((k - 1) * spread * step for k, spread, step in zip(kernel, dilation, _steps(size), strict=True))
    places = torch.zeros(last + 1, dtype=torch.uint8, device=index.device)
    places[offsets] = torch.arange(offsets.numel(), device=index.device).to(torch.uint8)
    return torch.take(places, index - starts)


def index_of(
    places: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Undo `places_of`, whose arguments these are: int64 indices into planes of x."""
    if places.dtype != torch.uint8:
        return places.long()
    offsets = _offsets(size, kernel, dilation, places.device)
    return torch.take(offsets, places.long()).add_(_starts(places, size, stride, padding))


def _steps(size: Sequence[int]) -> list[int]:
    """Return the distance of neighbours in a plane, for each dimension."""
    return [math.prod(size[dim + 1 :]) for dim in range(len(size))]


def _offsets(size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], device: torch.device) -> Tensor:
    """Return how far each place of a window is from the first one, in elements of a plane, int64."""
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    for places, spread, step in zip(kernel, dilation, _steps(size), strict=True):
        offsets = (offsets.unsqueeze(1) + torch.arange(places, device=device) * (spread * step)).view(-1)
    return offsets


def _starts(outputs: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return where each output's window starts in a plane of x, in elements; it broadcasts to the outputs."""
    starts = torch.zeros((), dtype=torch.int64, device=outputs.device)
    for dim, (apart, zeros, step) in enumerate(zip(stride, padding, _steps(size), strict=True)):
        count = outputs.shape[outputs.dim() - len(size) + dim]
        start = (torch.arange(count, device=outputs.device) * apart - zeros) * step
        starts = starts.unsqueeze(-1) + start
    return starts
