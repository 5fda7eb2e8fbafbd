"""Test error over the iterations, a line for each mode, from every finished run; and memory over one step.

A run's metrics.csv lives in results/runs, which is not committed. So this task, the only reader of curves, first
gathers the rows of finished runs in results/curves.csv, which is, and draws from that file alone: a fresh clone draws
the same figures. As in the tables, of two runs of the same cell and seed the newer counts.
"""

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from blpa import records
from blpa.config import Config
from blpa.records import GROUP, Record
from blpa.runners.paper import ROWS

# Okabe and Ito's palette, told apart by colour-blind eyes too; the exact mode is black, the method blue.
COLOURS = {
    "exact": "#000000",
    "fewer-features": "#E69F00",
    "naive-8bit": "#D55E00",
    "8bit": "#56B4E9",
    "4bit": "#0072B2",
    "2bit": "#009E73",
    "exact-one-copy": "#999999",
    "checkpoint": "#CC79A7",
    "compiled": "#7F6A00",
    "compiled-budget-0.5": "#B29700",
    "compiled-budget-0.2": "#F0E442",
    "compiled-fp8": "#882255",
}
OTHER_COLOUR = "#666666"

FLOATS = ("width", "learning_rate", "train_loss", "train_error_percent", "test_loss", "test_error_percent")
"""Columns of curves.csv and metrics.csv that are no whole numbers."""

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""The error axis is logarithmic and lies between two of these; an error of 0 is drawn at the smallest."""


def run(config: Config) -> list[Record]:
    """Gather the curves and draw a figure for each group of runs.

    Args:
        config: `results` is the folder of runs, curves and figures.

    Returns:
        Nothing new is measured: an empty list.
    """
    results = Path(config.results)
    curves = gather(results)
    if curves.empty:
        print(f"no finished run under {results / 'runs'}, no {results / 'curves.csv'}: nothing to draw")
    for group, rows in curves.groupby(list(GROUP)):
        print(_save(draw(rows), results, f"error-{_slug(group)}"))
    for file in sorted((results / "memory").glob("*.csv")):
        print(draw_memory(results, file.stem))
    for file in sorted((results / "gradients").glob("*.csv")):
        print(draw_gradients(results, file.stem))
    return []


def gather(results: Path) -> pd.DataFrame:
    """Merge the metrics of finished runs into curves.csv.

    Args:
        results: the folder that holds runs/ and curves.csv; either may be missing.

    Returns:
        A row per evaluation: the fields of GROUP, mode, seed, date, then the columns of metrics.csv.
    """
    table = results / "curves.csv"
    found = [_read(table)] if table.exists() else []
    for file in sorted(results.glob("runs/*/records.json")):
        for record in records.read(file):
            if record.metric == "test_error_percent":
                found.append(_curve(record, file.with_name("metrics.csv")))
    found = [rows for rows in found if len(rows)]
    if not found:
        return pd.DataFrame(columns=[*GROUP, "mode", "seed", "date", "iteration", "test_error_percent"])
    cell = [*GROUP, "mode", "seed"]
    curves = pd.concat(found, ignore_index=True)
    curves = curves[curves["date"] == curves.groupby(cell)["date"].transform("max")]
    curves = curves.drop_duplicates([*cell, "iteration"], keep="last").sort_values([*cell, "iteration"])
    records.write_atomically(table, curves.to_csv(index=False, lineterminator="\n"))
    return curves


def _curve(record: Record, metrics: Path) -> pd.DataFrame:
    """A run's evaluations; none where the metrics are not those of the record (the run has been started anew)."""
    if not metrics.exists():
        return pd.DataFrame()
    rows = _read(metrics)
    if rows.empty or rows["iteration"].iloc[-1] != record.iterations:
        return pd.DataFrame()
    for position, name in enumerate((*GROUP, "mode", "seed", "date")):
        rows.insert(position, name, getattr(record, name))
    return rows


def _read(file: Path) -> pd.DataFrame:
    """A file of curves, to the last bit: pandas' own reading of a number may be off by one."""
    return pd.read_csv(file, keep_default_na=False, converters=dict.fromkeys(FLOATS, float))


def draw(curves: pd.DataFrame) -> Figure:
    """Draw one group's curves: the mean over seeds, in a band of one sample standard deviation.

    Args:
        curves: rows of one group, as `gather` returns them.
    """
    figure, axes = _canvas()
    ends = {}
    for mode in sorted(curves["mode"].unique(), key=_reading_order):
        colour = COLOURS.get(mode, OTHER_COLOUR)
        by_iteration = curves[curves["mode"] == mode].groupby("iteration")["test_error_percent"]
        mean, deviation = by_iteration.mean(), by_iteration.std()
        marker = "o" if len(mean) == 1 else None  # a line of one point would not show
        axes.plot(mean.index, mean.clip(lower=TICKS[0]), color=colour, linewidth=1.8, marker=marker)
        if deviation.notna().any():
            low = (mean - deviation).clip(lower=TICKS[0])
            axes.fill_between(mean.index, low, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        ends[mode] = float(mean.iloc[-1])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda percent, _: f"{percent:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = curves["test_error_percent"].min(), curves["test_error_percent"].max()
    first = max([tick for tick in TICKS[:-1] if tick <= low], default=TICKS[0])
    last = min(tick for tick in TICKS if tick >= high and tick > first)
    axes.set_ylim(first, last)
    axes.set_yticks([tick for tick in TICKS if first <= tick <= last])
    axes.set_xlim(0, curves["iteration"].max())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_title(_title(curves), loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _label(axes, ends)
    return figure


def draw_memory(results: Path, name: str) -> Path:
    """Draw the bytes alive over one training step, a line for each mode.

    Args:
        results: the folder that holds memory/<name>.csv: mode, part of the step done, MiB a sample.
        name: of the run.

    Returns:
        The picture, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    lines = pd.read_csv(results / "memory" / f"{name}.csv")
    for mode, line in lines.groupby("mode", sort=False):
        colour, label = COLOURS.get(str(mode), OTHER_COLOUR), ROWS[str(mode)].label if mode in ROWS else str(mode)
        axes.fill_between(line["done"], line["mib"], color=colour, alpha=0.12, linewidth=0)
        axes.plot(line["done"], line["mib"], color=colour, linewidth=1.6, label=f"{label}: {line['mib'].max():.2f}")
    axes.axvline(0.5, color="#888888", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xticks([0.25, 0.75], ["forward pass", "backward pass"])
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"Memory of a training step, MiB a sample: {name}", loc="left", fontsize=10)
    axes.legend(title="most at once", frameon=False, loc="upper left")
    return _save(figure, results, name)


def draw_gradients(results: Path, name: str) -> Path:
    """Draw the error of each layer's gradient, beside the spread of exact's between batches.

    Args:
        results: the folder that holds gradients/<name>.csv: mode, layer, then low, median and high of each metric.
        name: of the run.

    Returns:
        The picture, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    layers = pd.read_csv(results / "gradients" / f"{name}.csv")
    mode = str(layers["mode"].iloc[0])
    label = ROWS[mode].label if mode in ROWS else mode
    for metric, colour, title in (
        ("spread", COLOURS["exact"], "exact: spread between batches"),
        ("error", COLOURS.get(mode, OTHER_COLOUR), f"{label}: error"),
    ):
        axes.fill_between(
            layers.index, layers[f"{metric}_low"], layers[f"{metric}_high"], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(layers.index, layers[f"{metric}_median"], color=colour, linewidth=1.6, label=title)
    axes.set_yscale("log")
    axes.set_xlim(0, len(layers) - 1)
    axes.set_xlabel("layer, from the first convolution to the classifier")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Relative error of a layer's gradient: {name}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return _save(figure, results, name)


def _canvas() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, results: Path, name: str) -> Path:
    """Write results/figures/<name>.png; the same figure gives the same bytes."""
    file = results / "figures" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return file


def _label(axes: Any, ends: dict[str, float]) -> None:
    """Name each line at its right end, in its colour, the names moved apart where lines end together."""
    gap = 0.062  # of the axis: a line of text at this size
    to_axis = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=ends.__getitem__)
    wanted = [float(to_axis.transform((1, max(ends[mode], TICKS[0])))[1]) for mode in order]
    for mode, height in zip(order, spread(wanted, gap), strict=True):
        label = ROWS[mode].label if mode in ROWS else mode
        axes.text(
            1.01, height, f"{label}  {ends[mode]:.2f} %", transform=axes.transAxes,
            color=COLOURS.get(mode, OTHER_COLOUR), va="center", fontsize=9,
        )  # fmt: skip


def spread(wanted: list[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order given and as near to the wanted ones as can be.

    Args:
        wanted: increasing positions.
        gap: least distance between neighbours.
    """
    # Less the gaps, the positions need only not decrease: the nearest such sequence averages every run that decreases.
    blocks: list[list[float]] = []
    for index, position in enumerate(wanted):
        blocks.append([position - gap * index])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [fmean(block) for block in blocks for _ in block]
    return [position + gap * index for index, position in enumerate(placed)]


def _title(curves: pd.DataFrame) -> str:
    first = curves.iloc[0]
    runs = curves.groupby("mode")["seed"].nunique()
    n = f"n={runs.min()}" if runs.min() == runs.max() else f"n={runs.min()} to {runs.max()}"
    recipe = f"{first['dataset']}, depth {first['depth']}, width {first['width']:g}, batch {first['batch_size']}"
    note = f", {first['note']}" if first["note"] else ""
    return f"Test error (%), {recipe}, {first['precision']}{note} ({n})"


def _slug(group: tuple[Any, ...]) -> str:
    """A file name for a group: digits-depth29-width1-300x64-fp32."""
    dataset, depth, width, iterations, batch_size, precision, note = group
    name = f"{dataset}-depth{depth}-width{width:g}-{iterations}x{batch_size}-{precision}"
    return name + (f"-{re.sub(r'[^A-Za-z0-9.]+', '-', note).strip('-')}" if note else "")


def _reading_order(mode: str) -> tuple[int, str]:
    return (list(ROWS).index(mode) if mode in ROWS else len(ROWS)), mode
