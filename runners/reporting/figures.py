"""Every figure, from curves.csv, records.csv and the tables of single runs alone: a fresh clone draws them again.

They are test error over iterations, a line per mode; the network tables over depth; memory over one step; the error of
each layer's gradient; and the positions of the ReLU's thresholds. The colours of modes, in their YAML files, are mostly
Okabe and Ito's palette, which colour-blind readers can distinguish.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from runners.config import LONGEST_NAME
from runners.errors import UserError
from runners.reading import ANY_NUMBER, FINITE, NAME, Kind, read_csv
from runners.records import Record
from runners.reporting.labels import Labels, settings_text
from runners.reporting.networks import Conditions, Table

THIRDS = ("#56B4E9", "#0072B2", "#003355")
"""Colours of the thirds of a network: the deeper, the darker."""

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Ticks of the logarithmic error axis, which begins and ends at one; an error of 0 is drawn at the smallest."""

LONGEST_IN_TITLE = 40
"""Characters of settings in a title, which a data set of the user's own would fill."""

MEMORY = {"mode": NAME, "done": FINITE, "mib": FINITE}
GRADIENTS = {"mode": NAME, "layer": NAME} | {
    f"{metric}_{end}": ANY_NUMBER for metric in ("error", "cosine", "spread") for end in ("low", "median", "high")
}
THRESHOLDS = {"part": NAME, "low": FINITE, "high": FINITE, "percent": FINITE}
"""Columns of the tables of single runs; a gradient of 0 has an error that is not finite."""


def draw(curves: pd.DataFrame, labels: Labels) -> Figure:
    """Draw one group's curves: the mean over seeds, in a band of one sample standard deviation.

    Args:
        curves: rows of one group, as `gather` returns them.
        labels: names, colours and order of modes and data sets.
    """
    figure, axes = _canvas()
    ends = {}
    for mode in sorted(curves["mode"].unique(), key=labels.order):
        colour = labels.mode(mode).colour
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
    last = min((tick for tick in TICKS if tick >= high and tick > first), default=high)
    axes.set_ylim(first, last)
    axes.set_yticks([tick for tick in TICKS if first <= tick <= last])
    axes.set_xlim(0, curves["iteration"].max())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_title(_plain(_title(curves, labels)), loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _name_lines(axes, ends, labels, lambda value: f"{value:.2f} %", lowest=TICKS[0])
    return figure


def draw_over_depth(table: Table, conditions: Conditions, group: list[Record], labels: Labels) -> Figure:
    """Draw the values of one network table over depth, a line per mode, with the paper's as open circles.

    Args:
        table: the kind of table.
        conditions: what the records share.
        group: the records of width 1.
        labels: names, colours and order of modes and data sets.
    """
    figure, axes = _canvas()
    papers = table.papers_for(conditions)
    ends = {}
    for mode in sorted({record.mode for record in group}, key=labels.order):
        line = {  # measured counts before predicted
            record.depth: record
            for record in sorted(group, key=lambda record: (record.depth, not record.predicted))
            if record.mode == mode and record.metric == table.metric and record.value > 0
        }
        colour = labels.mode(mode).colour
        if line:
            values = [table.scale * record.value for record in line.values()]
            style = "--" if mode.startswith("compiled") else "-"  # lines below show through
            axes.plot(list(line), values, color=colour, linewidth=1.8, linestyle=style, marker="o", markersize=4)
            ends[mode] = values[-1]
        theirs = {depth: figures[mode] for (depth, width), figures in papers.items() if width == 1 and mode in figures}
        if theirs:
            values = [table.scale * value for value in theirs.values()]
            axes.plot(list(theirs), values, color=colour, linestyle="", marker="o", fillstyle="none", markersize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.12)  # room for the names of lines that end close together
    depths = sorted({record.depth for record in group})
    axes.set_xticks(depths, map(str, depths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("depth" + (" (circles: the paper's figures)" if papers else ""))
    title = f"{table.title}: {', '.join(table.heading(conditions, labels))}"
    axes.set_title(_plain(title), loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _name_lines(axes, ends, labels, lambda value: f"{value:.4g}{table.unit}")
    return figure


def draw_memory(results: Path, name: str, labels: Labels) -> Path:
    """Draw the memory in use over one training step, a line per mode.

    Args:
        results: the folder that holds memory/<name>.csv: mode, part of the step done, MiB per sample.
        name: the run's name.
        labels: names and colours of modes.

    Returns:
        The figure, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    lines = _read(results / "memory" / f"{name}.csv", MEMORY)
    for mode, line in lines.groupby("mode", sort=False):
        colour = labels.mode(str(mode)).colour
        axes.fill_between(line["done"], line["mib"], color=colour, alpha=0.12, linewidth=0)
        title = f"{labels.label(str(mode))}: {line['mib'].max():.2f}"
        axes.plot(line["done"], line["mib"], color=colour, linewidth=1.6, label=_plain(title))
    axes.axvline(0.5, color="#888888", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xticks([0.25, 0.75], ["forward pass", "backward pass"])
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"Memory of a training step, MiB per sample\n{name}", loc="left", fontsize=9)
    axes.legend(title="most at once", frameon=False, loc="upper left")
    return save(figure, results, name)


def draw_gradients(results: Path, name: str, labels: Labels) -> Path:
    """Draw the error of each layer's gradient, and the spread of the exact gradient between batches.

    Args:
        results: the folder that holds gradients/<name>.csv: mode, layer, then low, median and high of each metric.
        name: the run's name.
        labels: names and colours of modes.

    Returns:
        The figure, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    layers = _read(results / "gradients" / f"{name}.csv", GRADIENTS)
    mode = str(layers["mode"].iloc[0])
    for metric, colour, title in (
        ("spread", labels.mode("exact").colour, "exact: spread between batches"),
        ("error", labels.mode(mode).colour, f"{labels.label(mode)}: error"),
    ):
        axes.fill_between(
            layers.index, layers[f"{metric}_low"], layers[f"{metric}_high"], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(layers.index, layers[f"{metric}_median"], color=colour, linewidth=1.6, label=_plain(title))
    axes.set_yscale("log")
    axes.set_xlim(0, len(layers) - 1)
    axes.set_xlabel("layer, from the first convolution to the classifier")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Relative error of a layer's gradient\n{name}", loc="left", fontsize=9)
    axes.legend(frameon=False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return save(figure, results, name)


def draw_thresholds(results: Path, name: str) -> Path:
    """Draw the histogram of the ReLU's thresholds over channels.

    Args:
        results: the folder that holds thresholds/<name>.csv: part of the network, low, high, percent.
        name: the run's name.

    Returns:
        The figure, results/figures/<name>.png.
    """
    figure, axes = _canvas()
    bins = _read(results / "thresholds" / f"{name}.csv", THRESHOLDS)
    for (part, rows), colour in zip(bins.groupby("part", sort=False), THIRDS, strict=False):
        axes.stairs(rows["percent"], [*rows["low"], rows["high"].iloc[-1]], color=colour, linewidth=1.6, label=part)
    axes.set_xlim(bins["low"].min(), bins["high"].max())
    axes.set_ylim(0, None)
    axes.set_xlabel("beta / |gamma|, in standard deviations; the outermost bins hold what lies beyond")
    axes.set_ylabel("% of the channels")
    axes.set_title(f"Where y changes sign, by channel\n{name}", loc="left", fontsize=9)
    axes.legend(frameon=False)
    return save(figure, results, name)


def _read(file: Path, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    """Read the table of a single run."""
    rows = read_csv(file, kinds, dict, of="its folder")
    if not rows:
        raise UserError(f"{file}, line 2: no row, expected one or more")
    return pd.DataFrame(list(rows.values()))


def _plain(text: str) -> str:
    """Escape a text of users', in which $ begins no formula."""
    return text.replace("$", r"\$")


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


def _name_lines(
    axes: Any, ends: dict[str, float], labels: Labels, text: Callable[[float], str], *, lowest: float = 0.0
) -> None:
    """Name each line at its right end, in its colour; names move apart where lines end together."""
    gap = 0.062  # height of a line of text, as a fraction of the axis
    to_axis = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=ends.__getitem__)
    wanted = [float(to_axis.transform((1, max(ends[mode], lowest)))[1]) for mode in order]
    for mode, height in zip(order, spread(wanted, gap), strict=True):
        axes.text(
            1.01, height, _plain(f"{labels.label(mode)}  {text(ends[mode])}"), transform=axes.transAxes,
            color=labels.mode(mode).colour, va="center", fontsize=9,
        )  # fmt: skip


def spread(wanted: list[float], gap: float) -> list[float]:
    """Place labels at least `gap` apart, in the given order and as near to the wanted positions as possible.

    Args:
        wanted: increasing positions.
        gap: least distance between neighbours.
    """
    # Minus the gaps, positions only must not decrease: the nearest such sequence averages each decreasing stretch.
    blocks: list[list[float]] = []
    for index, position in enumerate(wanted):
        blocks.append([position - gap * index])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [fmean(block) for block in blocks for _ in block]
    return [position + gap * index for index, position in enumerate(placed)]


def _title(curves: pd.DataFrame, labels: Labels) -> str:
    first = curves.iloc[0]
    runs = curves.groupby(["mode", "iteration"])["seed"].nunique()  # seeds may be evaluated more or less often
    n = f"n={runs.min()}" if runs.min() == runs.max() else f"n={runs.min()} to {runs.max()}"
    recipe = f"{labels.images(first['dataset'])}, depth {first['depth']}, width {first['width']:g}"
    recipe += f", {first['iterations']:,} iterations of batch {first['batch_size']}"
    settings = settings_text(json.loads(first["settings"]))
    if len(settings) > LONGEST_IN_TITLE:
        settings = f"{settings[:LONGEST_IN_TITLE]}..."
    conditions = ", ".join(filter(None, [first["precision"], settings]))
    return f"Test error (%), {recipe}, {conditions} ({n})"


def group_slug(group: tuple[Any, ...]) -> str:
    """Make a file name from a group: digits-depth29-width1-300x64-fp32."""
    dataset, depth, width, iterations, batch_size, precision, settings = group
    name = f"{dataset}-depth{depth}-width{width:g}-{iterations}x{batch_size}-{precision}"
    return slug(f"{name} {settings_text(json.loads(settings))}")


def slug(text: str) -> str:
    """Make a part of a file name from a text; digits of its sha256 stand for the end of a long one."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
