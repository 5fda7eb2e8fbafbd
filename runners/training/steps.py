"""One training step: a batch made on the device, forward pass, loss, backward pass, update.

    inputs -> images, labels -> logits -> loss -> gradients -> weights

On a GPU a step of 164 layers is thousands of small kernels, and launching them one by one takes longer than running
them. A CUDA graph captures the launches of a whole step once and replays them with one call. The graph reads what
changes between steps from tensors: the inputs of the batch, and the learning rate. A replay runs the captured
kernels on the captured addresses, so its result has the same bits as the step before capture.

With k sub-batches a step has k forward and backward passes, of every k-th image each, and one update by the mean of
their gradients. Memory is that of one sub-batch. Batch norm's statistics are too, so this is not the gradient of the
whole batch, and the running averages take k steps.

Where several processes train together, the inputs are this process's part of the batch, and the update is by the mean
of all processes' gradients (reduction.py).
"""

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runners.config import DatasetConfig, GpuConfig
from runners.errors import UserError
from runners.training.reduction import GradientReducer

Inputs = tuple[Tensor, ...]
MakeBatch = Callable[[Inputs], tuple[Tensor, Tensor]]

EAGER_STEPS = 3
"""Warm-up steps before capture: kernels compile, cuDNN picks algorithms, momentum buffers are created."""


def configure_torch(gpu: GpuConfig) -> None:
    """Set PyTorch's options of the whole process: precision of float32 products, and determinism.

    Args:
        gpu: `precision` tf32 lets tensor cores round float32 factors; fp32 and bf16 do not. The caller has replaced
            auto. `deterministic` refuses operations that can differ between runs. It also turns off cuDNN's search for
            the fastest convolution, which may pick another one in each run.
    """
    assert gpu.precision != "auto"
    is_tf32 = gpu.precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32  # with the newer conv.fp32_precision, reading this flag would raise
    torch.backends.cudnn.benchmark = not gpu.deterministic
    torch.use_deterministic_algorithms(gpu.deterministic)
    # Filling every new tensor with NaN would be a pass over memory; nothing here reads before it writes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if gpu.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it and reads it at start


def uses_cuda_graph(gpu: GpuConfig, device: torch.device) -> bool:
    """Return whether steps are captured: gpu.cuda_graph, where null means on a CUDA device that trains alone.

    With several processes a graph would hold their collectives too, which has not been tried.

    Raises:
        UserError: gpu.cuda_graph is true and the device is not CUDA.
    """
    if gpu.cuda_graph and device.type != "cuda":
        raise UserError(f"gpu.cuda_graph=true: the run is on the {device.type}; only a CUDA device captures graphs")
    is_usual = device.type == "cuda" and gpu.processes == 1
    return is_usual if gpu.cuda_graph is None else gpu.cuda_graph


def make_optimiser(model: nn.Module, recipe: DatasetConfig) -> torch.optim.SGD:
    """Make stochastic gradient descent with momentum, and weight decay on convolution and classifier weights only.

    It is fused, because only the fused one reads the learning rate from a tensor, as a captured step must.
    """
    decayed = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    is_decayed = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in is_decayed]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=True)  # every step sets the rate


def forward(model: nn.Module, images: Tensor, gpu: GpuConfig) -> Tensor:
    """Compute the logits, in float32 for every precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=gpu.precision == "bf16"):
        logits: Tensor = model(images)
    return logits.float()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream to capture on: the current one, or a new one if the current one is the default stream.

    A default stream cannot be captured. Runs replayed side by side each need a stream of their own for capture: cuBLAS
    has one workspace per stream, and a graph holds the address of the workspace of its stream.
    """
    here = torch.cuda.current_stream(device)
    return torch.cuda.Stream(device) if here == torch.cuda.default_stream(device) else here


def run_on_stream(call: Callable[[], Tensor], stream: torch.cuda.Stream) -> Tensor:
    """Call a function on the stream on which `capture` will capture it; the current stream waits for the result."""
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = call()
    here.wait_stream(stream)
    result.record_stream(here)
    return result


def capture(
    call: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture the kernel launches of a function as a CUDA graph; nothing runs until a replay.

    The capture waits for all earlier work of the device. Nothing else may be launched until it ends.

    Args:
        call: called by run_on_stream before, on the same stream; it must not wait for the device.
        stream: not the default stream.
        pool: memory pool, from torch.cuda.graph_pool_handle, shared by graphs that are never replayed at the same time;
            None gives the graph its own.

    Returns:
        The graph, and the tensor that each replay writes its result to.

    Raises:
        CaptureFailed: the capture failed; this process cannot capture another graph.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # the graph has its own memory, so return the memory of earlier calls first
    torch.cuda.empty_cache()
    here = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = call()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # a failed capture leaves its own stream as the current one
        raise CaptureFailed(f"a CUDA graph could not be captured: {error}") from error
    return graph, result


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy tensors to a device; from pinned memory the host does not wait."""
    return tuple(x.to(device, non_blocking=True) for x in inputs)


class CaptureFailed(RuntimeError):
    """A CUDA graph could not be captured; PyTorch may treat the capture as still under way."""


class TrainingStep:
    """Training steps of one network, captured as a CUDA graph after the warm-up steps if `gpu` allows it.

    Args:
        model: on its device, in training mode.
        optimiser: from make_optimiser, with the checkpoint already loaded, if any.
        make_batch: maps inputs (runners.data.Images), on the device, to images [N, C, H, W] and labels [N]. It is
            captured with the step, so it must not wait for the device, and all inputs have the same shapes.
        gpu: precision, and whether to capture.
        device: the model's device.
        sub_batches: k, a divisor of N.
        label_smoothing: part of the target that is spread over all classes, 0 to 1; the loss that is returned has it.
        reducer: of the model's gradients; None where no other process trains it.

    Raises:
        UserError: see uses_cuda_graph.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.SGD,
        make_batch: MakeBatch,
        *,
        gpu: GpuConfig,
        device: torch.device,
        sub_batches: int = 1,
        label_smoothing: float = 0.0,
        reducer: GradientReducer | None = None,
    ) -> None:
        self.reducer = reducer
        self.sub_batches = sub_batches
        self.label_smoothing = label_smoothing
        self.model = model
        self.optimiser = optimiser
        self.make_batch = make_batch
        self.gpu = gpu
        self.device = device
        self.rate = torch.zeros((), device=device)
        for group in optimiser.param_groups:
            group["lr"] = self.rate
        self.captures = uses_cuda_graph(gpu, device)
        if self.captures:
            self.stream = own_stream(device)
            # Evaluation is captured into the same pool. The two never run at once, and neither needs the other to
            # preserve temporary memory: each reads what it has just written, or tensors that stay referenced (weights,
            # gradients, inputs, results), whose memory the pool does not reuse.
            self.pool = torch.cuda.graph_pool_handle()
        self.eager_steps_left = EAGER_STEPS
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Inputs = ()
        self.result = self.rate  # the graph's inputs and output, once captured

    def __call__(self, inputs: Inputs, *, rate: float) -> Tensor:
        """Launch one step, without waiting for the device.

        Args:
            inputs: the argument of make_batch, on the CPU.
            rate: learning rate.

        Returns:
            Mean loss and number of samples classified wrongly, float32 [2], still on the device.
        """
        self.rate.fill_(rate)
        if self.device.type == "cuda":
            inputs = tuple(x.pin_memory() for x in inputs)  # from pageable memory the host would wait for the copy
        if not self.captures:
            return self._step(to_device(inputs, self.device))
        if self.eager_steps_left:
            self.eager_steps_left -= 1
            return run_on_stream(lambda: self._step(to_device(inputs, self.device)), self.stream)
        if self.graph is None:
            self.inputs = tuple(x.to(self.device) for x in inputs)
            self.optimiser.zero_grad(set_to_none=True)  # captured gradients get new memory
            self.graph, self.result = capture(lambda: self._step(self.inputs), self.stream, self.pool)
        for to, x in zip(self.inputs, inputs, strict=True):
            to.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.result.clone()  # the next replay writes over it

    def _step(self, inputs: Inputs) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        results = [self._add_gradients(inputs, k) for k in range(self.sub_batches - 1)]
        with nullcontext() if self.reducer is None else self.reducer.reduced():
            result = self._add_gradients(inputs, self.sub_batches - 1)
        if results:
            result = torch.stack([*results, result]).sum(0)
        self.optimiser.step()
        return result

    def _add_gradients(self, inputs: Inputs, first: int) -> Tensor:
        """Run one sub-batch forward and backward; return its share of the mean loss, and its wrongly classified."""
        if self.sub_batches > 1:
            inputs = tuple(x[first :: self.sub_batches] for x in inputs)
        images, labels = self.make_batch(inputs)
        logits = forward(self.model, images, self.gpu)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.sub_batches > 1:
            loss = loss / self.sub_batches
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach(), (logits.detach().argmax(dim=1) != labels).sum()])
