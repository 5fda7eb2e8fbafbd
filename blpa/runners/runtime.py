"""Time a sample of a training step, beside exact's: the two take turns in one process, so that drift meets both.

They also take turns at going first, for a step leaves caches and heap as they suit itself.

    ratio = median over pairs of  seconds a sample(mode) / seconds a sample(exact)

A step is forward, loss, backward and update, of random images of the data set's size, after two steps to warm up. Both
modes have dataset.batch_size, or, with task.largest_batch, each its own largest batch as max-batch found it.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from blpa import kernels, records, training
from blpa.cells import folder_name
from blpa.config import Config
from blpa.records import Record
from blpa.runners import paper, setup

Step = Callable[[], object]

WARM_UP = 2


def run(config: Config) -> list[Record]:
    """Time the configured mode's step and exact's, print both, and record the mode's time and the ratio.

    Args:
        config: one run, checked.

    Returns:
        Seconds a sample and the ratio to exact, each a median with 20 and 80 % quantiles. The ratio is left out where
        the mode is exact, and where exact's step does not fit the GPU.

    Raises:
        ValueError: the machine cannot do what the configuration asks for, or no largest batch has been found yet.
    """
    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    setup.refuse_unwritable(run_dir)
    device = setup.device(config.gpu.device)
    chosen = kernels.choose(config.gpu.kernels, device)
    training.configure_torch(config.gpu)
    cells = [config] if config.mode.name == "exact" else [config, setup.exact(config)]
    batches = [_largest_batch(cell) if config.task.largest_batch else cell.dataset.batch_size for cell in cells]
    steps = [setup.training_step(cell, batch, chosen, device) for cell, batch in zip(cells, batches, strict=True)]
    _warm_up(steps[:1])
    try:
        _warm_up(steps[1:])
    except torch.OutOfMemoryError:
        print(f"exact does not fit at batch {batches[1]}: {config.mode.name} is timed alone", file=sys.stderr)
        del steps[1:]
    seconds = torch.zeros(config.task.steps, len(steps), dtype=torch.float64)
    for turn in tqdm(range(config.task.steps), "timed steps of each mode"):
        for which in range(len(steps))[:: 1 if turn % 2 else -1]:
            seconds[turn, which] = _seconds(steps[which], device) / batches[which]

    figures = [("seconds_per_sample", "s", seconds[:, 0])]
    if len(steps) > 1:
        figures.append(("ratio_to_exact", "times", seconds[:, 0] / seconds[:, 1]))
        print(f"exact: {1e3 * seconds[:, 1].median().item():.3f} ms a sample, batch {batches[1]}")
    source = setup.source(config, device, chosen.name)
    measured = []
    for metric, unit, values in figures:
        low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=values.dtype)).tolist()
        measured.append(
            setup.record(
                config, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
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


def _largest_batch(config: Config) -> int:
    """What max-batch found for this network in this budget; what was measured counts before what was predicted."""
    found = [
        record
        for record in records.merged(Path(config.results))
        if record.metric == "largest_batch"
        and (record.dataset, record.mode, record.depth, record.width, record.precision)
        == (config.dataset.name, config.mode.name, config.depth, config.width, config.gpu.precision)
        and record.note == setup.note(config, task="max-batch")
    ]
    best = max(found, key=lambda record: (not record.predicted, record.date), default=None)
    if best is None:
        cell = f"mode={config.mode.name} depth={config.depth} width={config.width:g} gpu={config.gpu.name}"
        raise ValueError(f"task.largest_batch=true: none has been found yet; blpa-run task=max-batch {cell} finds it")
    if not best.value:
        raise ValueError(f"{config.mode.name}, depth {config.depth}: does not fit even at batch 1")
    return int(best.value)


def _warm_up(steps: list[Step]) -> None:
    for step in steps * WARM_UP:
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
