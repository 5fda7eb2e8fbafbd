"""Memory of a training step by kind, by block and over time, for the mode and the baseline.

It is counted on the meta device (blpa.memory), so any network and batch takes seconds on any machine. The task writes

    results/memory/<run>.csv    memory in use after each operation of both steps, thinned for a figure
    results/figures/<run>.png   the figure, which task=plots draws again from the file
    results/runs/<run>/blocks.csv, records.json
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from blpa import kernels
from blpa.memory import KINDS, MIB, SAVED, PartBytes, TrainingBytes, saved_bytes
from runners import provenance, records
from runners.cells import batch_name, table_name
from runners.config import Config
from runners.errors import UserError
from runners.files import write_csv
from runners.records import Record
from runners.reporting import figures
from runners.reporting.labels import read_labels
from runners.reporting.pages import aligned
from runners.training import network
from runners.training.network import META

Row = dict[str, Any]

POINTS = 600
"""Points per line of the figure; each is the maximum over its neighbourhood."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str


NEEDS_NO_GPU = True


def check(config: Config) -> None:
    """Refuse another mode under the baseline's name."""
    if config.mode.name == "exact" and config.mode.layers != "stock":
        raise UserError("mode=exact is the baseline here, with stock layers: give your mode another name")


def folder(config: Config) -> str:
    """Name the folder by the run, the batch size and the backend."""
    return f"{config.run}-memory-{batch_name(config)}-{config.gpu.kernels}"


def run(config: Config) -> list[Record]:
    """Count a step of the configured mode and of the baseline; record the peaks, print tables and draw the figure.

    Args:
        config: one run, checked; dataset.batch_size is the batch.

    Returns:
        The peak of a step of each, in MiB per sample, marked as predicted.

    Raises:
        UserError: the results folder cannot be written.
    """
    results, run_dir, name = Path(config.results), network.run_folder(config), table_name(config)
    batch = config.dataset.batch_size
    cells = network.with_exact(config)[::-1]
    counted = {cell.mode.name: network.training_bytes(cell, batch) for cell in cells}
    blocks = by_block(config, counted[config.mode.name])
    write_csv(run_dir / "blocks.csv", blocks)
    lines = [point for mode, total in counted.items() for point in timeline(mode, total, batch)]
    write_csv(results / "memory" / f"{name}.csv", lines)
    measured = [
        provenance.record(
            cell, provenance.source(cell, META, kernels.choose(config.gpu.kernels, META).name), metric="step_peak_mib",
            unit="MiB/sample", value=peak, low=peak, high=peak, n=1, iterations=1, predicted=True, seed=0,
        )
        for cell, total in zip(cells, counted.values(), strict=True)
        for peak in [total.step.peak_bytes / batch / MIB]
    ]  # fmt: skip
    records.write(measured, run_dir)
    print(by_kind(counted, batch))
    print(by_size(counted[config.mode.name], batch))
    if config.mode.layers == "coded":
        saved, formula = (sum(block[column] for block in blocks) for column in ("saved", "formula"))
        print(f"saved by the blocks: {saved} bytes counted, {formula} by blpa.memory.saved_bytes")
    print(figures.draw_memory(results, name, read_labels(config.config_dir)))
    return measured


def by_kind(counted: dict[str, TrainingBytes], batch: int) -> str:
    """Write the table of memory by kind: at the peak of a step in MiB per sample, and of all training in MiB.

    Args:
        counted: the bytes of training, by mode.
        batch: samples per step.
    """
    rows = [
        [kind, *(f"{total.step.kinds_at_peak.get(kind, 0) / batch / MIB:.3f}" for total in counted.values())]
        for kind in KINDS
    ]
    rows.append(["peak of a step", *(f"{total.step.peak_bytes / batch / MIB:.3f}" for total in counted.values())])
    rows += [
        [f"{title}, MiB in all", *(f"{getattr(total, field) / MIB:.1f}" for total in counted.values())]
        for title, field in (
            ("weights", "weight_bytes"),
            ("optimiser", "optimiser_bytes"),
            ("images and labels", "input_bytes"),
            ("training", "total_bytes"),
            ("moved to the host", "host_bytes"),
        )
        if field != "host_bytes" or any(total.host_bytes for total in counted.values())
    ]
    return aligned([[f"MiB per sample at the peak, batch {batch}", *counted], *rows])


def by_block(config: Config, counted: TrainingBytes) -> list[Row]:
    """List the bytes that each block saves for backward, counted and by the formula.

    Args:
        config: the run.
        counted: the bytes of its mode, with the blocks as parts.

    Returns:
        A row per block: block, channels, height, saved codes, vectors and full precision, saved (their sum), formula
        (None where layers are not coded).
    """
    return [
        {
            "block": name,
            "channels": part.output_shape[1],
            "height": part.output_shape[2],
            **{kind: part.kinds[kind] for kind in SAVED},
            "saved": sum(part.kinds.values()),
            "formula": _formula(config, part, is_first=number == 0),
        }
        for number, (name, part) in enumerate(counted.step.saved_by_part.items())
    ]


def _formula(config: Config, part: PartBytes, *, is_first: bool) -> int | None:
    """Compute the bytes that a block saves: its three BN-ReLU-convs read the input, and 1/4 of the output twice.

    The max pool of the first block for ImageNet saves a byte per output besides.
    """
    if config.mode.layers != "coded":
        return None
    codec = network.codec(config.mode)
    rows_in, rows_out = (shape.numel() // shape[1] for shape in (part.input_shape, part.output_shape))
    element_bytes = 2 if network.precision(config.gpu, META) == "bf16" else 4
    has_max_pool = is_first and network.has_max_pool(config)
    is_coded = not has_max_pool or config.mode.codes_max_pool or config.mode.forward_from_code
    channels = part.input_shape[1]
    first = saved_bytes(rows_in, channels, codec if is_coded else None, element_bytes=element_bytes)
    if has_max_pool:
        first += rows_out * channels
    return first + 2 * saved_bytes(rows_out, part.output_shape[1] // 4, codec, element_bytes=element_bytes)


def by_size(counted: TrainingBytes, batch: int) -> str:
    """Write the table of memory saved by blocks of one size, in MiB per sample.

    Args:
        counted: the bytes of training with the blocks as parts; blocks of one size are consecutive.
        batch: samples per step.
    """
    rows = [["blocks", "output", *SAVED, "saved, MiB per sample"]]
    for (_, channels, height, width), alike in groupby(
        counted.step.saved_by_part.values(), key=lambda part: part.output_shape
    ):
        blocks = list(alike)
        saved = [sum(part.kinds[kind] for part in blocks) for kind in SAVED]
        cells = [f"{value / batch / MIB:.3f}" for value in (*saved, sum(saved))]
        rows.append([str(len(blocks)), f"{channels} x {height} x {width}", *cells])
    return aligned(rows)


def timeline(mode: str, counted: TrainingBytes, batch: int) -> list[Row]:
    """Compute the line of one mode in the figure.

    Args:
        mode: the mode's name.
        counted: its bytes of training.
        batch: samples per step.

    Returns:
        Rows of mode, fraction of the step done (the forward pass ends at 0.5), and MiB per sample in use.
    """
    forward = counted.step.forward_operations
    halves = counted.step.timeline[:forward], counted.step.timeline[forward:]
    points = []
    for start, half in zip((0.0, 0.5), halves, strict=True):
        bins = torch.tensor_split(torch.tensor(half), min(POINTS // 2, len(half)))
        points += [(start + 0.5 * (k + 1) / len(bins), float(part.max())) for k, part in enumerate(bins)]
    return [{"mode": mode, "done": round(done, 5), "mib": round(alive / batch / MIB, 5)} for done, alive in points]
