"""Backpropagation with approximate activations: an exact forward pass, K-bit codes saved for the backward pass.

    layers = blpa.CodedLayers(codec=blpa.Codec(bits=4), kernels=blpa.kernels.choose("auto", torch.device("cuda")))
    network = blpa.PreActResNet(164, layers=layers, classes=10)

Standard layers save activations at full precision. The import needs torch only. README.md beside this file lists the
files.
"""

from blpa import kernels, memory
from blpa.codec import Codec
from blpa.convert import convert, restore
from blpa.explain import explain
from blpa.gradient_error import gradient_error
from blpa.layers import Activation, BatchNormReLU, CodedLayers, Conv2d, StockLayers
from blpa.models.preact_resnet import PreActResNet

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in groups)
    # What users call: any network converted, what that saves, and what it costs.
    "convert",
    "restore",
    "explain",
    "gradient_error",
    # The paper's network, and the factories of its layers.
    "PreActResNet",
    "StockLayers",
    "CodedLayers",
    # Building blocks for other networks.
    "Codec",
    "BatchNormReLU",
    "Conv2d",
    "Activation",
    # Modules: kernels.choose gives the backend or raises kernels.NotAvailable; memory counts the bytes of training.
    "kernels",
    "memory",
    # Not public, may change: coded, ops, saved, convolution, and the rest of kernels.
]
