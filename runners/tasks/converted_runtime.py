"""Time per sample of a training step of another network, converted, and its ratio to the network as PyTorch runs it.

    ratio = median over turns of  seconds per sample(converted) / seconds per sample(PyTorch's own)

All start from the same weights and are timed in turn (timing.py). A step is forward, cross entropy, backward and
update, on random images, after two warm-up steps. On a GPU it is captured as a CUDA graph, unless gpu.cuda_graph=false:
launched one by one, the many small operations of a converted network take the host longer than a fast GPU. A turn is
five steps there, and the memory that the allocator reserves for one forward and backward pass is recorded too.
"""

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import blpa
from blpa.kernels import library
from blpa.memory import MIB
from runners import provenance, records
from runners.cells import batch_name, gpu_changes
from runners.checks import at_least, one_of
from runners.config import Config, GpuConfig, options
from runners.errors import UserError, classify, first_line
from runners.option_files import mode
from runners.records import Record
from runners.timing import Call, calls_per_turn, low_median_high, take_turns
from runners.training import models, network, steps

WARM_UP = 2
"""Untimed steps: kernels are compiled and momentum buffers made."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    model: str
    """One of torchvision's classifiers, or unet."""
    image_size: int
    """Height and width of the images in pixels."""
    channels_last: bool
    """Whether images and weights are channels-last in memory."""
    steps: int
    """Number of timed turns, each of one training step, or five on a GPU."""
    modes: list[str]
    """Modes to time and record beside the configured one, in the same process."""


def check(config: Config) -> None:
    """Check that the modes are of `convert`, and that nothing is asked for that this task does not do."""
    at_least("task.steps", config.task.steps, 1)
    models.check(config)
    for name in config.task.modes:
        one_of("task.modes", name, options("mode", config.config_dir))
        models.check_mode("task.modes", mode(name, config.config_dir))
    if config.gpu.kernels != "auto":
        raise UserError(f"gpu.kernels={config.gpu.kernels}: a converted network chooses by its device; leave it out")


def folder(config: Config) -> str:
    """Name the folder by the run, the network, the images, the batch size and the layout."""
    task = config.task
    layout = "-channels-last" if task.channels_last else ""
    return f"{config.run}-converted-runtime-{task.model}-{task.image_size}-{batch_name(config)}{layout}"


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the numbers and have no column."""
    task = config.task
    settings = {"model": task.model, "image_size": task.image_size, "channels_last": task.channels_last}
    return settings | gpu_changes(config, "cuda_graph", "deterministic")


def run(config: Config) -> list[Record]:
    """Time the steps; record and print times, ratios and, on a GPU, the memory reserved.

    Args:
        config: one run, checked; dataset.batch_size is the batch.

    Returns:
        Of PyTorch's own, recorded as exact, and of each mode: seconds per sample, for modes the ratio to exact, both as
        medians with 20 and 80 % quantiles, and on a GPU MiB per sample.

    Raises:
        UserError: there is no such network, or its images must be larger, or the machine lacks what the run needs.
    """
    run_dir, device, batch = network.run_folder(config), network.device(config), config.dataset.batch_size
    gpu = network.used(config.gpu, device)
    model, images = _model_and_images(config, device)
    # Replays take turns, and leave nothing in this memory that the next one reads.
    pool = torch.cuda.graph_pool_handle() if steps.uses_cuda_graph(gpu, device) else None
    timed: dict[str, _Timed] = {}
    for cell in (network.exact(config), *_cells(config)):
        try:
            timed[cell.mode.name] = _timed(cell, _as_in(cell, copy.deepcopy(model), device), images, gpu, pool)
        except RuntimeError as error:
            if "deterministic implementation" in str(error):
                raise UserError(f"gpu.deterministic=true: {first_line(error)}; give gpu.deterministic=false") from error
            exit_code, reason = classify(error)
            if isinstance(error, steps.CaptureFailed):  # nor can any other network be captured in this process
                raise UserError(f"{first_line(error)}; gpu.cuda_graph=false launches steps kernel by kernel") from error
            if exit_code is None or cell == config:
                raise
            print(f"{reason}; {cell.mode.name} is not timed", file=sys.stderr)
    seconds = take_turns(
        [one.step for one in timed.values()], config.task.steps, title="timed steps of each mode", device=device
    )
    times = dict(zip(timed, seconds.unbind(1), strict=True))

    source = provenance.source(config, device, library.kernels_name(device))
    measured = []
    for name, one in timed.items():
        found = [("seconds_per_sample", "s", times[name] / batch)]
        if name != "exact" and "exact" in times:
            found.append(("ratio_to_exact", "times", times[name] / times["exact"]))
        if one.reserved is not None:
            found.append(
                ("reserved_mib", "MiB/sample", torch.tensor([one.reserved / batch / MIB], dtype=torch.float64))
            )
        for metric, unit, values in found:
            low, median, high = low_median_high(values)
            steps_timed = 1 if metric == "reserved_mib" else len(values) * calls_per_turn(device)
            measured.append(
                provenance.record(
                    one.cell, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
                    iterations=steps_timed, depth=0, settings=settings_of(config),
                    kernels="stock" if name == "exact" else source["kernels"],
                )
            )  # fmt: skip
    records.write(measured, run_dir)
    for record in measured:
        scale, unit = (1e3, "ms per sample") if record.unit == "s" else (1.0, record.unit)
        spread = f" (20 to 80 %: {scale * record.low:.3f} to {scale * record.high:.3f})" if record.n > 1 else ""
        shown = {"times": "times PyTorch's own", "MiB/sample": "MiB per sample reserved"}.get(unit, unit)
        print(f"{config.task.model}, {record.mode}: {scale * record.value:.3f} {shown}{spread}")
    return measured


@dataclass(frozen=True)
class _Timed:
    """A network to be timed; `reserved` bytes are known on a GPU alone."""

    cell: Config
    step: Call
    reserved: int | None


def launched_step(config: Config) -> Call:
    """Make the training step of the configured network that `run` times, launched kernel by kernel, not warmed up."""
    device = network.device(config)
    model, images = _model_and_images(config, device)
    return _steps(config, _as_in(config, model, device), images, network.used(config.gpu, device)).step


def _model_and_images(config: Config, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Set PyTorch's options, and make the network, on the CPU as PyTorch runs it, and a batch of random images."""
    steps.configure_torch(network.used(config.gpu, device))
    torch.manual_seed(config.seed)
    shape = torch.Size((config.dataset.batch_size, 3, config.task.image_size, config.task.image_size))
    model = models.build(config.task.model, shape).to(memory_format=_memory_format(config))
    return model, torch.randn(shape, device=device).contiguous(memory_format=_memory_format(config))


def _memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.task.channels_last else torch.contiguous_format


def _as_in(cell: Config, model: nn.Module, device: torch.device) -> nn.Module:
    """Convert a network to the mode of a cell, in place, and move it to the device."""
    if cell.mode.bits is not None:
        blpa.convert(model, models.codec(cell.mode))
    return model.to(device)


def _cells(config: Config) -> list[Config]:
    """Return a configuration for each converted network, once."""
    others = dict.fromkeys(name for name in config.task.modes if name != config.mode.name)
    return [config, *(replace(config, mode=mode(name, config.config_dir)) for name in others)]


class _Steps(NamedTuple):
    """A network's forward and backward pass, and its whole training step: both return the loss."""

    backward: Callable[[], Tensor]
    step: Callable[[], Tensor]
    optimiser: torch.optim.Optimizer


def _steps(cell: Config, model: nn.Module, images: Tensor, gpu: GpuConfig) -> _Steps:
    """Make the steps of a network, launched kernel by kernel."""
    optimiser = steps.make_optimiser(model, cell.dataset)

    def backward() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=gpu.precision == "bf16"):
            outputs = tree_leaves(model(images))  # some networks have several heads
        loss = torch.stack([F.cross_entropy(one.float(), _labels(one)) for one in outputs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step() -> Tensor:
        loss = backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return _Steps(backward, step, optimiser)


def _timed(cell: Config, model: nn.Module, images: Tensor, gpu: GpuConfig, pool: Any) -> _Timed:
    """Make and warm up the step of a network, and capture it if `gpu` allows it."""
    backward, step, optimiser = _steps(cell, model, images, gpu)
    stream = steps.own_stream(images.device) if steps.uses_cuda_graph(gpu, images.device) else None
    launch: Call = step if stream is None else functools.partial(steps.run_on_stream, step, stream)
    launch()  # before memory is measured: kernels are compiled and convolutions chosen
    reserved = _reserved(backward, images.device) if images.is_cuda else None
    optimiser.zero_grad()
    for _ in range(WARM_UP - 1 + (steps.EAGER_STEPS if images.is_cuda else 0)):
        launch()
    if stream is None:
        return _Timed(cell, step, reserved)
    graph, _ = steps.capture(step, stream, pool)
    return _Timed(cell, graph.replay, reserved)


def _labels(logits: Tensor) -> Tensor:
    """Return class 0 for each sample, or each pixel, of logits [N, classes, ...]."""
    return torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=logits.device)


def _reserved(backward: Call, device: torch.device) -> int:
    """Measure the bytes by which reserved memory grows in one forward and backward pass, from an emptied cache."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before
