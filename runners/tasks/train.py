"""Train and test one network: device, kernels, data, model, training, records, in that order, cheap refusals first."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from blpa import kernels
from runners import data, provenance, records
from runners.config import Config, at_least
from runners.records import Record
from runners.training import loop, network
from runners.training.turns import Turns


@dataclass
class Settings:
    """Of this task."""

    name: str
    evaluate_every: int
    """Training steps between evaluations on the test images; the last step is always evaluated."""
    checkpoint_every: int
    """Training steps between checkpoints."""
    keep_every: int | None
    """Training steps between checkpoints that are kept for good; null keeps the last two alone."""


def check(config: Config) -> None:
    """Refuse intervals below one step."""
    at_least("task.evaluate_every", config.task.evaluate_every, 1)
    at_least("task.checkpoint_every", config.task.checkpoint_every, 1)
    if config.task.keep_every is not None:
        at_least("task.keep_every", config.task.keep_every, 1)


def folder(config: Config) -> str:
    """The run's own name."""
    return config.run


def run(config: Config) -> list[Record]:
    """Train the configured network, or go on with it, and record what it came to.

    Args:
        config: one run, checked.

    Returns:
        Test error (%), training time (s) and speed (samples/s), as written to results/runs/<run>/records.json.

    Raises:
        UserError: the machine or the data cannot do what the configuration asks for.
        Stopped: the training came to a stop before its end (see loop.py).
    """
    begun = _begin(config)
    outcome = loop.train(begun.model, begun.images, begun.used, device=begun.device, run_dir=begun.run_dir)
    return _end(config, begun, outcome)


def in_turns(config: Config, stopping: loop.Stopping) -> Turns[list[Record]]:
    """As `run`, but that other runs have their turns between the steps of this (loop.in_turns)."""
    begun = _begin(config)
    outcome = yield from loop.in_turns(
        begun.model, begun.images, begun.used, device=begun.device, run_dir=begun.run_dir, stopping=stopping
    )
    return _end(config, begun, outcome)


class _Begun(NamedTuple):
    """What the training is given."""

    run_dir: Path
    device: torch.device
    used: Config
    """With the device and the back end that are really used."""
    images: data.ImageData
    model: nn.Module


def _begin(config: Config) -> _Begun:
    run_dir = network.run_folder(config)
    device = network.device(config)
    elements = network.encoded_elements(config, steps=config.dataset.iterations)
    chosen = kernels.choose(config.gpu.kernels, device, elements=elements)
    if device.type == "cpu" and config.gpu.name not in ("auto", "cpu"):
        print(f"gpu={config.gpu.name}: torch finds no CUDA device here; training on the CPU", file=sys.stderr)
    if config.gpu.kernels == "auto" and config.mode.layers == "coded":
        print(f"kernels: {chosen.name}\n", end="", file=sys.stderr)
    gpu = network.used(config.gpu, device)
    if gpu.precision != config.gpu.precision:
        print(f"precision: {gpu.precision}\n", end="", file=sys.stderr)
    used = replace(config, gpu=replace(gpu, device=device.type, kernels=chosen.name))
    images = data.load(config.dataset, device)
    return _Begun(run_dir, device, used, images, network.build(config, chosen))


def _end(config: Config, begun: _Begun, outcome: loop.Outcome) -> list[Record]:
    """Record what the training came to."""
    source = provenance.source(config, begun.device, begun.used.gpu.kernels)
    source |= provenance.merge_provenance(outcome.parts)
    measured = _records(config, outcome, source, begun.run_dir)
    records.write(measured, begun.run_dir)
    records.forget_failure(begun.run_dir)
    print(
        f"{config.run}: test error {outcome.test_error_percent:.2f} % after {outcome.iterations} iterations, "
        f"{outcome.seconds:.0f} s, {outcome.samples_per_second:.0f} samples/s"
    )
    return measured


def _records(config: Config, outcome: loop.Outcome, source: dict[str, Any], run_dir: Path) -> list[Record]:
    """What was measured; the records already there where the run was finished before and nothing was measured now."""
    if config.resume:
        before = records.read_run(run_dir)
        if any(record.metric == "train_seconds" and record.value == outcome.seconds for record in before):
            # A wall time in nanoseconds does not come twice: their date and commit stay true.
            return [replace(record, experiment=config.experiment, command=source["command"]) for record in before]

    return [
        provenance.record(
            config, source, metric=metric, unit=unit, value=value, low=value, high=value, n=1,
            iterations=outcome.iterations,
        )
        for metric, unit, value in (
            ("test_error_percent", "%", outcome.test_error_percent),
            ("train_seconds", "s", outcome.seconds),
            ("samples_per_second", "samples/s", outcome.samples_per_second),
        )
    ]  # fmt: skip
