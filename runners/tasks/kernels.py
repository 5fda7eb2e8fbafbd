"""Bandwidth of each kernel relative to a copy, and time of one BN-ReLU-conv relative to stock layers.

The least number of bytes that a function moves, for an activation of E elements of e bytes and codes of k bytes per
element (k = e where x itself is saved instead of codes), is

    copy                        2 e E         read and write
    channel_stats                 e E
    normalise_rectify_encode    (2 e + k) E   2 e E where x is saved, as it is already in memory
    decode                      (k + e) E
    backward                    (3 e + 2 k) E dA and the saved tensor are read twice, for the sums and for dX

Bandwidth is these bytes over the seconds. Its ratio to the bandwidth of a copy of the same activation shows how close a
kernel is to the limit of the device. The activations are those of the network's own blocks at dataset.batch_size, 2 to
34 MB at batch 128, which stay in a large cache between kernels, and one that fits no cache. All calls are timed in turn
(timing.py). On a GPU a call is a CUDA graph of several calls, so the time does not include the host's launches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blpa import kernels
from blpa.kernels import Kernels
from blpa.models.preact_resnet import EXPANSION
from runners import provenance, records
from runners.cells import gpu_changes
from runners.checks import at_least
from runners.config import Config
from runners.errors import UserError
from runners.option_files import mode
from runners.records import Record
from runners.timing import low_median_high, take_turns
from runners.training import network, steps
from runners.training.network import EPS

Call = Callable[[], Tensor]
Source = dict[str, Any]
Shape = tuple[int, int, int]
"""Input channels, output channels and kernel size of the convolution of a BN-ReLU-conv."""

CHANNELS = 64
"""Channels of the activation that fits no cache."""
SHAPES: tuple[Shape, ...] = ((64, 16, 1), (16, 16, 3), (16, 64, 1))
"""The BN-ReLU-convs of the paper's blocks of the first group, which have the largest activations."""
CALLS = 10
"""Calls per CUDA graph: a graph takes about 10 us to start, a tenth of one call of the fastest function."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    steps: int
    """Number of timed turns."""
    elements: int
    """Elements of the activation that fits no cache."""


def check(config: Config) -> None:
    """Check that there is at least one turn, and an activation of at least two elements."""
    at_least("task.steps", config.task.steps, 1)
    at_least("task.elements", config.task.elements, 2)


def folder(config: Config) -> str:
    """Name the folder by the run and the backend."""
    return f"{config.run}-kernels-{config.gpu.kernels}"


def run(config: Config) -> list[Record]:
    """Measure the backend that gpu.kernels names, or every backend of the machine; record and print the result.

    Args:
        config: one run, checked; its mode saves codes or x, task.elements is E of the activation that fits no cache,
            and gpu.precision is bf16 for activations of 2 bytes per element instead of 4.

    Returns:
        Seconds of each function and of the copy, as medians with 20 and 80 % quantiles; each function's bandwidth as a
        share of the copy's; seconds of a BN-ReLU-conv.

    Raises:
        UserError: the machine lacks the backend, or the mode's layers are not ours.
    """
    if config.mode.layers != "coded":
        raise UserError(f"task=kernels mode={config.mode.name}: its layers are not ours; choose 8bit, 4bit or 2bit")
    run_dir = network.run_folder(config)
    device = network.device(config)
    names = [config.gpu.kernels]
    if config.gpu.kernels == "auto":
        names = ["triton", "inductor"] if device.type == "cuda" else ["inductor"]
    backends = [kernels.choose(name, device) for name in names]
    steps.configure_torch(network.used(config.gpu, device))
    source = provenance.source(config, device, backends[0].name)
    measured: list[Record] = []
    lines: list[str] = []
    for batch, rows, channels in [*shapes(config), (0, max(2, config.task.elements // CHANNELS), CHANNELS)]:
        measured += _functions(config, backends, batch, rows, channels, device, source, lines)
    for shape in SHAPES:
        measured += _bn_relu_conv(config, backends[0], shape, device, source, lines)
    records.write(measured, run_dir)
    print(*lines, sep="\n")
    return measured


def shapes(config: Config) -> list[tuple[int, int, int]]:
    """Return batch, rows and channels of the activations of the network's blocks: two shapes per group."""
    batch = config.dataset.batch_size
    return [
        (batch, batch * size**2, times * channels)
        for channels, size in network.group_shapes(config)
        for times in (1, EXPANSION)
    ]


def _functions(
    config: Config,
    backends: list[Kernels],
    batch: int,
    rows: int,
    channels: int,
    device: torch.device,
    source: Source,
    lines: list[str],
) -> Iterator[Record]:
    """Measure the four functions and a copy on one activation; batch 0 marks the one that is not of the network."""
    dtype = torch.bfloat16 if config.gpu.precision == "bf16" else torch.float32
    x, grad = torch.randn(2, rows, channels, device=device, dtype=dtype)
    codec = network.codec(config.mode)
    e, k = dtype.itemsize, codec.bits / 8 if codec else dtype.itemsize
    moved = {
        "copy": 2 * e,
        "channel_stats": e,
        "normalise_rectify_encode": 2 * e + (k if codec else 0),
        "decode": k + e,
        "backward": 3 * e + 2 * k,
    }
    out = torch.empty_like(x)
    calls: dict[tuple[str, str], Call] = {("copy", "stock"): lambda: out.copy_(x)}
    for backend in backends:
        for name, call in _calls(backend, x, grad, out, config).items():
            calls[name, backend.name] = call
    seconds = _seconds(list(calls.values()), config.task.steps, f"functions, {rows} rows of {channels}", device)
    of_copy = seconds[:, 0]
    for (name, backend_name), of_call in zip(calls, seconds.T, strict=True):
        settings = {"rows": rows, "channels": channels, **gpu_changes(config, "deterministic")}
        shape = {"settings": settings, "kernels": backend_name, "batch_size": batch}
        yield _record(config, source, name, "s", of_call, **shape)
        if name != "copy":
            share = moved[name] / moved["copy"] * of_copy / of_call
            yield _record(config, source, f"{name}_share_of_copy", "", share, **shape)
        speed = moved[name] * rows * channels / of_call.median().item()
        lines.append(f"{rows:8} x {channels:3}  {name:25} {backend_name:9} {speed / 1e9:8.1f} GB/s")


def _calls(backend: Kernels, x: Tensor, grad: Tensor, out: Tensor, config: Config) -> dict[str, Call]:
    """Make a call of each function of a backend; none writes over its input, so repeats do the same work."""
    codec = network.codec(config.mode)
    gamma, beta = torch.linspace(-2, 2, 2 * x.shape[1], device=x.device).view(2, -1)
    vectors = backend.channel_stats(x, gamma, beta, eps=EPS, codec=codec)
    codes = backend.normalise_rectify_encode(x, vectors, codec=codec, out=out)
    saved = x if codes is None else codes
    counter = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)  # as in a layer

    def encode() -> Tensor:
        backend.normalise_rectify_encode(x, vectors, codec=codec, out=out)
        return out

    def decode() -> Tensor:
        backend.decode(saved, vectors, codec=codec, out=out)
        return out

    return {
        "channel_stats": lambda: backend.channel_stats(x, gamma, beta, eps=EPS, codec=codec, counter=counter),
        "normalise_rectify_encode": encode,
        "decode": decode,
        "backward": lambda: backend.backward(
            grad, saved, vectors, codec=codec, constant_stats=False, out=out, counter=counter
        ),
    }


def _bn_relu_conv(
    config: Config, backend: Kernels, shape: Shape, device: torch.device, source: Source, lines: list[str]
) -> Iterator[Record]:
    """Measure forward and backward pass of one BN-ReLU-conv: the mode, exact, and exact through torch.compile."""
    in_channels, out_channels, kernel_size = shape
    batch = config.dataset.batch_size
    cells = [config, *(replace(config, mode=mode(name)) for name in ("exact", "compiled"))]
    calls = [_forward_backward(cell, backend, shape, batch, device) for cell in cells]
    name = f"BN-ReLU-conv {kernel_size}x{kernel_size} {in_channels} to {out_channels}"
    seconds = _seconds(calls, config.task.steps, name, device)
    for cell, of_call, ratio in zip(cells, seconds.T, (seconds / seconds[:, 1:2]).T, strict=True):
        settings = {"kernel_size": kernel_size, "in_channels": in_channels, "out_channels": out_channels}
        settings |= gpu_changes(config, "deterministic")
        fields = {"settings": settings, "kernels": provenance.kernels_used(cell, backend.name), "batch_size": batch}
        yield _record(cell, source, "unit_seconds", "s", of_call, **fields)
        yield _record(cell, source, "unit_ratio_to_exact", "times", ratio, **fields)
        lines.append(
            f"{name}, batch {batch}: {cell.mode.name:10} {1e3 * of_call.median().item():.3f} ms, "
            f"{ratio.median().item():.2f} times exact"
        )


def _forward_backward(cell: Config, backend: Kernels, shape: Shape, batch: int, device: torch.device) -> Call:
    """Make a call of forward and backward pass of one BN-ReLU-conv, with its own input and gradient."""
    in_channels, out_channels, kernel_size = shape
    made = network.layers(cell.mode, backend)
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
    """Measure seconds [turns, calls] of each call."""
    on_gpu = device.type == "cuda"
    repeated = [_captured(call) if on_gpu else call for call in calls]
    for call in repeated:  # once untimed, so that a GPU raises its clock
        call()
    return take_turns(repeated, turns, title=title, device=device) / (CALLS if on_gpu else 1)


def _captured(call: Call) -> Callable[[], object]:
    """Capture CALLS calls as one CUDA graph, and return its replay."""
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
