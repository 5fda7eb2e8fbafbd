"""The reference's bodies compiled by torch.compile, to C++ for a CPU and Triton for a GPU: backend `inductor`.

A compiled body is one loop over memory: eager PyTorch writes a dozen temporaries, which here stay in registers. Shapes
are dynamic, so a body is compiled once per codec and dtype for all layers, and again for rows that do not divide evenly
into blocks and strips, or are at most 64, and for a single row or channel.
"""

import functools
from types import FunctionType
from typing import Any

import torch

from blpa.codec import Codec
from blpa.kernels.available import compiler_message
from blpa.kernels.reference import Body, RowBlockKernels


@functools.cache
def _compile(body: Body, variant: tuple[Any, ...], *constants: Any) -> Body:
    # torch.compile treats an integer as a constant if it comes from the defaults of a called function, not if it is an
    # argument: then 2^K would be computed for every element.
    with_constants = FunctionType(body.__code__, body.__globals__, body.__name__, constants)

    def call(*args: Any) -> None:
        with_constants(*args)

    # It also stops compiling after a few variants of one code object, so each codec and variant has its own.
    name = "_".join([body.__name__, *(f"{c.bits}bit" for c in constants if isinstance(c, Codec))])
    call.__code__ = call.__code__.replace(co_name=name)
    return _compiled(call)


def _compiled(function: Body) -> Body:
    # Size checks would repeat those of _variant, and cost a tenth of a call on a small activation.
    return torch.compile(function, dynamic=True, fullgraph=True, options={"size_asserts": False})


@functools.cache
def failure(device: torch.device) -> str:
    """Compile a tiny function and run it; return in a line why that fails, empty where it works.

    What the compiler prepares once, it would prepare for the first body; the function itself comes from its cache, but
    not after a change of the C++ compiler.
    """

    def double(x: torch.Tensor) -> None:
        x.mul_(2)

    x = torch.ones(4, 4, device=device)
    try:
        _compiled(double)(x)
    except Exception as error:  # compilers, their headers and file systems raise whatever they like
        return f"it does not compile here: {compiler_message(error)}"
    return "" if x.eq(2).all() else "what it compiles here computes something else"


COMPILED = RowBlockKernels("inductor", fuse=_compile)
