"""Time a sample of a training step, beside exact's: the two take turns in one process, so that drift meets both.

They also take turns at going first, for a step leaves caches and heap as they suit itself.

    ratio = median over pairs of  seconds a sample(mode) / seconds a sample(exact)

A step is forward, loss, backward and update, of random images of the data set's size, after two steps to warm up. Both
modes have dataset.batch_size, or, with task.largest_batch, each its own largest batch as max-batch found it.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from blpa import kernels, records, steps
from blpa.cells import overrides
from blpa.checkpoints import Stopped
from blpa.config import Config, TaskConfig
from blpa.kernels import Kernels
from blpa.records import Record
from blpa.runners import paper, setup
from blpa.runners.failures import is_out_of_memory

Step = Callable[[], object]

WARM_UP = 2
"""Steps before those that are timed, besides those before a CUDA graph is recorded."""


class DoesNotFit(Stopped):
    """Max-batch found that not one sample fits."""


def run(config: Config) -> list[Record]:
    """Time the configured mode's step and exact's, print both, and record the mode's time and the ratio.

    Args:
        config: one run, checked.

    Returns:
        Seconds a sample and the ratio to exact, each a median with 20 and 80 % quantiles. The ratio is left out where
        the mode is exact, and where exact's step does not fit the GPU.

    Raises:
        ValueError: the machine cannot do what the configuration asks for, or no largest batch has been found yet.
        DoesNotFit: the mode's largest batch is none.
    """
    run_dir = setup.run_folder(config)
    device = setup.device(config.gpu)
    chosen = kernels.choose(config.gpu.kernels, device)
    steps.configure_torch(config.gpu)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    cell = setup.on_card(config, card) if config.task.largest_batch else config
    timed: list[Step] = []
    batches: list[int] = []
    for one in setup.with_exact(cell):
        try:
            batch = _largest_batch(one, chosen) if config.task.largest_batch else config.dataset.batch_size
            step = setup.training_step(one, batch, chosen, device)
            _warm_up(step, device)
        except RuntimeError as error:
            if not timed or not (isinstance(error, DoesNotFit) or is_out_of_memory(error)):
                raise
            print(f"{error}; {config.mode.name} is timed alone", file=sys.stderr)
        else:
            timed.append(step)
            batches.append(batch)
    seconds = torch.zeros(config.task.steps, len(timed), dtype=torch.float64)
    for turn in tqdm(range(config.task.steps), "timed steps of each mode"):
        for which in range(len(timed))[:: 1 if turn % 2 else -1]:
            seconds[turn, which] = _seconds(timed[which], device) / batches[which]

    figures = [("seconds_per_sample", "s", seconds[:, 0])]
    if len(timed) > 1:
        figures.append(("ratio_to_exact", "times", seconds[:, 0] / seconds[:, 1]))
        print(f"exact: {1e3 * seconds[:, 1].median().item():.3f} ms a sample, batch {batches[1]}")
    source = setup.source(config, device, chosen.name)
    measured = []
    for metric, unit, values in figures:
        low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=values.dtype)).tolist()
        measured.append(
            setup.record(
                cell, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
                iterations=config.task.steps, batch_size=batches[0],
                paper_value=paper.seconds_per_sample(config) if unit == "s" else None,
            )
        )  # fmt: skip
        scale, shown = (1e3, f"ms a sample, batch {batches[0]}") if unit == "s" else (1, "times exact")
        print(
            f"{config.mode.name}: {scale * median:.3f} {shown} (20 to 80 %: {scale * low:.3f} to {scale * high:.3f})"
        )
    records.write(measured, run_dir)
    return measured


def _largest_batch(config: Config, chosen: Kernels) -> int:
    """What max-batch found for this network, budget and back end, first what was measured, then what was predicted."""
    found = [
        record
        for record in records.merged(Path(config.results))
        if record.metric == "largest_batch"
        and (record.dataset, record.mode, record.depth, record.width, record.precision)
        == (config.dataset.name, config.mode.name, config.depth, config.width, config.gpu.precision)
        and record.note == setup.note(config, task="max-batch")
        and record.kernels in (chosen.name, "stock")
    ]
    best = max(found, key=lambda record: (not record.predicted, record.date), default=None)
    if best is None:
        asked = overrides(replace(config, task=TaskConfig(name="max-batch"), experiment="single"))
        command = records.as_text([*asked, f"results={config.results}"])
        raise ValueError(f"task.largest_batch=true: none has been found for {config.mode.name} yet: blpa-run {command}")
    if not best.value:
        raise DoesNotFit(f"does not fit: {config.mode.name}, depth {config.depth}, not even batch 1")
    return int(best.value)


def _warm_up(step: Step, device: torch.device) -> None:
    for _ in range(WARM_UP + (steps.EAGER_STEPS if device.type == "cuda" else 0)):
        step()


def _seconds(step: Step, device: torch.device) -> float:
    """One step by the device's own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
