"""The reference's five bodies through torch.compile: C++ on a CPU, Triton on a GPU. Back end `inductor`.

Shapes are dynamic, so a body is compiled once for each code and dtype, whatever the layer. A compiled body is one loop
over memory: what eager PyTorch writes to a dozen temporaries stays in registers.
"""

import functools
from types import FunctionType
from typing import Any

import torch

from blpa.kernels.reference import Body, RowBlockKernels


@functools.cache
def _compile(body: Body, dtype: torch.dtype, *constants: Any) -> Body:
    # torch.compile takes an integer for a constant if it comes from the defaults of a function that is called, and for
    # an unknown if from an argument: then every element would pay for computing 2^K.
    with_constants = FunctionType(body.__code__, body.__globals__, body.__name__, constants)

    def call(*args: Any) -> None:
        with_constants(*args)

    # It also limits the variants that it keeps of one code object, and a process may well run all the modes: one
    # object for each body, dtype and code.
    name = "_".join([body.__name__, str(dtype).removeprefix("torch."), *(f"{c.bits}bit" for c in constants if c)])
    call.__code__ = call.__code__.replace(co_name=name)
    return torch.compile(call, dynamic=True, fullgraph=True)


COMPILED = RowBlockKernels("inductor", fuse=_compile)
