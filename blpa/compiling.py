"""What the compiler offers against the memory of activations: the competitors, on stock layers.

torch.compile sees a block's forward and backward pass as one graph and chooses what crosses from one to the other:

    activation_memory_budget b    it keeps about b of the bytes it would, and computes the rest again
    fp8                           it keeps float8 copies, with a scale a row, of the floating-point tensors it would

Blocks of one shape share a graph, so a network of any depth has six. Each block is compiled by itself: what it reads
is kept whatever the budget, and 1,001 layers compile in the time of 29.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

VARIANTS = 256
"""Graphs that may be made of the blocks: six for each compiler, batch size and precision, with gradients and without.
"""

FP8 = {
    "activation_quantization_aten_pass": {
        "quant_type": "torch.float8_e5m2",
        "allowed_dtypes": "torch.float32;torch.bfloat16;torch.float16",
        "use_scaling": True,
        "size_in_mb": 0.004,  # per-channel vectors are smaller: in float8 they would spoil every gradient
    }
}


@dataclass(frozen=True)
class Compiler:
    """How a network's blocks are compiled.

    Args:
        activation_memory_budget: part of the bytes to keep, from 0 to 1.
        fp8: whether what is kept is kept in 8 bits.
    """

    activation_memory_budget: float = 1.0
    fp8: bool = False

    def compile(self, block: nn.Module) -> None:
        """Compile a block's forward pass, and with it the backward pass; parameters and names stay as they are."""
        torch._dynamo.config.recompile_limit = VARIANTS  # beyond it fullgraph refuses to go on
        block.forward = _CompiledForward(block, _compiled(self, type(block).forward))


class _CompiledForward:
    """A bound method that copy.deepcopy binds to the copy."""

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        self.block = block
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(self.block, *args)


@functools.cache  # blocks share their graphs through it
def _compiled(compiler: Compiler, forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, backend=_backend(compiler), dynamic=False, fullgraph=True)


def _backend(compiler: Compiler) -> Callable[..., Any]:
    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        # Inductor makes no code for the meta device: there the graphs run as they were divided, node by node.
        on_meta = any(tensor.is_meta for tensor in inputs if isinstance(tensor, Tensor))
        inner = lookup_backend("aot_eager_decomp_partition" if on_meta else "inductor")
        options = FP8 if compiler.fp8 else {}
        with (
            torch._functorch.config.patch(activation_memory_budget=compiler.activation_memory_budget),
            torch._inductor.config.patch(post_grad_fusion_options=options),
        ):
            return inner(graph, inputs)

    return compile_graph
