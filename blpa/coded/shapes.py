"""Functions that change the shape of a tensor: they compute nothing, so its codes serve the result too.

A view shares the count of changes with its tensor, so a change of either makes both tags void.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from blpa.coded.mode import Coding, is_recording
from blpa.coded.tensors import Coded, Joined, is_worth_a_code


def view(coding: Coding, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pass the tag through a view or a copy of another shape, such as permute, flatten or reshape."""
    saved = coding.tags.saved(input) if isinstance(input, Tensor) else None
    out = function(input, *args, **kwargs)
    if isinstance(out, Tensor):
        coding.hold_views(input, [out])
    if isinstance(saved, Coded) and isinstance(out, Tensor) and out.dtype == input.dtype and out is not input:
        # The decoded tensor may differ in strides, where reshape works and view does not.
        again = torch.Tensor.reshape if function is torch.Tensor.view else function
        coding.tag(out, saved.viewed(lambda tensor: cast(Tensor, again(tensor, *args, **kwargs))), None)
    return out


def split(coding: Coding, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pass the tag through chunk and split."""
    saved = coding.tags.saved(input) if isinstance(input, Tensor) else None
    outs = function(input, *args, **kwargs)
    coding.hold_views(input, outs)
    if isinstance(saved, Coded):

        def take(k: int, tensor: Tensor) -> Tensor:
            return cast(Tensor, function(tensor, *args, **kwargs)[k])

        for k, out in enumerate(outs):
            coding.tag(out, saved.viewed(partial(take, k)), None)
    return outs


def cat(coding: Coding, function: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Join the codes of the parts, if one has codes; the others get codes of their own.

    Codes of what is joined already are not joined again: decoding would go back through the network.
    """
    out = function(tensors, dim)
    parts = [coding.tags.saved(tensor) if isinstance(tensor, Tensor) else None for tensor in tensors]
    is_simple = all(part is None or (isinstance(part, Coded) and len(part.views) <= 1) for part in parts)
    if not is_simple or not any(parts) or not is_recording(*tensors) or dim % out.dim() != 1:
        return out
    alike = all(tensor.dtype == out.dtype and tensor.dim() == out.dim() for tensor in tensors)
    if not alike or not all(part or is_worth_a_code(x, 1) for part, x in zip(parts, tensors, strict=True)):
        return out
    coded = tuple(
        cast(Coded, part) if part else cast(Coded, coding.saved_of(x, 1))
        for part, x in zip(parts, tensors, strict=True)
    )
    return coding.tag(out, Joined(coded, dim), 1) if all(coded) else out
