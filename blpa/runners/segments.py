"""The two kinds of segments in which PyTorch's allocator takes memory from a GPU.

    usual        a segment for every request that no free block holds; its blocks are never joined with another's
    expandable   one segment that grows at its end

What counts is what the allocator has taken, not what is alive: while a CUDA graph is recorded it gives nothing back,
and a free block that is too small for a request stays unused. Which kind leaves fewer of those depends on the sizes a
network asks for and on their order. It is a setting of PyTorch that any user can choose, so every mode may have the
better one.
"""

import torch

USUAL, EXPANDABLE = "usual", "expandable"


def use(kind: str) -> None:
    """Take memory in segments of a kind from now on; what is there already stays as it is.

    Args:
        kind: USUAL or EXPANDABLE.
    """
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{kind == EXPANDABLE}")
