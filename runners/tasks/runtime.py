"""Time per sample of a training step, and its ratio to exact: modes are timed in turn (timing.py).

    ratio = median over turns of  seconds per sample(mode) / seconds per sample(exact)

A step is forward, loss, backward and update, on random images of the data set's size, after two warm-up steps. On a GPU
a turn is five steps, enqueued without waiting, and their mean is one measurement: n counts turns, iterations counts
steps. With several processes the batch is that of all, and a step has the exchange of their gradients. The modes run at
dataset.batch_size or, with task.largest_batch, each at its own largest batch from max-batch.
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
from runners.cells import PROCESSES, batch_name, card_name, gpu_changes, overrides, task_settings
from runners.checks import at_least, one_of
from runners.config import Config, options
from runners.errors import Stopped, UserError, classify
from runners.option_files import mode
from runners.records import Record
from runners.tasks import max_batch
from runners.texts import hydra_text
from runners.timing import Call, calls_per_turn, low_median_high, take_turns
from runners.training import network, segments, steps, world

WARM_UP = 2
"""Untimed steps before the timed ones, besides the warm-up steps before a CUDA graph is captured."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    steps: int
    """Number of timed turns, each of one training step, or five on a GPU."""
    modes: list[str]
    """Modes to time and record beside the configured one, in the same process."""
    largest_batch: bool
    """Time each mode at its largest batch from max-batch for gpu.memory_gib, not at dataset.batch_size."""


def check(config: Config) -> None:
    """Check that there is at least one turn, and that the modes exist."""
    at_least("task.steps", config.task.steps, 1)
    for name in config.task.modes:
        one_of("task.modes", name, options("mode", config.config_dir))


def folder(config: Config) -> str:
    """Name the folder by the run, the batch size and the backend."""
    batch = f"largest-batch-{card_name(config.gpu)}" if config.task.largest_batch else batch_name(config)
    return f"{config.run}-runtime-{batch}-{config.gpu.kernels}"


class DoesNotFit(Stopped):
    """Not even one sample fits, by the record of max-batch."""


@dataclass(frozen=True)
class _Timed:
    """A mode to be timed."""

    cell: Config
    batch: int
    segments: str
    step: Call


def run(config: Config) -> list[Record]:
    """Time the steps of the configured mode, of task.modes and of exact; record and print times and ratios.

    Args:
        config: one run, checked.

    Returns:
        Seconds per sample and the ratio to exact of each mode, as medians with 20 and 80 % quantiles. There is no
        ratio for exact itself, which is recorded only if it is in the configuration, or if exact does not fit the GPU.

    Raises:
        UserError: the machine does not support the configuration, or no largest batch has been found yet.
        DoesNotFit: not even one sample of the mode fits.
    """
    here = world.current()
    run_dir = network.run_folder(config)
    device = network.device(config)
    chosen = kernels.choose(config.gpu.kernels, device)
    steps.configure_torch(network.used(config.gpu, device))
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    requested = [config, *(replace(config, mode=mode(name, config.config_dir)) for name in config.task.modes)]
    if config.task.largest_batch:
        requested = [network.on_card(cell, card) for cell in requested]
    timed: list[_Timed] = []
    cells = [requested[0], network.exact(requested[0]), *requested[1:]]
    for cell in [cell for place, cell in enumerate(cells) if cell not in cells[:place]]:
        try:
            timed.append(_timed(cell, chosen, device))
        except (RuntimeError, UserError) as error:
            exit_code, reason = classify(error)
            is_of_all = here.is_alone or isinstance(error, UserError)  # else the others wait for this step's gradients
            if not timed or exit_code is None or not is_of_all:
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
    measured, lines = [], []
    for which, one in enumerate(timed):
        found = [("seconds_per_sample", "s", seconds[:, which])]
        if exact not in (None, which):
            found.append(("ratio_to_exact", "times", seconds[:, which] / seconds[:, exact]))
        for metric, unit, values in found:
            low, median, high = low_median_high(values)
            scale, shown = (1e3, f"ms per sample, batch {one.batch}") if unit == "s" else (1, "times exact")
            spread = f"(20 to 80 %: {scale * low:.3f} to {scale * high:.3f})"
            lines.append(f"{one.cell.mode.name}: {scale * median:.3f} {shown} {spread}")
            if one.cell in requested:
                measured.append(
                    provenance.record(
                        one.cell, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
                        iterations=len(values) * calls_per_turn(device), batch_size=one.batch,
                        kernels=provenance.kernels_used(one.cell, chosen.name), segments=one.segments,
                        settings=settings_of(one.cell),
                    )
                )  # fmt: skip
    if here.is_first:
        records.write(measured, run_dir)
        print(*lines, sep="\n")
    return measured


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the time and have no column of a record."""
    gpu = config.gpu
    settings: dict[str, Any] = {}
    if config.task.largest_batch:
        settings |= {"largest_batch": True, **max_batch.settings_of(config)}
    if gpu.kernels != "auto" and config.mode.layers == "coded":
        settings["gpu.kernels"] = gpu.kernels
    return settings | gpu_changes(config, "cuda_graph", "deterministic", *PROCESSES)


def _timed(cell: Config, chosen: Kernels, device: torch.device) -> _Timed:
    """Build and warm up the step of a mode."""
    batch, kind = _largest_batch(cell, chosen, device) if cell.task.largest_batch else (cell.dataset.batch_size, "")
    if cell.task.largest_batch:
        segments.use(kind or segments.USUAL)  # for the capture of its graph; a replay allocates nothing
    step = network.training_step(cell, batch, chosen, device)
    _warm_up(step, device)
    return _Timed(cell, batch, kind, step)


def _largest_batch(config: Config, chosen: Kernels, device: torch.device) -> tuple[int, str]:
    """Look up the largest batch for this network, budget, precision and backend: measured, or else predicted.

    Returns:
        The batch, and the kind of segments that it fits in; empty for a prediction.
    """
    counted = kernels.choose(config.gpu.kernels, network.META)  # the backend of predictions
    settings = provenance.all_settings(config, max_batch.settings_of(config))
    found = [
        record
        for record in records.merge(Path(config.results))
        if record.metric == "largest_batch"
        and (record.dataset, record.mode, record.depth, record.width)
        == (config.dataset.name, config.mode.name, config.depth, config.width)
        and record.precision == network.precision(config.gpu, network.META if record.predicted else device)
        and {name: value for name, value in record.settings.items() if name != "gpu.deterministic"} == settings
        and record.kernels in ("stock", counted.name if record.predicted else chosen.name)
    ]
    best = max(found, key=lambda record: (not record.predicted, record.date), default=None)
    if best is None:
        arguments = overrides(replace(config, task=task_settings("max-batch"), experiment="single"))
        command = shlex.join([*arguments, f"results={hydra_text(config.results)}"])
        raise UserError(f"task.largest_batch=true: none has been found for {config.mode.name} yet: blpa-run {command}")
    if not best.value:
        raise DoesNotFit(f"does not fit: {config.mode.name}, depth {config.depth}, not even batch 1")
    max_batch.remark_on_data(config, int(best.value))
    return int(best.value), best.segments


def _warm_up(step: Call, device: torch.device) -> None:
    for _ in range(WARM_UP + (steps.EAGER_STEPS if device.type == "cuda" else 0)):
        step()
