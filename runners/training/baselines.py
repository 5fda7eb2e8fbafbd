"""What PyTorch itself offers against the memory of activations: baselines, applied to the blocks of a built network.

torch.compile sees a block's forward and backward pass as one graph and chooses what is saved between the two:

    activation_memory_budget b    it saves about b of the bytes it would, and computes the rest again
    fp8                           it saves float8 copies, with a scale a row, of the floating-point tensors it would

Blocks of one shape share a graph, so a network of any depth has six. Each block is compiled by itself: its input is
saved whatever the budget, and 1,001 layers compile in the time of 29.

Checkpointing saves the input of each segment of blocks, and computes all else again. Parameters, buffers and their
names stay as they are.
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


def compile_blocks(blocks: nn.Sequential, *, activation_memory_budget: float = 1.0, fp8: bool = False) -> None:
    """Compile the forward pass of each block, and with it the backward pass.

    Args:
        blocks: of the network.
        activation_memory_budget: part of the bytes to save, from 0 to 1.
        fp8: whether what is saved is saved in 8 bits.
    """
    torch._dynamo.config.recompile_limit = VARIANTS  # beyond it fullgraph refuses to go on
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
        # Inductor makes no code for the meta device: there the graphs run as they were divided, node by node.
        on_meta = any(tensor.is_meta for tensor in inputs if isinstance(tensor, Tensor))
        inner = lookup_backend("aot_eager_decomp_partition" if on_meta else "inductor")
        with (
            torch._functorch.config.patch(activation_memory_budget=activation_memory_budget),
            torch._inductor.config.patch(post_grad_fusion_options=fusions),
        ):
            return inner(graph, inputs)

    return compile_graph


class CheckpointedBlocks(nn.Sequential):
    """Blocks that save the input of each segment alone, and run a second time in the backward pass.

    Args:
        blocks: of the network.
        segments: of about as many blocks each; None takes the square root of the number of blocks.
    """

    def __init__(self, blocks: nn.Sequential, segments: int | None = None) -> None:
        super().__init__(*blocks)
        self.segments = segments or round(math.sqrt(len(blocks)))

    def forward(self, x: Tensor) -> Any:
        """Output of the last block."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-untyped-call]
        # Nothing in a block is random, and a CUDA graph could not record the saving of a generator's state.
        return checkpoint_sequential(self, self.segments, x, use_reentrant=False, preserve_rng_state=False)
