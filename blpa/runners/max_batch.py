"""The largest batch whose training steps fit a card's memory, predicted on any machine.

    weights + optimiser + images + peak of a step + allowance <= budget

All but the allowance is counted on the meta device (blpa.memory); the allowance stands for what no count sees: the CUDA
context, the workspace of convolutions, and blocks of memory that are rounded up.
"""

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from blpa import kernels, memory, records
from blpa.config import Config, folder_name
from blpa.memory import TrainingBytes
from blpa.records import Record
from blpa.runners import paper, setup

GIB, MIB = 2**30, 2**20
META = torch.device("meta")


def run(config: Config) -> list[Record]:
    """Predict the largest batch for the configured network and budget, print it and record it.

    Args:
        config: one run, checked; dataset.batch_size does not matter.

    Returns:
        One record, marked as predicted; its value is 0 where not even one sample fits.

    Raises:
        ValueError: the results folder cannot be written.
    """
    memory_gib = config.gpu.memory_gib
    assert memory_gib is not None  # the configuration was checked
    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    setup.refuse_unwritable(run_dir)
    chosen = kernels.choose(config.gpu.kernels, META)
    config = replace(config, gpu=replace(config.gpu, kernels=chosen.name))
    budget = int(memory_gib * GIB) - config.gpu.allowance_mib * MIB

    progress = tqdm(desc="counting a training step", unit=" counts")

    def total_bytes(batch: int) -> int:
        progress.set_postfix_str(f"batch {batch}")
        total = training_bytes(config, chosen, batch).total_bytes
        progress.update()
        return total

    with progress:
        batch = memory.largest_batch(total_bytes, budget)
    source = records.provenance(META)
    measured = setup.record(
        config, source, metric="largest_batch", unit="samples", value=batch, low=batch, high=batch, n=1, iterations=0,
        predicted=True, batch_size=0, seed=0,
        paper_value=paper.largest_batch(config), note=setup.budget_note(config),
    )  # fmt: skip
    records.write([measured], run_dir)
    print(describe(config, batch, budget, training_bytes(config, chosen, max(batch, 1))))
    return [measured]


def training_bytes(config: Config, chosen: kernels.Kernels, batch: int) -> TrainingBytes:
    """Count a training step of the configured network at some batch."""
    size, channels = config.dataset.image_size, config.dataset.image_channels
    with META:
        model = setup.model(config, chosen).to(memory_format=torch.channels_last)
        images = torch.empty(batch, channels, size, size).to(memory_format=torch.channels_last)
        labels = torch.empty(batch, dtype=torch.int64)
        parts = {f"block {number}": block for number, block in enumerate(model.blocks, start=1)}
        return memory.training_bytes(model, images, labels, parts=parts)


def describe(config: Config, batch: int, budget: int, counted: TrainingBytes) -> str:
    """The answer, and what it is made of.

    Args:
        config: the run.
        batch: the largest batch, or 0.
        budget: bytes there are, the allowance taken off.
        counted: at that batch, or at 1.
    """
    network = f"{config.mode.name}, depth {config.depth}, width {config.width:g}"
    parts = (
        f"weights {counted.weight_bytes / GIB:.2f}, optimiser {counted.optimiser_bytes / GIB:.2f}, "
        f"images {counted.input_bytes / GIB:.2f}, a step {counted.step.peak_bytes / GIB:.2f}, "
        f"allowance {config.gpu.allowance_mib / 1024:.2f}"
    )
    if not batch:
        return (
            f"{network}: does not fit {config.gpu.memory_gib:g} GiB even at batch 1 (predicted), "
            f"which takes {(counted.total_bytes - budget) / MIB:.0f} MiB more than there is; GiB: {parts}"
        )
    return f"{network}: largest batch {batch} in {config.gpu.memory_gib:g} GiB (predicted); GiB: {parts}"
