"""Coded versions of PyTorch's functions, for any network: each calls the very function and changes only what is saved.

    F.relu(y) in a network  ->  relu(coding, F.relu, y)  ->  F.relu(y) for the output, a code for the backward pass

PyTorch's functions save their inputs or outputs at full precision, a BN-ReLU-conv three of them. Here the output of a
coded function has a tag with the codes (tensors.py), and the functions that read it share them. `mode.py` sends a
network's functions here; functions that are not in FUNCTIONS save what they always save. Batch norms alone may be
computed here too, in fewer passes over memory (norms.py, fusion.py).

    norms.py         batch, instance, group, layer, root mean square norm    K bits
    activations.py   ReLU and others                                        K bits shared, or 1
    products.py      convolutions, linear layers, scaling                   0 bits if shared, else K
    pools.py         max and average pooling, dropout                       8 bits an output, 0, 1
    attention.py     attention                                              8 bits
    sync.py          SyncBatchNorm, a module: no function mode sees what it calls    K bits
    shapes.py        views, concatenation                                   0 bits
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.coded import activations, attention, norms, pools, products, shapes, sync
from blpa.coded.mode import Coding, Handler, Policy

FUNCTIONS: dict[Any, Handler] = {
        F.batch_norm: norms.batch_norm,
        torch.batch_norm: norms.torch_batch_norm,
        F.instance_norm: norms.instance_norm,
        F.group_norm: norms.group_norm,
        torch.group_norm: norms.group_norm,
        F.layer_norm: norms.layer_norm,
        torch.layer_norm: norms.layer_norm,
        F.rms_norm: norms.rms_norm,
        torch.rms_norm: norms.rms_norm,
        F.relu: activations.relu,
        torch.relu: activations.relu,
        Tensor.relu: activations.relu,
        torch.relu_: activations.relu_,
        Tensor.relu_: activations.relu_,
        F.relu6: activations.relu6,
        F.hardtanh: activations.hardtanh,
        F.leaky_relu: activations.leaky_relu,
        F.silu: activations.silu,
        F.gelu: activations.gelu,
        F.hardswish: activations.hardswish,
        **{
            getattr(place, name): activations.saves_output
            for name in ("tanh", "sigmoid", "softmax", "exp", "sqrt", "rsqrt")
            for place in (torch, Tensor, F)
            if hasattr(place, name)
        },
        torch.conv1d: products.conv,
        torch.conv2d: products.conv,
        torch.conv3d: products.conv,
        torch.conv_transpose1d: products.conv_transpose,
        torch.conv_transpose2d: products.conv_transpose,
        torch.conv_transpose3d: products.conv_transpose,
        F.linear: products.linear,
        torch.mul: products.mul,
        torch.multiply: products.mul,
        Tensor.mul: products.mul,
        Tensor.multiply: products.mul,
        Tensor.__mul__: products.mul,
        Tensor.__rmul__: products.mul,
        F.max_pool1d: pools.max_pool(1),
        torch.max_pool1d: pools.max_pool(1),
        F.max_pool2d: pools.max_pool(2),
        torch.max_pool2d: pools.max_pool(2),
        F.max_pool3d: pools.max_pool(3),
        torch.max_pool3d: pools.max_pool(3),
        F.avg_pool1d: pools.average_pool(1),
        F.avg_pool2d: pools.average_pool(2),
        F.avg_pool3d: pools.average_pool(3),
        F.adaptive_avg_pool1d: pools.adaptive_average_pool(1),
        F.adaptive_avg_pool2d: pools.adaptive_average_pool(2),
        F.adaptive_avg_pool3d: pools.adaptive_average_pool(3),
        F.dropout: pools.dropout,
        torch.dropout: pools.dropout,
        F.scaled_dot_product_attention: attention.scaled_dot_product_attention,
        torch.cat: shapes.cat,
        torch.concat: shapes.cat,
        **{
            getattr(place, name): shapes.view
            for name in (
                "contiguous", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "swapaxes",
                "squeeze", "unsqueeze",
            )
            for place in (torch, Tensor)
            if hasattr(place, name)
        },
        **{getattr(place, name): shapes.split for name in ("chunk", "split") for place in (torch, Tensor)},
}  # fmt: skip
"""Coded versions, by the function that a network calls."""

UNKNOWN_TO_A_TRACER = Tensor.unflatten, Tensor.split
TRACED_FUNCTIONS = {function: handler for function, handler in FUNCTIONS.items() if function not in UNKNOWN_TO_A_TRACER}
"""The same for a compiler, which finds no methods in a dictionary that PyTorch writes in Python."""

MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.SyncBatchNorm: sync.CodedSyncBatchNorm,
    nn.Hardswish: activations.CodedHardswish,
}
"""Subclasses with a coded forward, by the class of modules that calls what a mode does not see."""

__all__ = ["FUNCTIONS", "MODULES", "TRACED_FUNCTIONS", "Coding", "Policy"]
