"""Where the bytes of a training step go: by kind, by block and over time, the mode beside exact.

Counted on the meta device (blpa.memory), so any network and batch takes seconds on any machine. Written are

    results/memory/<run>.csv    bytes alive after each operation of both steps, thinned to what a picture shows
    results/figures/<run>.png   the picture of it, which task=plots draws again from the file
    results/runs/<run>/blocks.csv, records.json
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from blpa import kernels, records
from blpa.config import Config, ModeConfig, folder_name
from blpa.memory import KEPT, KINDS, PartBytes, TrainingBytes, kept_bytes
from blpa.modes import from_config
from blpa.records import Record
from blpa.runners import plots, setup
from blpa.runners.max_batch import META, MIB, training_bytes
from blpa.runners.tables import aligned

POINTS = 600
"""Points of a line in the picture; each stands for the most that was alive around it."""


def run(config: Config) -> list[Record]:
    """Count a step of exact and of the configured mode, print the tables, draw the picture and record the peaks.

    Args:
        config: one run, checked; dataset.batch_size is the batch.

    Returns:
        The peak of a step of each, in MiB a sample, marked as predicted.

    Raises:
        ValueError: the results folder cannot be written.
    """
    results, name = Path(config.results), str(folder_name(config))
    run_dir = results / "runs" / name
    setup.refuse_unwritable(run_dir)
    chosen = kernels.choose(config.gpu.kernels, META)
    config = replace(config, gpu=replace(config.gpu, kernels=chosen.name))
    exact = replace(config, mode=ModeConfig(name="exact", layers="stock"))
    cells = [config] if config.mode.layers == "stock" else [exact, config]
    counted = {cell.mode.name: training_bytes(cell, chosen, config.dataset.batch_size) for cell in cells}
    print(by_kind(counted, config.dataset.batch_size))
    blocks = by_block(config, counted[config.mode.name])
    records.write_atomically(run_dir / "blocks.csv", blocks.to_csv(index=False, lineterminator="\n"))
    print(by_size(blocks, config.dataset.batch_size))
    if config.mode.layers == "coded":
        print(f"kept by the blocks: {blocks['kept'].sum()} bytes counted, {blocks['formula'].sum()} by the formula")
    lines = pd.concat([timeline(mode, total, config.dataset.batch_size) for mode, total in counted.items()])
    records.write_atomically(results / "memory" / f"{name}.csv", lines.to_csv(index=False, lineterminator="\n"))
    print(plots.draw_memory(results, name))
    source = records.provenance(META)
    measured = [
        setup.record(
            cell, source, metric="step_peak_mib", unit="MiB/sample", value=peak, low=peak, high=peak, n=1,
            iterations=1, predicted=True, seed=0,
        )
        for cell, total in zip(cells, counted.values(), strict=True)
        for peak in [total.step.peak_bytes / config.dataset.batch_size / MIB]
    ]  # fmt: skip
    records.write(measured, run_dir)
    return measured


def by_kind(counted: dict[str, TrainingBytes], batch: int) -> str:
    """The table of what is alive at the peak of a step, in MiB a sample, and what training holds besides, in MiB.

    Args:
        counted: by mode.
        batch: samples.
    """
    rows = [
        [f"{kind}", *(f"{total.step.kinds_at_peak.get(kind, 0) / batch / MIB:.3f}" for total in counted.values())]
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
        )
    ]
    return aligned([[f"MiB a sample at the peak, batch {batch}", *counted], *rows])


def by_block(config: Config, counted: TrainingBytes) -> pd.DataFrame:
    """What each block's forward pass left for the backward pass, beside the formula; bytes.

    Args:
        config: the run.
        counted: its mode's, with the blocks as parts.

    Returns:
        A row per block: block, channels, height, kept codes, vectors and full precision, kept (their sum), formula
        (empty where layers are not coded).
    """
    rows = []
    for name, part in counted.step.kept_by_part.items():
        rows.append(
            {
                "block": name,
                "channels": part.output_shape[1],
                "height": part.output_shape[2],
                **{kind: part.kinds[kind] for kind in KEPT},
                "kept": sum(part.kinds.values()),
                "formula": _formula(config, part),
            }
        )
    return pd.DataFrame(rows)


def _formula(config: Config, part: PartBytes) -> int | None:
    """Bytes that a block's three units keep: the first reads the block's input, the others a quarter of its output."""
    if config.mode.layers != "coded":
        return None
    code = from_config(config.mode, kernels.choose("torch", META)).code
    rows_in, rows_out = (shape.numel() // shape[1] for shape in (part.input_shape, part.output_shape))
    first = kept_bytes(rows_in, part.input_shape[1], code)
    return first + 2 * kept_bytes(rows_out, part.output_shape[1] // 4, code)


def by_size(blocks: pd.DataFrame, batch: int) -> str:
    """The table of what blocks of one size keep, in MiB a sample.

    Args:
        blocks: what by_block returns.
        batch: samples.
    """
    rows = [["blocks", "output", *KEPT, "kept, MiB a sample"]]
    for (channels, height), group in blocks.groupby(["channels", "height"], sort=False):
        cells = [f"{group[kind].sum() / batch / MIB:.3f}" for kind in (*KEPT, "kept")]
        rows.append([str(len(group)), f"{channels} x {height} x {height}", *cells])
    return aligned(rows)


def timeline(mode: str, counted: TrainingBytes, batch: int) -> pd.DataFrame:
    """The line of one mode in the picture.

    Args:
        mode: its name.
        counted: its step.
        batch: samples.

    Returns:
        mode, part of the step's operations that are done (the forward pass ends at 0.5), MiB a sample alive.
    """
    forward = counted.step.forward_operations
    halves = counted.step.timeline[:forward], counted.step.timeline[forward:]
    points = []
    for start, half in zip((0.0, 0.5), halves, strict=True):
        bins = torch.tensor_split(torch.tensor(half), min(POINTS // 2, len(half)))
        points += [(start + 0.5 * (k + 1) / len(bins), float(part.max())) for k, part in enumerate(bins)]
    rows = [(mode, round(done, 5), round(alive / batch / MIB, 5)) for done, alive in points]
    return pd.DataFrame(rows, columns=["mode", "done", "mib"])
