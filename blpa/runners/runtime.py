"""Time of a training step, beside exact's: the two take turns in one process, so that a machine's drift meets both.

They also take turns at going first, for a step leaves caches and heap as they suit itself.

    ratio = median over pairs of  seconds(mode) / seconds(exact)

A step is forward, loss, backward and update, of random images of the data set's size, after two steps to warm up.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from blpa import kernels, records, training
from blpa.config import Config, ModeConfig, folder_name
from blpa.records import Record
from blpa.runners import setup


def run(config: Config) -> list[Record]:
    """Time the configured mode's step and exact's, print both, and record the mode's time and the ratio.

    Args:
        config: one run, checked.

    Returns:
        Seconds a step and the ratio to exact, each a median with 20 and 80 % quantiles, as written to
        results/runs/<run>-runtime-batch<n>-<kernels>-<precision>/records.json.

    Raises:
        ValueError: the machine cannot do what the configuration asks for.
    """
    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    setup.refuse_unwritable(run_dir)
    device = setup.device(config.gpu.device)
    chosen = kernels.choose(config.gpu.kernels, device)
    training.configure_torch(config.gpu)
    config = replace(config, gpu=replace(config.gpu, kernels=chosen.name))
    exact = replace(config, mode=ModeConfig(name="exact", layers="stock"))
    steps = _make_step(config, chosen, device), _make_step(exact, chosen, device)
    for _ in range(2):
        _seconds(steps[0], device), _seconds(steps[1], device)
    pairs = torch.zeros(config.task.steps, 2)
    for pair in tqdm(range(config.task.steps), "pairs of steps"):
        for which in (0, 1) if pair % 2 else (1, 0):
            pairs[pair, which] = _seconds(steps[which], device)
    source = records.provenance(device)
    measured = []
    for metric, unit, values in (
        ("step_seconds", "s", pairs[:, 0]),
        ("ratio_to_exact", "times", pairs[:, 0] / pairs[:, 1]),
    ):
        low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        measured.append(
            setup.record(
                config, source, metric=metric, unit=unit, value=median, low=low, high=high, n=len(values),
                iterations=config.task.steps,
            )
        )  # fmt: skip
    records.write(measured, run_dir)
    print(f"exact: {pairs[:, 1].median().item():.3f} s a step")
    for name, record in zip((config.mode.name, "ratio to exact"), measured, strict=True):
        print(f"{name}: {record.value:.3f} {record.unit} (20 to 80 %: {record.low:.3f} to {record.high:.3f})")
    return measured


def _make_step(config: Config, chosen: kernels.Kernels, device: torch.device) -> Callable[[], object]:
    size, channels, batch = config.dataset.image_size, config.dataset.image_channels, config.dataset.batch_size
    images = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(config.dataset.classes, (batch,), device=device)
    model = setup.model(config, chosen).to(device).to(memory_format=torch.channels_last)
    optimiser = training.make_optimiser(model, config.dataset)
    return lambda: training.step(model, optimiser, images, labels, rate=0.01, gpu=config.gpu)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
