"""One training step: a batch made on the device, forward pass, loss, backward pass, update.

    draws -> images, labels -> logits -> loss -> gradients -> weights

On a GPU a network of 164 layers is thousands of small kernels, and launching them one by one takes longer than running
them. A CUDA graph captures the launches of a whole step once and replays them with one call. What changes from step to
step stays in tensors that the graph reads: which images, how they are cropped, and the learning rate. A replay is the
captured kernels on the captured addresses, so it gives the bits that the step gave before it was captured.
"""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runners.config import DatasetConfig, GpuConfig
from runners.errors import UserError

MakeBatch = Callable[[Tensor], tuple[Tensor, Tensor]]

EAGER_STEPS = 3
"""Steps before the graph is captured: they compile kernels, choose convolutions and create the momentum."""


def configure_torch(gpu: GpuConfig) -> None:
    """Set what PyTorch keeps for the whole process: precision of float32 products, and determinism.

    Args:
        gpu: `precision` tf32 lets tensor cores round float32 factors; fp32 and bf16 do not (auto is not a precision:
            the caller names what it is on the device). `deterministic` refuses what can differ between runs, also the
            search for the fastest convolution, which may not end alike.
    """
    assert gpu.precision != "auto"
    is_tf32 = gpu.precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32  # with the newer conv.fp32_precision, reading this flag would raise
    torch.backends.cudnn.benchmark = not gpu.deterministic
    torch.use_deterministic_algorithms(gpu.deterministic)
    # Else every new tensor is first filled with NaN, a pass over memory; nothing here reads before it writes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if gpu.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, and reads it when it starts


def uses_cuda_graph(gpu: GpuConfig, device: torch.device) -> bool:
    """Whether steps are replayed: gpu.cuda_graph, or where that is null, on every CUDA device.

    Raises:
        UserError: it is true and the device is another.
    """
    if gpu.cuda_graph and device.type != "cuda":
        raise UserError(f"gpu.cuda_graph=true: the run is on the {device.type}; only a CUDA device records graphs")
    return device.type == "cuda" if gpu.cuda_graph is None else gpu.cuda_graph


def make_optimiser(model: nn.Module, recipe: DatasetConfig) -> torch.optim.SGD:
    """Stochastic gradient descent with momentum; weight decay on the weights of convolutions and classifiers only.

    It is fused because only that reads the learning rate from a tensor, as a captured step must.
    """
    decayed = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    is_decayed = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in is_decayed]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=True)  # every step sets the rate


def forward(model: nn.Module, images: Tensor, gpu: GpuConfig) -> Tensor:
    """Logits, in float32 whatever the precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=gpu.precision == "bf16"):
        logits: Tensor = model(images)
    return logits.float()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to capture on: the current one, unless that is the default stream, which no graph can capture.

    Runs that are replayed side by side must each be captured on a stream of its own: cuBLAS keeps one workspace a
    stream, whose address the graphs captured there hold.
    """
    here = torch.cuda.current_stream(device)
    return torch.cuda.Stream(device) if here == torch.cuda.default_stream(device) else here


def run_on_stream(call: Callable[[], Tensor], stream: torch.cuda.Stream) -> Tensor:
    """Call a function on the stream on which `capture` will capture it."""
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
    """Capture the launches of a function, which runs only when they are replayed.

    What other streams have been given goes on meanwhile, but is waited for before the capture begins; nothing else
    may be launched until it ends.

    Args:
        call: it was called by run_on_stream before, on the same stream, and does not wait for the device.
        stream: not the default one.
        pool: of memory, from torch.cuda.graph_pool_handle, for graphs that are never replayed at the same time; None is
            one of the graph's own.

    Returns:
        The graph, and the tensor that each replay writes its result to.

    Raises:
        CaptureFailed: whatever it was; this process can capture no other graph then.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # the graph has memory of its own: what earlier calls left goes back first
    torch.cuda.empty_cache()
    here = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = call()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # a capture that cannot be ended leaves its own stream the current one
        raise CaptureFailed(f"a CUDA graph could not be captured: {error}") from error
    return graph, result


class CaptureFailed(RuntimeError):
    """A CUDA graph could not be captured, and PyTorch believes that its capture still goes on."""


class TrainingStep:
    """Training steps of one network, captured as a CUDA graph after the first few where that is asked for.

    Args:
        model: on its device, in training mode.
        optimiser: from make_optimiser; whatever checkpoint it goes on from has been loaded.
        make_batch: from a tensor of draws, on the device, to images [N, C, H, W] and labels [N]. Where steps are
            recorded it is captured too, so it must not wait for the device, and all draws are of one shape.
        gpu: precision, and whether to capture.
        device: the model's.

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
    ) -> None:
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
            # An evaluation is captured into the same pool. They never run at once, and neither leaves there what the
            # other may not write over: each reads what it has itself just written, or tensors that stay referenced
            # (weights, gradients, draws, results), whose memory is not given to the graph captured later.
            self.pool = torch.cuda.graph_pool_handle()
        self.eager_steps_left = EAGER_STEPS
        self.graph: torch.cuda.CUDAGraph | None = None
        self.draws = self.result = self.rate  # what the graph reads and writes, once there is one

    def __call__(self, draws: Tensor, *, rate: float) -> Tensor:
        """Make one step, without waiting for the device.

        Args:
            draws: what make_batch is given, on the CPU.
            rate: learning rate.

        Returns:
            Mean loss and number of samples classified wrongly, float32 [2], still on the device.
        """
        self.rate.fill_(rate)
        if self.device.type == "cuda":
            draws = draws.pin_memory()  # from other memory the host would wait for the copy
        if not self.captures:
            return self._step(draws.to(self.device, non_blocking=True))
        if self.eager_steps_left:
            self.eager_steps_left -= 1
            return run_on_stream(lambda: self._step(draws.to(self.device, non_blocking=True)), self.stream)
        if self.graph is None:
            self.draws = draws.to(self.device)
            self.optimiser.zero_grad(set_to_none=True)  # captured gradients have memory of their own
            self.graph, self.result = capture(lambda: self._step(self.draws), self.stream, self.pool)
        self.draws.copy_(draws, non_blocking=True)
        self.graph.replay()
        return self.result.clone()  # the next replay writes over it

    def _step(self, draws: Tensor) -> Tensor:
        images, labels = self.make_batch(draws)
        self.optimiser.zero_grad(set_to_none=True)
        logits = forward(self.model, images, self.gpu)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return torch.stack([loss.detach(), (logits.detach().argmax(dim=1) != labels).sum()])
