"""Baselines built on torch.compile and torch.utils.checkpoint, applied to the blocks of a network.

torch.compile sees a block's forward and backward pass as one graph and chooses what is saved between the two:

    activation_memory_budget b    about a fraction b of those bytes is saved, the rest is recomputed
    fp8                           floating-point tensors are saved as float8, with one scale per row

Each block is compiled by itself, and blocks of the same shape share a graph. So a network of any depth has six graphs,
1,001 layers compile as fast as 29, and a block's input is saved whatever the budget.

Checkpointing saves the input of each segment of blocks and recomputes the rest. Parameters, buffers and their names do
not change.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint_sequential

VARIANTS = 256
"""Limit on compiled graphs: six per compiler, batch size, precision and grad mode."""

FP8 = {
    "activation_quantization_aten_pass": {
        "quant_type": "torch.float8_e5m2",
        "allowed_dtypes": "torch.float32;torch.bfloat16;torch.float16",
        "use_scaling": True,
        "size_in_mb": 0.004,  # per-channel vectors are smaller: in float8 they would spoil every gradient
    }
}


def compile_blocks(blocks: nn.Sequential, *, activation_memory_budget: float = 1.0, fp8: bool = False) -> None:
    """Compile the forward and backward pass of each block, in place.

    Args:
        blocks: the network's blocks.
        activation_memory_budget: fraction of the bytes to save, 0 to 1.
        fp8: save activations as float8.
    """
    torch._dynamo.config.recompile_limit = VARIANTS  # with fullgraph, exceeding the limit is an error
    for block in blocks:
        block.forward = _CompiledForward(block, _compiled(type(block).forward, activation_memory_budget, fp8))


class _CompiledForward:
    """A bound method that copy.deepcopy binds to the copy."""

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        self.block = block
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(self.block, *args)


@functools.cache  # blocks share their graphs through it
def _compiled(forward: Callable[..., Any], activation_memory_budget: float, fp8: bool) -> Callable[..., Any]:
    backend = _backend(activation_memory_budget, FP8 if fp8 else {})
    return torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)


def _backend(activation_memory_budget: float, fusions: dict[str, Any]) -> Callable[..., Any]:
    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        # Inductor generates no code for the meta device: there the partitioned graphs run node by node.
        on_meta = any(tensor.is_meta for tensor in inputs if isinstance(tensor, Tensor))
        inner = lookup_backend("aot_eager_decomp_partition" if on_meta else "inductor")
        with (
            torch._functorch.config.patch(activation_memory_budget=activation_memory_budget),
            torch._inductor.config.patch(post_grad_fusion_options=fusions),
        ):
            return inner(graph, inputs)

    return compile_graph


class CheckpointedBlocks(nn.Sequential):
    """Blocks that save only the input of each segment and are recomputed in the backward pass.

    Args:
        blocks: the network's blocks.
        segments: number of segments, of about equal length; None is the square root of the number of blocks.
    """

    def __init__(self, blocks: nn.Sequential, segments: int | None = None) -> None:
        super().__init__(*blocks)
        self.segments = segments or round(math.sqrt(len(blocks)))

    def forward(self, x: Tensor) -> Any:
        """Return the output of the last block."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-untyped-call]
        # Nothing in a block is random, and saving a generator's state cannot be captured in a CUDA graph.
        return checkpoint_sequential(self, self.segments, x, use_reentrant=False, preserve_rng_state=False)
