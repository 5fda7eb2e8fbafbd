"""Backward functions that are differentiable once, and say so in the library's words."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "second derivatives of a converted network are not supported, since its backward pass reads codes: blpa.restore "
    "the model, or exclude the modules concerned with blpa.convert(..., layers={...: None})"
)


class _Refuse(torch.autograd.Function):
    """Identity whose backward function raises."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(MESSAGE)


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Run a backward function without recording it; differentiating its results raises RuntimeError.

    torch.autograd.function.once_differentiable does the same with a message about itself.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        found = [result.detach().requires_grad_() for result in results if result is not None]
        refusing = iter(_Refuse.apply(*found) if found else ())
        return tuple(None if result is None else next(refusing) for result in results)

    return run
