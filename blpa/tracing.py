"""What differs while torch.compile or torch.export traces the ops: every result is a new tensor.

A compiler plans memory itself, and what it foresees of memory may not hold: in torch 2.14 a function that overwrites an
input of the compiled graph loses its gradient, and torch 2.11 exports views by strides that are wrong.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Changes(NamedTuple):
    """How often a tensor was changed in place; counts of one graph can be compared."""

    times: int
    graph: int
    """Number of the graph that torch.compile makes, which counts by itself; 0 outside."""


def is_traced() -> bool:
    """Return whether a compiler, torch.export or torch.jit.trace traces this call."""
    return torch.compiler.is_compiling() or is_traced_without_gradient()


def is_traced_without_gradient() -> bool:
    """Return whether torch.export or torch.jit.trace traces this call: they record no function of ours."""
    is_exporting = torch.compiler._is_exporting_flag  # the function is always true where torch 2.11 compiles
    return bool(is_exporting or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def changes(tensor: Tensor) -> Changes:
    """Return how often a tensor was changed in place."""
    if not torch.compiler.is_dynamo_compiling():
        return Changes(tensor._version, 0)
    times = graph = 0
    torch._dynamo.comptime.comptime(_set_changes)
    return Changes(times, graph)


_NUMBERS = itertools.count(1)


def _set_changes(context: Any) -> None:
    """Set the local variables `times` and `graph` of the function that the compiler traces."""
    from torch._dynamo.variables import ConstantVariable  # here, since it loads the compiler

    tensor, tracer = context.get_local("tensor"), context._ComptimeContext__tx
    # The tracer's tensors do not count what functions of lists change.
    of_lists = [user for user in tensor.as_proxy().node.users if _is_foreach_in_place(user.target)]
    found = {
        "times": tensor.as_fake()._version + len(of_lists),
        "graph": vars(tracer.output).setdefault("_blpa_number", next(_NUMBERS)),
    }
    for name, value in found.items():
        tracer.symbolic_locals[name] = ConstantVariable.create(value)


def _is_foreach_in_place(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name.startswith("_foreach") and name.endswith("_")
