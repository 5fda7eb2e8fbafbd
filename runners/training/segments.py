"""The two kinds of segments in which PyTorch's allocator reserves GPU memory.

    usual        one segment per request that fits no free block; blocks of two segments are never merged
    expandable   one segment that grows at its end

Reserved memory is the limit, not memory in use: during the capture of a CUDA graph the allocator frees nothing, and a
free block that is too small for a request stays unused. Which kind wastes less depends on the sizes and the order of a
network's requests. Any user can choose the kind, so every mode gets the better one.

Under a memory limit PyTorch checks whether the whole request fits beside the reserved memory, even where an expandable
segment would grow by only a part of it. So the limit is slightly too strict for expandable segments, never too loose.
"""

import torch

USUAL, EXPANDABLE = "usual", "expandable"
KINDS = (EXPANDABLE, USUAL)
"""Expandable first: with it stock, checkpointed and compiled layers reserve little more than they use."""


def use(kind: str) -> None:
    """Reserve memory in segments of one kind from now on; existing segments do not change.

    Args:
        kind: USUAL or EXPANDABLE.
    """
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{kind == EXPANDABLE}")
