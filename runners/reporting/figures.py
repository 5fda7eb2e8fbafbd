"""Every figure, from curves.csv, records.csv and the tables of single runs alone: a fresh clone draws them again.

Test error over the iterations, a line a mode; the network tables over depth; memory over one step; the error of each
layer's gradient; where the ReLU's thresholds lie.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from runners.records import Record
from runners.reporting.networks import Table
from runners.reporting.pages import images, label, mode_order

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
    "offload": "#AA4499",
    "compiled": "#5C4A00",
    "compiled-budget-0.5": "#8C7A00",
    "compiled-budget-0.2": "#BFA600",
    "compiled-fp8": "#882255",
}
OTHER_COLOUR = "#666666"
THIRDS = ("#56B4E9", "#0072B2", "#003355")
"""Of a network: the deeper, the darker."""

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""The error axis is logarithmic and lies between two of these; an error of 0 is drawn at the smallest."""


def draw(curves: pd.DataFrame) -> Figure:
    """Draw one group's curves: the mean over seeds, in a band of one sample standard deviation.

    Args:
        curves: rows of one group, as `gather` returns them.
    """
    figure, axes = _canvas()
    ends = {}
    for mode in sorted(curves["mode"].unique(), key=mode_order):
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
    _label(axes, ends, lambda value: f"{value:.2f} %", lowest=TICKS[0])
    return figure


def draw_over_depth(table: Table, conditions: tuple[str, ...], under: list[Record]) -> Figure:
    """Draw the figures of one network table over depth, a line a mode, with the paper's as open circles.

    Args:
        table: which.
        conditions: what the records share.
        under: the records of width 1.
    """
    figure, axes = _canvas()
    papers = table.papers(conditions)
    ends = {}
    for mode in sorted({record.mode for record in under}, key=mode_order):
        line = {  # measured counts before predicted
            record.depth: record
            for record in sorted(under, key=lambda record: (record.depth, not record.predicted))
            if record.mode == mode and record.metric == table.metric and record.value
        }
        colour = COLOURS.get(mode, OTHER_COLOUR)
        if line:
            values = [table.scale * record.value for record in line.values()]
            style = "--" if mode.startswith("compiled") else "-"  # what lies below shows through
            axes.plot(list(line), values, color=colour, linewidth=1.8, linestyle=style, marker="o", markersize=4)
            ends[mode] = values[-1]
        theirs = {depth: figures[mode] for (depth, width), figures in papers.items() if width == 1 and mode in figures}
        if theirs:
            values = [table.scale * value for value in theirs.values()]
            axes.plot(list(theirs), values, color=colour, linestyle="", marker="o", fillstyle="none", markersize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.12)  # room for the names of lines that end close together
    depths = sorted({record.depth for record in under})
    axes.set_xticks(depths, map(str, depths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("depth" + (" (circles: the paper's figures)" if papers else ""))
    axes.set_title(f"{table.title}: {', '.join(conditions)}", loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _label(axes, ends, lambda value: f"{value:.4g}{table.unit}")
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
        colour = COLOURS.get(str(mode), OTHER_COLOUR)
        axes.fill_between(line["done"], line["mib"], color=colour, alpha=0.12, linewidth=0)
        title = f"{label(str(mode))}: {line['mib'].max():.2f}"
        axes.plot(line["done"], line["mib"], color=colour, linewidth=1.6, label=title)
    axes.axvline(0.5, color="#888888", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xticks([0.25, 0.75], ["forward pass", "backward pass"])
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"Memory of a training step, MiB a sample\n{name}", loc="left", fontsize=9)
    axes.legend(title="most at once", frameon=False, loc="upper left")
    return save(figure, results, name)


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
    for metric, colour, title in (
        ("spread", COLOURS["exact"], "exact: spread between batches"),
        ("error", COLOURS.get(mode, OTHER_COLOUR), f"{label(mode)}: error"),
    ):
        axes.fill_between(
            layers.index, layers[f"{metric}_low"], layers[f"{metric}_high"], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(layers.index, layers[f"{metric}_median"], color=colour, linewidth=1.6, label=title)
    axes.set_yscale("log")
    axes.set_xlim(0, len(layers) - 1)
    axes.set_xlabel("layer, from the first convolution to the classifier")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Relative error of a layer's gradient\n{name}", loc="left", fontsize=9)
    axes.legend(frameon=False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return save(figure, results, name)


def draw_thresholds(results: Path, name: str) -> Path:
    """Draw how many channels have their ReLU's threshold where.

    Args:
        results: the folder that holds thresholds/<name>.csv: part of the network, low, high, percent.
        name: of the run.

    Returns:
        The picture, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    bins = pd.read_csv(results / "thresholds" / f"{name}.csv")
    for (part, rows), colour in zip(bins.groupby("part", sort=False), THIRDS, strict=False):
        axes.stairs(rows["percent"], [*rows["low"], rows["high"].iloc[-1]], color=colour, linewidth=1.6, label=part)
    axes.set_xlim(bins["low"].min(), bins["high"].max())
    axes.set_ylim(0, None)
    axes.set_xlabel("beta / |gamma|, in standard deviations; the outermost bins hold what lies beyond")
    axes.set_ylabel("% of the channels")
    axes.set_title(f"Where y changes sign, by channel\n{name}", loc="left", fontsize=9)
    axes.legend(frameon=False)
    return save(figure, results, name)


def _canvas() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, results: Path, name: str) -> Path:
    """Write results/figures/<name>.png; the same figure gives the same bytes."""
    file = results / "figures" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return file


def _label(axes: Any, ends: dict[str, float], text: Callable[[float], str], *, lowest: float = 0.0) -> None:
    """Name each line at its right end, in its colour, the names moved apart where lines end together."""
    gap = 0.062  # of the axis: a line of text at this size
    to_axis = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=ends.__getitem__)
    wanted = [float(to_axis.transform((1, max(ends[mode], lowest)))[1]) for mode in order]
    for mode, height in zip(order, spread(wanted, gap), strict=True):
        axes.text(
            1.01, height, f"{label(mode)}  {text(ends[mode])}", transform=axes.transAxes,
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
    runs = curves.groupby(["mode", "iteration"])["seed"].nunique()  # seeds may be evaluated more or less often
    n = f"n={runs.min()}" if runs.min() == runs.max() else f"n={runs.min()} to {runs.max()}"
    recipe = f"{images(first['dataset'])}, depth {first['depth']}, width {first['width']:g}"
    recipe += f", {first['iterations']:,} iterations of batch {first['batch_size']}"
    note = f", {first['note']}" if first["note"] else ""
    return f"Test error (%), {recipe}, {first['precision']}{note} ({n})"


def slug(group: tuple[Any, ...]) -> str:
    """A file name for a group: digits-depth29-width1-300x64-fp32."""
    dataset, depth, width, iterations, batch_size, precision, note = group
    name = f"{dataset}-depth{depth}-width{width:g}-{iterations}x{batch_size}-{precision}"
    return f"{name}-{slug_of(note)}" if note else name


def slug_of(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
