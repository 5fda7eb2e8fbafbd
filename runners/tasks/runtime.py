"""Time a sample of a training step, beside exact's: modes take turns (timing.py).

    ratio = median over pairs of  seconds a sample(mode) / seconds a sample(exact)

A step is forward, loss, backward and update, of random images of the data set's size, after two steps to warm up. On a
GPU a turn is five steps that are enqueued one behind the other, and their mean is one measurement: n counts turns, and
iterations counts steps. Both modes have dataset.batch_size, or, with task.largest_batch, each its own largest batch as
max-batch found it.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blpa import kernels
from blpa.kernels import Kernels
from runners import provenance, records
from runners.cells import batch_name, card_name, overrides, task_settings
from runners.config import Config, at_least, mode, one_of, options
from runners.errors import Stopped, UserError, classify
from runners.records import Record
from runners.tasks import max_batch
from runners.timing import Call, calls_per_turn, low_median_high, take_turns
from runners.training import network, segments, steps

WARM_UP = 2
"""Steps before those that are timed, besides those before a CUDA graph is captured."""


@dataclass
class Settings:
    """Of this task."""

    name: str
    steps: int
    """Turns that are timed, each of one training step, of five on a GPU."""
    modes: list[str]
    """Modes that are timed in turn with the configured one and exact, in one process, and recorded like it."""
    largest_batch: bool
    """Time each mode at its largest batch as max-batch found it for gpu.memory_gib, not at dataset.batch_size."""


def check(config: Config) -> None:
    """Refuse no steps at all, and modes that there are not."""
    at_least("task.steps", config.task.steps, 1)
    for name in config.task.modes:
        one_of("task.modes", name, options("mode", config.config_dir))


def folder(config: Config) -> str:
    """The run's name, the batch and the back end."""
    batch = f"largest-batch-{card_name(config.gpu)}" if config.task.largest_batch else batch_name(config)
    return f"{config.run}-runtime-{batch}-{config.gpu.kernels}"


class DoesNotFit(Stopped):
    """Max-batch found that not one sample fits."""


@dataclass(frozen=True)
class _Timed:
    """A mode that is timed."""

    cell: Config
    batch: int
    segments: str
    step: Call


def run(config: Config) -> list[Record]:
    """Time the steps of the configured mode, of task.modes and of exact; print and record times and ratios.

    Args:
        config: one run, checked.

    Returns:
        Seconds a sample and the ratio to exact of each mode, each a median with 20 and 80 % quantiles. The ratio is
        left out for exact itself, which is not recorded unless it is asked for, and where exact's step does not fit the
        GPU.

    Raises:
        UserError: the machine cannot do what the configuration asks for, or no largest batch has been found yet.
        DoesNotFit: the mode's largest batch is none.
    """
    run_dir = network.run_folder(config)
    device = network.device(config)
    chosen = kernels.choose(config.gpu.kernels, device)
    steps.configure_torch(network.used(config.gpu, device))
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    asked = [config, *(replace(config, mode=mode(name)) for name in config.task.modes)]
    if config.task.largest_batch:
        asked = [network.on_card(cell, card) for cell in asked]
    timed: list[_Timed] = []
    cells = [asked[0], network.exact(asked[0]), *asked[1:]]
    for cell in [cell for place, cell in enumerate(cells) if cell not in cells[:place]]:
        try:
            timed.append(_timed(cell, chosen, device))
        except (RuntimeError, UserError) as error:
            exit_code, reason = classify(error)
            if not timed or exit_code is None:
                raise
            print(f"{reason}; {cell.mode.name} is not timed", file=sys.stderr)
            if isinstance(error, steps.CaptureFailed):
                print("no other mode can be captured in this process: those before it are timed", file=sys.stderr)
                break
    steps_of = [one.step for one in timed]
    seconds = take_turns(steps_of, config.task.steps, title="timed steps of each mode", device=device)
    seconds /= torch.tensor([one.batch for one in timed])

    exact = next((which for which, one in enumerate(timed) if one.cell == network.exact(one.cell)), None)
    source = provenance.source(config, device, chosen.name)
    measured = []
    for which, one in enumerate(timed):
        found = [("seconds_per_sample", "s", seconds[:, which])]
        if exact not in (None, which):
            found.append(("ratio_to_exact", "times", seconds[:, which] / seconds[:, exact]))
        for metric, unit, values in found:
            low, median, high = low_median_high(values)
            scale, shown = (1e3, f"ms a sample, batch {one.batch}") if unit == "s" else (1, "times exact")
            spread = f"(20 to 80 %: {scale * low:.3f} to {scale * high:.3f})"
            print(f"{one.cell.mode.name}: {scale * median:.3f} {shown} {spread}")
            if one.cell in asked:
                measured.append(
                    provenance.record(
                        one.cell, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
                        iterations=len(values) * calls_per_turn(device), batch_size=one.batch,
                        kernels=provenance.kernels_used(one.cell, chosen.name), segments=one.segments,
                        settings=settings_of(one.cell),
                    )
                )  # fmt: skip
    records.write(measured, run_dir)
    return measured


def settings_of(config: Config) -> dict[str, Any]:
    """Return what decides the time and has no column of a record."""
    gpu = config.gpu
    settings: dict[str, Any] = {}
    if config.task.largest_batch:
        settings |= {"largest_batch": True, **max_batch.settings_of(config)}
    if gpu.kernels != "auto" and config.mode.layers == "coded":
        settings["gpu.kernels"] = gpu.kernels
    if gpu.cuda_graph is not None:
        settings["gpu.cuda_graph"] = gpu.cuda_graph
    if not gpu.deterministic:
        settings["gpu.deterministic"] = False
    return settings


def _timed(cell: Config, chosen: Kernels, device: torch.device) -> _Timed:
    """A mode whose step has warmed up."""
    batch, kind = _largest_batch(cell, chosen, device) if cell.task.largest_batch else (cell.dataset.batch_size, "")
    if cell.task.largest_batch:
        segments.use(kind or segments.USUAL)  # for what it takes while its graph is captured: replays take nothing
    step = network.training_step(cell, batch, chosen, device)
    _warm_up(step, device)
    return _Timed(cell, batch, kind, step)


def _largest_batch(config: Config, chosen: Kernels, device: torch.device) -> tuple[int, str]:
    """What max-batch found for this network, budget, precision and back end: measured, or else predicted.

    Returns:
        The batch, and the kind of segments that it fits in; none is named where it was predicted.
    """
    counted = kernels.choose(config.gpu.kernels, network.META)  # by which a prediction is made
    settings = provenance.all_settings(config, max_batch.settings_of(config))
    found = [
        record
        for record in records.merge(Path(config.results))
        if record.metric == "largest_batch"
        and (record.dataset, record.mode, record.depth, record.width)
        == (config.dataset.name, config.mode.name, config.depth, config.width)
        and record.precision == network.precision(config.gpu, network.META if record.predicted else device)
        and record.settings == settings
        and record.kernels in ("stock", counted.name if record.predicted else chosen.name)
    ]
    best = max(found, key=lambda record: (not record.predicted, record.date), default=None)
    if best is None:
        asked = overrides(replace(config, task=task_settings("max-batch"), experiment="single"))
        command = shlex.join([*asked, f"results={config.results}"])
        raise UserError(f"task.largest_batch=true: none has been found for {config.mode.name} yet: blpa-run {command}")
    if not best.value:
        raise DoesNotFit(f"does not fit: {config.mode.name}, depth {config.depth}, not even batch 1")
    return int(best.value), best.segments


def _warm_up(step: Call, device: torch.device) -> None:
    for _ in range(WARM_UP + (steps.EAGER_STEPS if device.type == "cuda" else 0)):
        step()
