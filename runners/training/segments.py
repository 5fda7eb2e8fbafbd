"""The two kinds of segments in which PyTorch's allocator takes memory from a GPU.

    usual        a segment for every request that no free block holds; its blocks are never joined with another's
    expandable   one segment that grows at its end

What counts is what the allocator has taken, not what is alive: while a CUDA graph is recorded it gives nothing back,
and a free block that is too small for a request stays unused. Which kind leaves fewer of those depends on the sizes a
network asks for and on their order. It is a setting of PyTorch that any user can choose, so every mode may have the
better one.

Where a process may take so much and no more, PyTorch asks whether the whole request fits beside what it has taken, even
if the segment would have to grow by a part of it: expandable segments are judged a little too strictly, never too
mildly.
"""

import torch

USUAL, EXPANDABLE = "usual", "expandable"
KINDS = (EXPANDABLE, USUAL)
"""First the one with which stock layers, recomputed or compiled ones come near to the bytes that are alive."""


def use(kind: str) -> None:
    """Take memory in segments of a kind from now on; what is there already stays as it is.

    Args:
        kind: USUAL or EXPANDABLE.
    """
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{kind == EXPANDABLE}")
