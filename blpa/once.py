"""Backward functions that are differentiable once, and say so in the library's words."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "second derivatives (create_graph=True) are not supported, since the backward pass reads codes: use stock layers, "
    "blpa.restore a converted network, or exclude modules of it by blpa.convert(..., layers={...: None})"
)


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Raise RuntimeError where a backward function would be recorded.

    torch.autograd.function.once_differentiable raises when the second derivative is computed, and not on every path to
    it: a gradient penalty could lose its terms in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(MESSAGE)
        return backward(ctx, *grads)

    return run
