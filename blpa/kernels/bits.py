"""Small codes without a grid: one bit per element for a mask, one byte per output for the place of a maximum."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
        uint8; int32 indices if windows have more than 256 elements.
    """
    if torch.Size(kernel).numel() > 256:
        return index.int()
    place = torch.zeros_like(index, dtype=torch.uint8)
    for dim, start in enumerate(_starts(index, stride, padding)):
        along = (index // torch.Size(size[dim + 1 :]).numel()).remainder_(size[dim])  # int64: one at a time
        place.mul_(kernel[dim]).add_(along.sub_(start).floor_divide_(dilation[dim]).to(torch.uint8))
        del along
    return place


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
    index = torch.zeros_like(places, dtype=torch.int64)
    for dim, start in enumerate(_starts(places, stride, padding)):
        offset = places // torch.Size(kernel[dim + 1 :]).numel() % kernel[dim]
        index.mul_(size[dim]).add_(offset, alpha=dilation[dim]).add_(start)
    return index


def _starts(index: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[Tensor]:
    """Return where each output's window starts in x, for each dimension; they broadcast to the outputs."""
    starts = []
    for dim in range(len(stride)):
        size = index.shape[index.dim() - len(stride) + dim]
        start = torch.arange(size, device=index.device) * stride[dim] - padding[dim]
        starts.append(start.view(-1, *(1,) * (len(stride) - 1 - dim)))
    return starts
