"""How near each kernel function comes to a copy, in bytes a second, and how long one unit takes beside exact's.

The fewest bytes that a function can move are known: an activation of E elements of e bytes, with codes of k bytes an
element (k = e where there is no code and x itself is kept), needs

    copy                        2 e E         read and written
    channel_stats                 e E
    normalise_rectify_encode    (2 e + k) E   2 e where x is kept, for it is there already
    decode                      (k + e) E
    backward                    (3 e + 2 k) E dA and what is kept are read for the sums, and again for dX

Bytes over seconds, as a part of what a copy of the same activation reaches, is what is left of the card's bandwidth.
Measured are the activations of the network's own blocks at dataset.batch_size, 2 to 34 MB at 128, which a large cache
holds from one kernel to the next, and one activation that no cache holds. All take turns (timing.py); on a GPU a call
is a CUDA graph of several, so that the host's launching is not in the time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blpa import kernels
from blpa.kernels import Kernels
from blpa.models.preact_resnet import EXPANSION, GROUP_CHANNELS
from runners import provenance, records
from runners.config import Config, at_least, mode
from runners.errors import UserError
from runners.records import Record
from runners.timing import low_median_high, take_turns
from runners.training import network, steps
from runners.training.network import EPS

Call = Callable[[], Tensor]
Source = dict[str, Any]
Unit = tuple[int, int, int]
"""Channels in and out, and kernel size, of a unit's convolution."""

CHANNELS = 64
"""Channels of the activation that no cache holds."""
UNITS: tuple[Unit, ...] = ((64, 16, 1), (16, 16, 3), (16, 64, 1))
"""Those of the paper's blocks of the first group, which have the largest activations."""
CALLS = 10
"""Calls in a CUDA graph: it takes some 10 us to begin, a tenth of one call of the fastest function."""


@dataclass
class Settings:
    """Of this task."""

    name: str
    steps: int
    """Turns that are timed."""
    elements: int
    """Elements of an activation that no cache holds, besides those of the network."""


def check(config: Config) -> None:
    """Refuse no steps at all, and an activation of less than two elements."""
    at_least("task.steps", config.task.steps, 1)
    at_least("task.elements", config.task.elements, 2)


def folder(config: Config) -> str:
    """The run's name and the back end."""
    return f"{config.run}-kernels-{config.gpu.kernels}"


def run(config: Config) -> list[Record]:
    """Measure every back end that the machine has, or the one that gpu.kernels names, and print and record it.

    Args:
        config: one run, checked; its mode has codes or keeps x, task.elements is E of the activation that no cache
            holds, and gpu.precision is bf16 for activations of 2 bytes instead of 4.

    Returns:
        Seconds of each function and of the copy, as medians with 20 and 80 % quantiles, and each function's share of
        the copy's bandwidth; seconds of a unit.

    Raises:
        UserError: the machine lacks the back end, or the mode's layers are not ours.
    """
    if config.mode.layers != "coded":
        raise UserError(f"task=kernels mode={config.mode.name}: its layers are not ours; choose 8bit, 4bit or 2bit")
    run_dir = network.run_folder(config)
    device = network.device(config)
    names = [config.gpu.kernels]
    if config.gpu.kernels == "auto":
        names = ["triton", "inductor"] if device.type == "cuda" else ["inductor"]
    back_ends = [kernels.choose(name, device) for name in names]
    steps.configure_torch(network.used(config.gpu, device))
    source = provenance.source(config, device, back_ends[0].name)
    measured: list[Record] = []
    for batch, rows, channels in [*shapes(config), (0, max(2, config.task.elements // CHANNELS), CHANNELS)]:
        measured += _functions(config, back_ends, batch, rows, channels, device, source)
    for unit in UNITS:
        measured += _units(config, back_ends[0], unit, device, source)
    records.write(measured, run_dir)
    return measured


def shapes(config: Config) -> list[tuple[int, int, int]]:
    """Batch, rows and channels of the activations of the network's blocks: two for each group."""
    batch, factor = config.dataset.batch_size, config.width * config.mode.width_factor
    return [
        (batch, batch * (config.dataset.image_size >> group) ** 2, times * round(channels * factor))
        for group, channels in enumerate(GROUP_CHANNELS)
        for times in (1, EXPANSION)
    ]


def _functions(
    config: Config,
    back_ends: list[Kernels],
    batch: int,
    rows: int,
    channels: int,
    device: torch.device,
    source: Source,
) -> Iterator[Record]:
    """The four functions on one activation of a batch, beside a copy of it; 0 is one of no network."""
    dtype = torch.bfloat16 if config.gpu.precision == "bf16" else torch.float32
    x, grad = torch.randn(2, rows, channels, device=device, dtype=dtype)
    code = network.code(config.mode)
    e, k = dtype.itemsize, code.bits / 8 if code else dtype.itemsize
    moved = {
        "copy": 2 * e,
        "channel_stats": e,
        "normalise_rectify_encode": 2 * e + (k if code else 0),
        "decode": k + e,
        "backward": 3 * e + 2 * k,
    }
    out = torch.empty_like(x)
    calls: dict[tuple[str, str], Call] = {("copy", "stock"): lambda: out.copy_(x)}
    for back_end in back_ends:
        for name, call in _calls(back_end, x, grad, out, config).items():
            calls[name, back_end.name] = call
    seconds = _seconds(list(calls.values()), config.task.steps, f"functions, {rows} rows of {channels}", device)
    of_copy = seconds[:, 0]
    for (name, back_end_name), of_call in zip(calls, seconds.T, strict=True):
        shape = {"settings": {"rows": rows, "channels": channels}, "kernels": back_end_name, "batch_size": batch}
        yield _record(config, source, name, "s", of_call, **shape)
        if name != "copy":
            share = moved[name] / moved["copy"] * of_copy / of_call
            yield _record(config, source, f"{name}_share_of_copy", "", share, **shape)
        speed = moved[name] * rows * channels / of_call.median().item()
        print(f"{rows:8} x {channels:3}  {name:25} {back_end_name:9} {speed / 1e9:8.1f} GB/s")


def _calls(back_end: Kernels, x: Tensor, grad: Tensor, out: Tensor, config: Config) -> dict[str, Call]:
    """Each function of a back end, on the same activation; `out` is never its input, so that repeats do the same."""
    code = network.code(config.mode)
    gamma, beta = torch.linspace(-2, 2, 2 * x.shape[1], device=x.device).view(2, -1)
    vectors = back_end.channel_stats(x, gamma, beta, eps=EPS, code=code)
    codes = back_end.normalise_rectify_encode(x, vectors, code=code, out=out)
    kept = x if codes is None else codes
    counter = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)  # as a layer has one

    def encode() -> Tensor:
        back_end.normalise_rectify_encode(x, vectors, code=code, out=out)
        return out

    def decode() -> Tensor:
        back_end.decode(kept, vectors, code=code, out=out)
        return out

    return {
        "channel_stats": lambda: back_end.channel_stats(x, gamma, beta, eps=EPS, code=code, counter=counter),
        "normalise_rectify_encode": encode,
        "decode": decode,
        "backward": lambda: back_end.backward(
            grad, kept, vectors, code=code, constant_stats=False, out=out, counter=counter
        ),
    }


def _units(config: Config, back_end: Kernels, unit: Unit, device: torch.device, source: Source) -> Iterator[Record]:
    """One unit, forward and backward: the mode, exact, and exact through torch.compile."""
    in_channels, out_channels, kernel_size = unit
    batch = config.dataset.batch_size
    cells = [config, *(replace(config, mode=mode(name)) for name in ("exact", "compiled"))]
    calls = [_unit(cell, back_end, unit, batch, device) for cell in cells]
    name = f"unit {kernel_size}x{kernel_size} {in_channels} to {out_channels}"
    seconds = _seconds(calls, config.task.steps, name, device)
    for cell, of_call, ratio in zip(cells, seconds.T, (seconds / seconds[:, 1:2]).T, strict=True):
        settings = {"kernel_size": kernel_size, "in_channels": in_channels, "out_channels": out_channels}
        fields = {"settings": settings, "kernels": provenance.kernels_used(cell, back_end.name), "batch_size": batch}
        yield _record(cell, source, "unit_seconds", "s", of_call, **fields)
        yield _record(cell, source, "unit_ratio_to_exact", "times", ratio, **fields)
        print(f"{name}, batch {batch}: {cell.mode.name:10} {1e3 * of_call.median().item():.3f} ms, "
              f"{ratio.median().item():.2f} times exact")  # fmt: skip


def _unit(cell: Config, back_end: Kernels, unit: Unit, batch: int, device: torch.device) -> Call:
    """Forward and backward pass of batch norm, ReLU and convolution, on its own x and gradient."""
    in_channels, out_channels, kernel_size = unit
    made = network.layers(cell.mode, back_end)
    bn = made.batch_norm_relu(in_channels).to(device)
    conv = made.conv2d(in_channels, out_channels, kernel_size).to(device).to(memory_format=torch.channels_last)
    size = cell.dataset.image_size
    x = torch.randn(batch, in_channels, size, size, device=device).to(memory_format=torch.channels_last)
    grad = torch.randn(batch, out_channels, size, size, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, bn.weight, bn.bias, conv.weight]

    def forward(x: Tensor) -> Tensor:
        return conv.after(bn, x)

    compiled = torch.compile(forward, dynamic=False, fullgraph=True) if cell.mode.layers == "compiled" else forward

    def call() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cell.gpu.precision == "bf16"):
            out = compiled(x)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))[0]

    return call


def _seconds(calls: list[Call], turns: int, title: str, device: torch.device) -> Tensor:
    """Seconds [turns, calls] of each call."""
    on_gpu = device.type == "cuda"
    repeated = [_captured(call) if on_gpu else call for call in calls]
    for call in repeated:  # once untimed, also for the clock of a GPU to rise
        call()
    return take_turns(repeated, turns, title=title, device=device) / (CALLS if on_gpu else 1)


def _captured(call: Call) -> Callable[[], object]:
    """So many calls as one CUDA graph."""
    stream = steps.own_stream(torch.device("cuda"))
    for _ in range(steps.EAGER_STEPS):
        steps.run_on_stream(call, stream)
    graph, _ = steps.capture(lambda: [call() for _ in range(CALLS)][-1], stream)
    return graph.replay


def _record(config: Config, source: Source, metric: str, unit: str, values: Tensor, **fields: Any) -> Record:
    low, median, high = low_median_high(values)
    return provenance.record(
        config, source, metric=metric, unit=unit, value=median, low=low, high=high,
        n=len(values), iterations=len(values), depth=0, **fields,
    )  # fmt: skip
