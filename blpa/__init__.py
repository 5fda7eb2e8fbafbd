"""Backprop with approximate activations: exact forward pass, K-bit codes kept for the backward pass."""

__version__ = "0.1.0"
