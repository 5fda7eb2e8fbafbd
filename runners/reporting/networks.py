"""Tables whose columns are networks and whose rows are modes: largest batch, time per sample, gradient error.

A table holds the newest record of each cell. There is one table for each set of conditions that cells share. The
paper's figures of a mode stand below its row; a failed cell shows how it failed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from runners.records import Record, canonical, key
from runners.reporting import paper
from runners.reporting.labels import Labels, settings_text
from runners.reporting.pages import Page, Section, commits, failure, listed, number

Network = tuple[float, int]
"""Width and depth."""

SPREAD = "exact, from batch to batch"


class Conditions(NamedTuple):
    """What the cells of one table share, by column of a record; None where a kind of table has no such condition."""

    dataset: str
    precision: str
    settings: str
    """In canonical text, so that conditions can be compared."""
    batch_size: int | None = None
    seed: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Table:
    """One kind of table."""

    name: str
    """Name of its file."""
    task: str
    """The task that measures it."""
    title: str
    """Its heading."""
    opening: str
    """What its numbers are."""
    empty: str
    """The command that measures it, shown where there is no record."""
    images: str
    """Name of the data set's images in titles, with {} for the data set's own label."""
    columns: tuple[str, ...]
    """Columns of a record whose values divide cells into tables, from those of Conditions."""
    text: Callable[[dict[str, Record]], str]
    """Text of a cell, from its records by metric; a predicted record goes by "predicted"."""
    metric: str
    """The metric that its figure draws."""
    papers: Mapping[tuple[int, float], Mapping[str, float]]
    """The paper's figures by depth and width, then mode; empty where it has none."""
    papers_are_at_the_largest_batch: bool = False
    """Whether the paper's figures belong to each network's largest batch alone."""
    scale: float = 1.0
    """Factor on the metric's value, in tables and figures."""
    unit: str = ""
    """Unit of the scaled value."""

    def conditions(self, record: Record) -> Conditions:
        """Return what a record's cell shares with the others of its table."""
        values = dict(zip(self.columns, key(record, self.columns), strict=True))
        if record.settings.get("largest_batch"):
            values["batch_size"] = None  # each mode and network has its own
        return Conditions(**values)

    def papers_for(self, conditions: Conditions) -> Mapping[tuple[int, float], Mapping[str, float]]:
        """Return the paper's figures, where they belong to these conditions: CIFAR-size images, the paper's card."""
        settings = json.loads(conditions.settings)
        is_same = conditions.dataset in ("cifar10", "cifar100") and paper.matches_card(settings)
        if self.papers_are_at_the_largest_batch:
            is_same = is_same and settings.get("largest_batch", False)
        return self.papers if is_same else {}

    def heading(self, conditions: Conditions, labels: Labels) -> tuple[str, ...]:
        """Write conditions for people, for the title of a table or a figure."""
        parts = (
            self.images.format(labels.images(conditions.dataset)),
            conditions.precision,
            "" if conditions.batch_size is None else f"batch {conditions.batch_size}",
            settings_text(json.loads(conditions.settings)),
            f"seed {conditions.seed}" if conditions.seed else "",
            conditions.device,
        )
        return tuple(part for part in parts if part)


def cells(table: Table, found: list[Record], labels: Labels) -> list[Record]:
    """Select the records that the table shows, in its order.

    Args:
        table: the kind of table.
        found: records of any task.
        labels: names and order of modes and data sets.
    """
    by_cell: dict[tuple[tuple[object, ...], bool, str], list[Record]] = {}
    for record in _with_tf32(found):
        if record.task == table.task:
            cell = table.conditions(record), record.width, record.depth, record.mode
            by_cell.setdefault((cell, record.predicted, record.failure), []).append(record)
    measured = {cell for cell, _, failed in by_cell if not failed}
    # A failure is shown where nothing was measured under the same conditions.
    selected = [runs for (cell, _, failed), runs in by_cell.items() if not failed or cell not in measured]
    shown = [record for runs in selected for record in _newest_run(runs)]
    return sorted(shown, key=lambda r: (
        table.heading(table.conditions(r), labels), -r.width, -r.depth, labels.order(r.mode), r.metric
    ))  # fmt: skip


def _with_tf32(found: list[Record]) -> list[Record]:
    """Repeat predictions in fp32 for tf32, whose tensors have as many bytes, where tf32 was run."""
    run = {(record.task, canonical(record.settings)) for record in found if record.precision == "tf32"}
    again = [
        replace(record, precision="tf32")
        for record in found
        if record.predicted and record.precision == "fp32" and (record.task, canonical(record.settings)) in run
    ]
    return [*found, *again]


def _newest_run(of_cell: list[Record]) -> list[Record]:
    """Select the records of the newest run: they share one date, so a ratio belongs to the time beside it."""
    newest = max(record.date for record in of_cell)
    return [record for record in of_cell if record.date == newest]


def page(table: Table, shown: list[Record], labels: Labels) -> Page:
    """Lay out the tables of one kind, one for each set of conditions.

    Args:
        table: the kind of table.
        shown: the records that `cells` returns.
        labels: names and order of modes and data sets.
    """
    sections = []
    for conditions in dict.fromkeys(map(table.conditions, shown)):
        group = [record for record in shown if table.conditions(record) == conditions]
        machines = {record.device for record in group if record.device not in ("none", conditions.device)}
        notes = [
            f"torch {listed({record.torch for record in group})}",
            f"commit {commits(group)}",
            f"n = {_range([record.n for record in group])}",
            *([f"measured on {listed(machines)}"] if machines else []),
        ]
        title = ", ".join(table.heading(conditions, labels))
        sections.append(Section(title, rows(table, conditions, group, labels), ["; ".join(notes) + "."]))
    return Page(table.title, table.opening, sections, table.empty)


def rows(table: Table, conditions: Conditions, group: list[Record], labels: Labels) -> list[list[str]]:
    """Lay out one table's rows, the head first.

    Args:
        table: the kind of table.
        conditions: what its cells share.
        group: their records.
        labels: names and order of modes and data sets.
    """
    by_cell: dict[tuple[Network, str], dict[str, Record]] = {}
    for record in group:
        metric = "predicted" if record.predicted else record.metric
        by_cell.setdefault(((record.width, record.depth), record.mode), {})[metric] = record
    papers = {(width, depth): figures for (depth, width), figures in table.papers_for(conditions).items()}
    networks = sorted({network for network, _ in by_cell} | set(papers), reverse=True)
    modes = {mode for _, mode in by_cell}
    if papers:
        modes |= {name for name, mode in labels.modes.items() if mode.beside_paper}
    found = [["", *(f"{depth}" if width == 1 else f"{depth} ({width:g}x)" for width, depth in networks)]]
    for mode in sorted(modes, key=labels.order):
        ours = [by_cell.get((network, mode)) for network in networks]
        found.append([labels.label(mode), *(_text(table, cell) for cell in ours)])
        figures = [papers.get(network, {}).get(mode) for network in networks]
        if any(figures):
            found.append(["- in the paper", *(f"{table.scale * v:.4g}{table.unit}" if v else "-" for v in figures)])
    spreads = [_spread(by_cell, network) for network in networks]
    return [*found, [SPREAD, *spreads]] if any(spreads) else found


def _range(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _text(table: Table, cell: dict[str, Record] | None) -> str:
    if cell is None:
        return "not run"
    return failure(cell["failed"]) if "failed" in cell else table.text(cell)


def _spread(by_cell: dict[tuple[Network, str], dict[str, Record]], network: Network) -> str:
    """Return the newest spread of the exact gradient; the run of every mode measured it on the same batches."""
    metric = "gradient_spread"
    found = [cell[metric] for (at, _), cell in by_cell.items() if at == network and metric in cell]
    return f"{max(found, key=lambda record: record.date).value:.2f}" if found else ""


def _batch_text(cell: dict[str, Record]) -> str:
    texts = []
    for metric in ("largest_batch", "predicted"):
        if record := cell.get(metric):
            mark = " (predicted)" if record.predicted else " (expandable)" if record.segments == "expandable" else ""
            texts.append(f"{record.value:.0f}{mark}" if record.value else f"does not fit{mark}")
    return ", ".join(texts)


def _time_text(cell: dict[str, Record]) -> str:
    time, ratio = cell.get("seconds_per_sample"), cell.get("ratio_to_exact")
    notes = [f"batch {time.batch_size}"] if time and time.settings.get("largest_batch") else []
    notes += [f"{ratio.value:.2f} times exact"] if ratio else []
    return (f"{1e3 * time.value:.3g} ms" if time else "-") + (f" ({', '.join(notes)})" if notes else "")


def _gradient_text(cell: dict[str, Record]) -> str:
    return f"{number(cell.get('gradient_error'), '.3g')} (cosine {number(cell.get('gradient_cosine'), '.4f')})"


def _memory_text(cell: dict[str, Record]) -> str:
    return number(cell.get("predicted"), ".2f")


TABLES = (
    Table(
        name="memory",
        task="memory",
        title="Memory of a training step (MiB per sample)",
        opening="""\
The most bytes that one training step allocates at once, beyond weights and optimiser state, for networks of several
depths. Counted on the meta device. `exact` is PyTorch's own layers. Written by `blpa-run task=tables`.
""",
        empty="blpa-run task=memory",
        images="{}-size images",
        columns=("dataset", "precision", "batch_size", "settings"),
        text=_memory_text,
        metric="step_peak_mib",
        papers={},
        unit=" MiB",
    ),
    Table(
        name="batches",
        task="max-batch",
        title="Largest batch",
        opening="""\
Largest number of samples per training step that fits the memory, for networks of several depths. `exact` is PyTorch's
own layers; `exact, one copy` is what the paper calls exact. Predicted: counted on the meta device, with an
allowance for the CUDA context and workspaces taken off the memory. Measured with both kinds of segments that PyTorch's
allocator has; "expandable" marks where those fit more. Written by `blpa-run task=tables`.
""",
        empty="blpa-run task=max-batch gpu=gtx1080ti",
        images="{}-size images",
        columns=("dataset", "precision", "settings"),
        text=_batch_text,
        metric="largest_batch",
        papers=paper.LARGEST_BATCH,
    ),
    Table(
        name="times",
        task="runtime",
        title="Time per sample",
        opening="""\
Median time per sample of a whole training step: forward, loss, backward, update. The ratio is the median over pairs of
consecutive turns of the mode and of exact. The paper's figures are from its own card, a GTX 1080 Ti. Written by
`blpa-run task=tables`.
""",
        empty="blpa-run task=runtime",
        images="{}-size images",
        columns=("dataset", "precision", "batch_size", "settings", "device"),
        text=_time_text,
        metric="seconds_per_sample",
        papers=paper.SECONDS_PER_SAMPLE,
        papers_are_at_the_largest_batch=True,
        scale=1e3,
        unit=" ms",
    ),
    Table(
        name="gradients",
        task="gradient-error",
        title="Error of the gradient",
        opening="""\
|g - g_exact| / |g_exact| over all weights of convolutions and classifier, and the cosine between the two, on the same
weights and batches; medians over n batches. `exact, one copy` differs from `exact` by rounding alone, and its
row shows that error. The last row is the spread of the exact gradient between batches: the distance of a batch's
gradient from the mean gradient over batches, relative to that mean. Written by `blpa-run task=tables`.
""",
        empty="blpa-run task=gradient-error",
        images="{}",
        columns=("dataset", "precision", "batch_size", "settings", "seed"),
        text=_gradient_text,
        metric="gradient_error",
        papers={},
    ),
)
