"""The reference's four bodies through torch.compile: C++ on a CPU, Triton on a GPU. Back end `inductor`.

Shapes are dynamic, so a body is compiled once for each code and dtype, whatever the layer (and again where the rows do
not divide evenly into blocks and strips, or there are fewer than 64). A compiled body is one loop
over memory: what eager PyTorch writes to a dozen temporaries stays in registers.
"""

import functools
from types import FunctionType
from typing import Any

import torch

from blpa.codec import Code
from blpa.kernels.reference import Body, RowBlockKernels


@functools.cache
def _compile(body: Body, variant: tuple[Any, ...], *constants: Any) -> Body:
    # torch.compile takes an integer for a constant if it comes from the defaults of a function that is called, and for
    # an unknown if from an argument: then every element would pay for computing 2^K.
    with_constants = FunctionType(body.__code__, body.__globals__, body.__name__, constants)

    def call(*args: Any) -> None:
        with_constants(*args)

    # It also gives up after a few variants of one code object: hence an object for each code and each variant.
    name = "_".join([body.__name__, *(f"{c.bits}bit" for c in constants if isinstance(c, Code))])
    call.__code__ = call.__code__.replace(co_name=name)
    # The checks of sizes repeat what _variant decided, at a tenth of the cost of a call on a small activation.
    return torch.compile(call, dynamic=True, fullgraph=True, options={"size_asserts": False})


COMPILED = RowBlockKernels("inductor", fuse=_compile)
