"""The configured network: its device, its training step, and the bytes of that step.

A mode decides which layers a network is made of, what they save for the backward pass, and how wide they are:

    mode            layers      saved per BN-ReLU-conv                          width
    exact           stock       batch norm's input and ReLU's output            1
    fewer-features  stock       the same                                        1/4
    naive-8bit      coded       8-bit codes, fed forward as well                1
    8bit 4bit 2bit  coded       the codes                                       1
    exact-one-copy  coded       one full-precision tensor                       1
    checkpoint      checkpoint  nothing inside a segment of blocks              1
    offload         offload     the same as exact, in the host's memory         1
    compiled        compiled    what torch.compile chooses                      1
    compiled-...    compiled    the same within a budget, or in 8 bits          1

Each mode is a file of conf/mode. The last four are baselines: networks of stock layers, changed from outside by
baselines.py and offloading.py.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from blpa import kernels, memory
from blpa.codec import Codec
from blpa.kernels import Kernels
from blpa.layers import CodedLayers, Layers, StockLayers
from blpa.models.preact_resnet import ARCHITECTURES, EXPANSION, Architecture, PreActResNet
from runners.cells import folder_name
from runners.config import Config, GpuConfig, ModeConfig
from runners.errors import UserError
from runners.training import baselines, offloading, steps, world
from runners.training.reduction import reducer_of

META = torch.device("meta")
EPS = 1e-3
"""Added to the variance of every batch norm, as in the paper."""


def run_folder(config: Config) -> Path:
    """Free what earlier runs of this process left behind, and return the path of the run's folder.

    Runs under way in the same process are not affected: cached memory is unused, and no two runs that compile share a
    process (runners/streams.py).
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _forget_graphs(config)
    return Path(config.results) / "runs" / str(folder_name(config))


def _forget_graphs(config: Config) -> None:
    """Drop the compiled blocks of earlier runs and batch sizes; torch.compile limits their number."""
    if config.mode.layers == "compiled":
        torch.compiler.reset()


def device(config: Config) -> torch.device:
    """Return the device that gpu.device names.

    Raises:
        UserError: there is no such device, or it does not support the mode or gpu.cuda_graph.
    """
    gpu = config.gpu
    has_cuda = torch.cuda.is_available()
    if gpu.device == "cuda" and not has_cuda:
        raise UserError("gpu.device=cuda: torch finds no CUDA device on this machine; choose auto or cpu")
    found = torch.device("cuda" if has_cuda and gpu.device != "cpu" else "cpu")
    steps.uses_cuda_graph(gpu, found)
    if config.task.name != "max-batch":  # it predicts without a GPU
        _check_offload(found, config)
    if gpu.sync_batch_norm and found.type == "cpu" and config.mode.layers != "coded":
        raise UserError(f"gpu.sync_batch_norm=true with mode={config.mode.name}: PyTorch's SyncBatchNorm needs a GPU")
    return found


def _check_offload(device: torch.device, config: Config) -> None:
    """Raise UserError for a mode that offloads activations on a device other than CUDA."""
    if config.mode.layers == "offload" and device.type != "cuda":
        raise UserError(
            f"mode={config.mode.name}: it moves activations from a GPU to the host, and this run is on the "
            f"{device.type}; task=memory and task=max-batch count without a GPU what it takes"
        )


def precision(gpu: GpuConfig, device: torch.device) -> str:
    """Return the precision that a device computes in: tf32, bf16 or fp32.

    A CUDA GPU of compute capability 8.0 or later has tf32, PyTorch's default for convolutions there, and auto follows
    it. Other devices compute in fp32 instead. On the meta device fp32 stands for both: both have 4 bytes per element.

    Args:
        gpu: `precision`, which may be auto.
        device: where the run computes, or meta.
    """
    if gpu.precision not in ("auto", "tf32"):
        return gpu.precision
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if has_tf32 else "fp32"


def used(gpu: GpuConfig, device: torch.device) -> GpuConfig:
    """Return the options of the GPU group with the precision actually used on a device."""
    return replace(gpu, precision=precision(gpu, device))


def codec(mode: ModeConfig) -> Codec | None:
    """Make the codec of a mode; None where it saves full precision.

    Raises:
        ValueError: no codec has these bits or this clip.
    """
    return None if mode.bits is None else Codec(mode.bits, mode.clip)


def layers(mode: ModeConfig, kernels: Kernels, *, sync: bool = False) -> Layers:
    """Make the layer factory of a mode.

    Args:
        mode: the mode.
        kernels: backend of coded layers.
        sync: take the statistics of all processes.

    Raises:
        ValueError: as `codec`.
    """
    if mode.layers != "coded":
        return StockLayers(eps=EPS, sync=sync)
    return CodedLayers(
        codec=codec(mode),
        forward_from_code=mode.forward_from_code,
        kernels=kernels,
        eps=EPS,
        codes_max_pool=mode.codes_max_pool,
        sync=sync,
    )


def build(config: Config, kernels: Kernels) -> PreActResNet:
    """Build the configured network on the CPU, channels last, with weights drawn from the seed."""
    mode = config.mode
    torch.manual_seed(config.seed)
    network = PreActResNet(
        config.depth,
        layers=layers(mode, kernels, sync=config.gpu.sync_batch_norm),
        classes=config.dataset.classes,
        image_channels=config.dataset.image_channels,
        width=config.width * mode.width_factor,
        architecture=config.dataset.architecture,
    )
    if mode.layers == "compiled":
        baselines.compile_blocks(network.blocks, activation_memory_budget=mode.activation_memory_budget, fp8=mode.fp8)
    elif mode.layers == "checkpoint":
        network.blocks = baselines.CheckpointedBlocks(network.blocks, mode.segments)
    elif mode.layers == "offload":
        offloading.offload(network)
    return network.to(memory_format=torch.channels_last)


def encoded_elements(config: Config, *, steps: int) -> float:
    """Estimate the activation elements that a number of steps encode: of a block 4 c H W + c H W + c H W."""
    if config.mode.layers != "coded":
        return 0
    elements_per_image = sum(
        count * (EXPANSION + 2) * channels * size**2
        for count, (channels, size) in zip(_plan(config).blocks(config.depth), group_shapes(config), strict=True)
    )
    return elements_per_image * steps * config.dataset.batch_size


def largest_activation(config: Config, batch: int) -> int:
    """Count the elements of a batch's largest activation: the output of a block of the first group."""
    channels, size = group_shapes(config)[0]
    return batch * EXPANSION * channels * size**2


def group_shapes(config: Config) -> list[tuple[int, int]]:
    """Return for each group of blocks the channels c inside them, and the height of their output."""
    plan, width = _plan(config), config.width * config.mode.width_factor
    size = config.dataset.image_size // plan.stem_stride // (1 if plan.max_pool is None else plan.max_pool.stride)
    return [(round(channels * width), size >> group) for group, channels in enumerate(plan.group_channels)]


def has_max_pool(config: Config) -> bool:
    """Return whether the first block has a max pool."""
    return _plan(config).max_pool is not None


def _plan(config: Config) -> Architecture:
    return ARCHITECTURES[config.dataset.architecture]


def training_step(config: Config, batch: int, chosen: Kernels, device: torch.device) -> Callable[[], object]:
    """Make a function that runs whole training steps of the configured network, on random images.

    Args:
        config: the run.
        batch: samples per step of all processes that train together; each makes its part.
        chosen: the backend.
        device: where to train.

    Returns:
        A function that makes one step.

    Raises:
        UserError: the device does not support the mode.
    """
    _check_offload(device, config)
    size, channels = config.dataset.image_size, config.dataset.image_channels
    own = batch // world.current().size
    images = torch.randn(own, channels, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(config.dataset.classes, (own,), device=device)
    network = build(config, chosen).to(device)
    optimiser = steps.make_optimiser(network, config.dataset)
    gpu = used(config.gpu, device)
    step = steps.TrainingStep(
        network, optimiser, lambda _: (images, labels), gpu=gpu, device=device, reducer=reducer_of(network)
    )
    return lambda: step((), rate=0.01)


def training_bytes(config: Config, batch: int) -> memory.TrainingBytes:
    """Count the bytes of a training step on the meta device, at some batch and in the run's precision."""
    size, channels = config.dataset.image_size, config.dataset.image_channels
    _forget_graphs(config)
    with META:
        network = build(config, kernels.choose(config.gpu.kernels, META))
        images = torch.empty(batch, channels, size, size).to(memory_format=torch.channels_last)
        labels = torch.empty(batch, dtype=torch.int64)
        parts = {f"block {number}": block for number, block in enumerate(network.blocks, start=1)}
        is_bf16 = precision(config.gpu, META) == "bf16"
        counted = memory.training_bytes(network, images, labels, bf16=is_bf16, parts=parts)
    return replace(counted, host_bytes=offloading.peak_bytes(network))


def exact(config: Config) -> Config:
    """Return the baseline of a run: the same run with stock layers."""
    return replace(config, mode=ModeConfig(name="exact", layers="stock"))


def with_exact(config: Config) -> list[Config]:
    """Return the run and its baseline; the run alone if it is the baseline."""
    return [config] if config.mode == exact(config).mode else [config, exact(config)]


def on_card(config: Config, card_bytes: int) -> Config:
    """Return the run with its memory budget as a number: gpu.memory_gib=null is the GPU's own memory.

    Raises:
        UserError: gpu.memory_gib is null and there is no GPU.
    """
    if config.gpu.memory_gib is not None:
        return config
    if not card_bytes:
        raise UserError("gpu.memory_gib=null: here is no GPU to take it from; name a card, gpu=gtx1080ti, or its GiB")
    return replace(config, gpu=replace(config.gpu, memory_gib=round(card_bytes / memory.GIB, 2)))
