"""Backprop with approximate activations: exact forward pass, K-bit codes saved for the backward pass.

    layers = blpa.CodedLayers(code=blpa.Code(bits=4), kernels=blpa.kernels.choose("auto", torch.device("cuda")))
    network = blpa.PreActResNet(164, layers=layers, classes=10)

Importing it needs nothing but torch. README.md in this folder says which file does what.
"""

from blpa import kernels, memory
from blpa.codec import Code
from blpa.layers import Activation, BatchNormReLU, CodedLayers, Conv2d, StockLayers
from blpa.models.preact_resnet import PreActResNet

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in groups)
    # What users call: a network, and the layers it is made of.
    "PreActResNet",
    "StockLayers",
    "CodedLayers",
    # Building blocks for networks of one's own.
    "Code",
    "BatchNormReLU",
    "Conv2d",
    "Activation",
    # Modules: kernels.choose gives the backend or raises kernels.NotAvailable; memory counts the bytes of training.
    "kernels",
    "memory",
    # Not public, and free to change: ops, saved, convolution, and what kernels has besides these two.
]
