"""What differs while torch.compile or torch.export traces the ops: every result is a new tensor.

A compiler plans memory itself, and what it foresees of memory may not hold: in torch 2.14 a function that overwrites an
input of the compiled graph loses its gradient, and torch 2.11 exports views by strides that are wrong.
"""

from typing import Any

import torch
from torch import Tensor


def is_traced() -> bool:
    """Return whether a compiler, or torch.jit.trace, traces this call."""
    return torch.compiler.is_compiling() or is_traced_by_jit()


def is_traced_by_jit() -> bool:
    """Return whether torch.jit.trace traces this call: it can record neither functions of ours nor what they save."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def changes(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; while torch.compile traces, by the count of its own tensor."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_changes(tensor)
    return tensor._version


def _traced_changes(tensor: Tensor) -> int:
    count = 0
    torch._dynamo.comptime.comptime(_set_count)
    return count


def _set_count(context: Any) -> None:
    """Set the local variable `count` of the function that the compiler traces."""
    tensor = context.get_local("tensor")
    # The tracer's tensors do not count what functions of lists change.
    of_lists = [user for user in tensor.as_proxy().node.users if _is_foreach_in_place(user.target)]
    count = tensor.as_fake()._version + len(of_lists)
    from torch._dynamo.variables import ConstantVariable  # here, since it loads the compiler

    context._ComptimeContext__tx.symbolic_locals["count"] = ConstantVariable.create(count)


def _is_foreach_in_place(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name.startswith("_foreach") and name.endswith("_")
