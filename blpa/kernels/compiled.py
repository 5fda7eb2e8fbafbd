"""The reference's five bodies through torch.compile: C++ on a CPU, Triton on a GPU. Back end `inductor`.

Shapes are dynamic, so a body is compiled once for each code and dtype, whatever the layer. A compiled body is one loop
over memory: what eager PyTorch writes to a dozen temporaries stays in registers.
"""

import functools
from types import FunctionType
from typing import Any, cast

import torch

from blpa.kernels.reference import Body, RowBlockKernels


@functools.cache
def _compile(body: Body, specialised_on: tuple[Any, ...]) -> Body:
    # torch.compile limits the variants it keeps of one code object, for its guards are tried one after another. A code
    # object for each code and dtype keeps every list of variants short, in a process that runs all the modes.
    assert isinstance(body, FunctionType)
    copy = FunctionType(
        body.__code__.replace(co_name=body.__name__), body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    return cast(Body, torch.compile(copy, dynamic=True, fullgraph=True))


COMPILED = RowBlockKernels("inductor", fuse=_compile)
