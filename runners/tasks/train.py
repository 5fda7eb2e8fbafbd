"""Train and test one network: device, kernels, data, model, training, records, in that order, cheap checks first."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from blpa import kernels
from runners import data, provenance, records
from runners.cells import PROCESSES, gpu_changes
from runners.checks import at_least
from runners.config import Config
from runners.records import Record
from runners.training import loop, network, world
from runners.training.stopping import Stopping
from runners.training.turns import Turns


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    evaluate_every: int
    """Training steps between evaluations on the test images; the last step is always evaluated."""
    checkpoint_every: int
    """Training steps between checkpoints."""
    keep_every: int | None
    """Training steps between checkpoints that are never removed; null keeps only the last two."""


def check(config: Config) -> None:
    """Check that intervals are at least one step."""
    at_least("task.evaluate_every", config.task.evaluate_every, 1)
    at_least("task.checkpoint_every", config.task.checkpoint_every, 1)
    if config.task.keep_every is not None:
        at_least("task.keep_every", config.task.keep_every, 1)


def folder(config: Config) -> str:
    """Name the folder by the run."""
    return config.run


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide speed, and the last bits of an error, and have no column of a record."""
    return gpu_changes(config, "cuda_graph", "deterministic", *PROCESSES)


def run(config: Config) -> list[Record]:
    """Train the configured network, or continue its training, and record the result.

    Args:
        config: one run, checked.

    Returns:
        Test error (%), training time (s) and speed (samples/s), as written to results/runs/<run>/records.json.

    Raises:
        UserError: the machine or the data do not support the configuration.
        Stopped: the training stopped before its end (see loop.py).
    """
    with world.current().together():
        begun = _begin(config)
    outcome = loop.train(begun.model, begun.images, begun.used, device=begun.device, run_dir=begun.run_dir)
    return _end(config, begun, outcome)


def in_turns(config: Config, stopping: Stopping) -> Turns[list[Record]]:
    """Train as `run` does, but yield to other runs after each step (loop.in_turns)."""
    begun = _begin(config)
    outcome = yield from loop.in_turns(
        begun.model, begun.images, begun.used, device=begun.device, run_dir=begun.run_dir, stopping=stopping
    )
    return _end(config, begun, outcome)


class _Begun(NamedTuple):
    """The arguments of the training."""

    run_dir: Path
    device: torch.device
    used: Config
    """The run with the device and backend actually used."""
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
    """Record and print the result of the training."""
    source = provenance.source(config, begun.device, begun.used.gpu.kernels)
    source |= provenance.merge_provenance(outcome.parts)
    measured = _records(config, outcome, source, begun.run_dir)
    if not world.current().is_first:
        return measured
    records.write(measured, begun.run_dir)
    records.forget_failure(begun.run_dir)
    top5 = outcome.test_top5_error_percent
    of_five = "" if top5 is None else f", top-5 {top5:.2f} %,"
    print(
        f"{config.run}: test error {outcome.test_error_percent:.2f} %{of_five} after {outcome.iterations} iterations, "
        f"{outcome.seconds:.0f} s, {outcome.samples_per_second:.0f} samples/s"
    )
    return measured


def _records(config: Config, outcome: loop.Outcome, source: dict[str, Any], run_dir: Path) -> list[Record]:
    """Make the records of a run; return the existing ones if the run was finished before."""
    if config.resume:
        before = records.read_run(run_dir)
        if any(record.metric == "train_seconds" and record.value == outcome.seconds for record in before):
            # No two runs have the same wall time in nanoseconds: date and commit of the records stay valid.
            return [replace(record, experiment=config.experiment, command=source["command"]) for record in before]

    return [
        provenance.record(
            config, source, metric=metric, unit=unit, value=value, low=value, high=value, n=1,
            iterations=outcome.iterations, settings=settings_of(config),
        )
        for metric, unit, value in (
            ("test_error_percent", "%", outcome.test_error_percent),
            (loop.TOP5, "%", outcome.test_top5_error_percent),
            ("train_seconds", "s", outcome.seconds),
            ("samples_per_second", "samples/s", outcome.samples_per_second),
        )
        if value is not None
    ]  # fmt: skip
