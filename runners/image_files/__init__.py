"""Image files before they are tensors: where they lie, how they are decoded, and the processes that do so.

Nothing here imports torch, so a process that decodes begins in a fifth of a second and takes little memory.
"""
