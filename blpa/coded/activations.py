"""Activation functions that save the code of their input or output, shared with what reads the output.

    relu, leaky_relu          a tagged y: its code; else relu a code of a, leaky_relu of y         dY exact, given dA
    relu6, hardtanh           one bit, whether y lies between the ends                             dY exact, given dA
    silu, gelu, hardswish     a tagged y: its code; else a code of y                    dY = f'(y~) dA, approximate
    tanh, sigmoid, softmax    PyTorch's own: a, which what reads it saves too           dY exact, given dA

PyTorch's functions save y or a at full precision. A code keeps the sign of y, hence the exact gradients; the derivative
of a smooth function has an error of at most sup |f''| times half a bin, which every layer below gets too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.codec import Codec
from blpa.coded.mode import Coding, current_mode, is_recording, is_usual, may_overwrite
from blpa.coded.tensors import Coded, Layout, channels_last_format, is_worth_a_code, load, save
from blpa.kernels.any_layout import Elementwise
from blpa.kernels.library import OPERATIONS
from blpa.once import differentiable_once

Call = Callable[[Tensor], Tensor]


class _Elementwise(torch.autograd.Function):
    """y -> a = f(y), and the codes of a; with codes of y given, it saves those."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        call: Call,
        function: Elementwise,
        saved: Coded | None,
        channel: int,
        codec: Codec | None,
    ) -> Any:
        a = call(y)
        if a is y:
            ctx.mark_dirty(y)
        ctx.function = function
        ctx.set_materialize_grads(False)
        if saved is not None:
            save(ctx, saved)
            return a
        saved = Coded.of(a, channel, codec)
        save(ctx, saved)
        ctx.mark_non_differentiable(*saved.tensors)
        return a, *saved.tensors

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dy = None
        if grad is not None:
            saved = load(ctx)[0]
            dy = saved.elementwise_grad(grad, ctx.function)
        return dy, *(None,) * 5


class _Clamped(torch.autograd.Function):
    """y -> call(y), whose gradient is that of its output where low < y < high, else 0; saves one bit per element."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: Call, low: float, high: float) -> Tensor:
        ctx.channels_last = channels_last_format(y) is not None
        ctx.save_for_backward(OPERATIONS.pack_between(y, low, high, ctx.channels_last))  # before y is overwritten
        a = call(y)
        if a is y:
            ctx.mark_dirty(y)
        return a

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        return OPERATIONS.masked(grad, packed, ctx.channels_last), None, None, None


def _activation(
    coding: Coding, y: Tensor, call: Callable[[Tensor, bool], Tensor], function: Elementwise, inplace: bool
) -> Any:
    """Compute a = call(y, inplace), and save codes of y or a."""
    channel = coding.tags.channel(y)
    if not is_recording(y) or not is_worth_a_code(y, channel) or (inplace and not may_overwrite(y)):
        return NotImplemented
    if inplace and coding.is_traced:
        return _copied(coding, y, _activation(coding, y, call, function, False))
    coding.coded_calls += 1
    saved = coding.tags.saved(y)

    def compute(y: Tensor) -> Tensor:
        return call(y, inplace)

    if not isinstance(saved, Coded) or not saved.is_plain:
        if function.name == "relu":  # a has its sign, and half the range
            a, values, vectors = _Elementwise.apply(y, compute, function, None, channel, coding.codec)
            return coding.tag(a, Coded(values, vectors, Layout.of(a, channel, coding.codec)), channel)
        saved = Coded.of(y, channel, coding.codec)
    a = _Elementwise.apply(y, compute, function, saved, channel, coding.codec)
    return coding.tag(a, saved.after(function), saved.layout.channel)


def _copied(coding: Coding, y: Tensor, a: Tensor) -> Tensor:
    """Write a over y, and pass its tag on: what a compiler understands of a function that overwrites its argument."""
    saved, channel = coding.tags.saved(a), coding.tags.channel(a)
    return coding.tag(y.copy_(a), saved, channel)


def relu(coding: Coding, function: Any, input: Tensor, inplace: bool = False) -> Any:
    """Coded torch.nn.functional.relu and torch.relu."""
    return _activation(
        coding, input, lambda y, inplace: torch.relu_(y) if inplace else torch.relu(y), Elementwise("relu"), inplace
    )


def relu_(coding: Coding, function: Any, input: Tensor) -> Any:
    """Coded torch.relu_."""
    return relu(coding, function, input, inplace=True)


def leaky_relu(
    coding: Coding, function: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Any:
    """Coded torch.nn.functional.leaky_relu."""

    def call(y: Tensor, inplace: bool) -> Any:
        return function(y, negative_slope, inplace)

    return _activation(coding, input, call, Elementwise("leaky_relu", (negative_slope,)), inplace)


def silu(coding: Coding, function: Any, input: Tensor, inplace: bool = False) -> Any:
    """Coded torch.nn.functional.silu."""
    return _activation(coding, input, function, Elementwise("silu"), inplace)


def hardswish(coding: Coding, function: Any, input: Tensor, inplace: bool = False) -> Any:
    """Coded torch.nn.functional.hardswish."""
    return _activation(coding, input, function, Elementwise("hardswish"), inplace)


class CodedHardswish(nn.Hardswish):
    """A Hardswish that saves codes where a compiler traces it: unlike other functions, this one it shows no mode."""

    def forward(self, input: Tensor) -> Any:
        """Compute the activation."""
        coding = current_mode()
        if coding is not None and coding.is_traced and coding.is_coding:
            result = hardswish(coding, F.hardswish, input, self.inplace)
            if result is not NotImplemented:
                return result
        return super().forward(input)


def gelu(coding: Coding, function: Any, input: Tensor, *, approximate: str = "none") -> Any:
    """Coded torch.nn.functional.gelu."""

    def call(y: Tensor, inplace: bool) -> Any:
        return function(y, approximate=approximate)

    return _activation(coding, input, call, Elementwise("gelu" if approximate == "none" else "gelu_tanh"), False)


def hardtanh(
    coding: Coding,
    function: Any,
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Any:
    """Coded torch.nn.functional.hardtanh."""

    def call(y: Tensor, inplace: bool) -> Any:
        return function(y, min_val, max_val, inplace)

    return _clamped(coding, input, call, min_val, max_val, inplace)


def relu6(coding: Coding, function: Any, input: Tensor, inplace: bool = False) -> Any:
    """Coded torch.nn.functional.relu6."""
    return _clamped(coding, input, function, 0.0, 6.0, inplace)


def saves_output(coding: Coding, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a function whose output PyTorch saves, such as tanh; what reads that output then saves it at no cost."""
    if not is_recording(input) or not coding.saves_others_exactly:
        return NotImplemented
    out = function(input, *args, **kwargs)
    if is_usual(out):
        coding.hold(out)
    return out


def _clamped(
    coding: Coding, y: Tensor, call: Callable[[Tensor, bool], Tensor], low: float, high: float, inplace: bool
) -> Any:
    if not is_recording(y) or (inplace and not may_overwrite(y)):
        return NotImplemented
    if inplace and coding.is_traced:
        return _copied(coding, y, _clamped(coding, y, call, low, high, False))
    coding.coded_calls += 1
    saved, channel = coding.tags.saved(y), coding.tags.channel(y)
    a = _Clamped.apply(y, lambda y: call(y, inplace), low, high)
    clamped = Elementwise("hardtanh", (low, high))
    return coding.tag(a, saved.after(clamped) if isinstance(saved, Coded) and saved.is_plain else None, channel)
