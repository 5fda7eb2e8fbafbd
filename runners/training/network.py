"""The configured network: its device, its weights, a training step of it, and the bytes of that step.

A mode says which layers a network is made of, what they save for the backward pass, and how wide they are:

    mode            layers      saved by a batch norm, ReLU and convolution     width
    exact           stock       batch norm's input and ReLU's output            1
    fewer-features  stock       the same                                        1/4
    naive-8bit      coded       8-bit codes, fed forward as well                1
    8bit 4bit 2bit  coded       the codes                                       1
    exact-one-copy  coded       one full-precision tensor                       1
    checkpoint      checkpoint  nothing inside a segment of blocks              1
    offload         offload     the same as exact, in the host's memory         1
    compiled        compiled    what torch.compile chooses                      1
    compiled-...    compiled    the same within a budget, or in 8 bits          1

The names and their values are the files of conf/mode. The last four are baselines: stock layers, and what baselines.py
and offloading.py do to the network made of them.
"""

import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from blpa import kernels, memory
from blpa.codec import Code
from blpa.kernels import Kernels
from blpa.layers import CodedLayers, Layers, StockLayers
from blpa.models.preact_resnet import EXPANSION, GROUP_CHANNELS, PreActResNet
from runners.cells import folder_name
from runners.config import Config, GpuConfig, ModeConfig
from runners.errors import UserError
from runners.training import baselines, offloading, steps

META = torch.device("meta")
NO_DRAWS = torch.zeros(1)
EPS = 1e-3
"""Added to the variance of every batch norm, as in the paper."""


def run_folder(config: Config) -> Path:
    """Begin a run: let go of what earlier runs of this process left behind, and name the run's folder.

    Runs under way beside it lose nothing: what is cached is in nobody's use, and compiled cells have no compiled others
    beside them (runners/streams.py).
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _forget_graphs(config)
    return Path(config.results) / "runs" / str(folder_name(config))


def _forget_graphs(config: Config) -> None:
    """Begin without the compiled blocks of other runs or batch sizes, of which there may be only so many."""
    if config.mode.layers == "compiled":
        torch.compiler.reset()


def device(config: Config) -> torch.device:
    """The device that gpu.device names.

    Raises:
        UserError: it is cuda and there is none, or it cannot do what the mode or gpu.cuda_graph asks for.
    """
    gpu = config.gpu
    has_cuda = torch.cuda.is_available()
    if gpu.device == "cuda" and not has_cuda:
        raise UserError("gpu.device=cuda: torch finds no CUDA device on this machine; choose auto or cpu")
    found = torch.device("cuda" if has_cuda and gpu.device != "cpu" else "cpu")
    steps.uses_cuda_graph(gpu, found)
    if config.task.name != "max-batch":  # which predicts without a GPU
        _refuse_offload_on(found, config)
    return found


def _refuse_offload_on(device: torch.device, config: Config) -> None:
    if config.mode.layers == "offload" and device.type != "cuda":
        raise UserError(
            f"mode={config.mode.name}: it moves activations from a GPU to the host, and this run is on the "
            f"{device.type}; task=memory and task=max-batch count without a GPU what it takes"
        )


def precision(gpu: GpuConfig, device: torch.device) -> str:
    """The precision that a device really computes in: tf32, bf16 or fp32.

    A CUDA GPU of compute capability 8.0 or later has tf32, and PyTorch takes it there for convolutions unless told
    otherwise: so does auto. Other devices compute in fp32 what tf32 is asked for. On the meta device fp32 stands for
    both, whose tensors have 4 bytes an element.

    Args:
        gpu: its precision, which may be auto.
        device: where the run computes, or meta.
    """
    if gpu.precision not in ("auto", "tf32"):
        return gpu.precision
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if has_tf32 else "fp32"


def used(gpu: GpuConfig, device: torch.device) -> GpuConfig:
    """The options of the GPU group with the precision that is really used on a device."""
    return replace(gpu, precision=precision(gpu, device))


def code(mode: ModeConfig) -> Code | None:
    """The code that a mode saves; None where it saves full precision.

    Raises:
        ValueError: bits or clip for which there is no code.
    """
    return None if mode.bits is None else Code(mode.bits, mode.clip)


def layers(mode: ModeConfig, kernels: Kernels) -> Layers:
    """What a mode's network takes its layers from.

    Args:
        mode: the mode.
        kernels: backend of coded layers.

    Raises:
        ValueError: as `code`.
    """
    if mode.layers != "coded":
        return StockLayers(eps=EPS)
    return CodedLayers(code=code(mode), forward_from_code=mode.forward_from_code, kernels=kernels, eps=EPS)


def build(config: Config, kernels: Kernels) -> PreActResNet:
    """The configured network, its weights drawn from the seed, channels last, on the CPU."""
    mode = config.mode
    torch.manual_seed(config.seed)
    network = PreActResNet(
        config.depth,
        layers=layers(mode, kernels),
        classes=config.dataset.classes,
        image_channels=config.dataset.image_channels,
        width=config.width * mode.width_factor,
    )
    if mode.layers == "compiled":
        baselines.compile_blocks(network.blocks, activation_memory_budget=mode.activation_memory_budget, fp8=mode.fp8)
    elif mode.layers == "checkpoint":
        network.blocks = baselines.CheckpointedBlocks(network.blocks, mode.segments)
    elif mode.layers == "offload":
        offloading.offload(network)
    return network.to(memory_format=torch.channels_last)


def encoded_elements(config: Config, *, steps: int) -> float:
    """Activation elements that so many steps encode: 168 n H W an image for n blocks a group, at width 1."""
    if config.mode.layers != "coded":
        return 0
    width = config.width * config.mode.width_factor
    elements_an_image = 168 * (config.depth - 2) // 9 * config.dataset.image_size**2 * width
    return elements_an_image * steps * config.dataset.batch_size


def largest_activation(config: Config, batch: int) -> int:
    """Elements of the largest activation of a batch: what a block of the first group puts out."""
    channels = EXPANSION * round(GROUP_CHANNELS[0] * config.width * config.mode.width_factor)
    return batch * channels * config.dataset.image_size**2


def load_weights(model: nn.Module, file: Path) -> None:
    """Give a model the weights of a checkpoint, of whatever mode: task.checkpoint.

    Raises:
        UserError: there is no such file, or it holds other weights.
    """
    if not file.is_file():
        raise UserError(f"task.checkpoint={file}: there is no such file")
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    except (RuntimeError, LookupError, EOFError, TypeError, pickle.UnpicklingError) as error:  # as any file may end
        said = "no file of torch.save's" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        reason = f"{type(error).__name__}: {said}"
        raise UserError(f"task.checkpoint={file} holds no weights of this network ({reason})") from error


def training_step(config: Config, batch: int, chosen: Kernels, device: torch.device) -> Callable[[], object]:
    """Whole training steps of the configured network, on random images of the data set's size.

    Args:
        config: the run.
        batch: samples a step.
        chosen: the back end.
        device: where.

    Returns:
        A function that makes one step.

    Raises:
        UserError: the device cannot do what the mode asks for.
    """
    _refuse_offload_on(device, config)
    size, channels = config.dataset.image_size, config.dataset.image_channels
    images = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(config.dataset.classes, (batch,), device=device)
    network = build(config, chosen).to(device)
    optimiser = steps.make_optimiser(network, config.dataset)
    gpu = used(config.gpu, device)
    step = steps.TrainingStep(network, optimiser, lambda _: (images, labels), gpu=gpu, device=device)
    return lambda: step(NO_DRAWS, rate=0.01)


def training_bytes(config: Config, batch: int) -> memory.TrainingBytes:
    """Count a training step of the configured network at some batch on the meta device, in its precision."""
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
    """The same run with stock layers, which the configured mode is compared with."""
    return replace(config, mode=ModeConfig(name="exact", layers="stock"))


def with_exact(config: Config) -> list[Config]:
    """The run, and where it is not exact itself, exact's beside it."""
    return [config] if config.mode == exact(config).mode else [config, exact(config)]


def on_card(config: Config, card_bytes: int) -> Config:
    """The run with its budget in numbers: gpu.memory_gib=null is the card's own memory.

    Raises:
        UserError: there is no card whose memory it could be.
    """
    if config.gpu.memory_gib is not None:
        return config
    if not card_bytes:
        raise UserError("gpu.memory_gib=null: here is no GPU to take it from; name a card, gpu=gtx1080ti, or its GiB")
    return replace(config, gpu=replace(config.gpu, memory_gib=round(card_bytes / memory.GIB, 2)))
