"""The tables whose columns are networks and whose rows are modes: largest batch, time a sample, gradient error.

A table holds the newest record of each cell, and there is one for each set of conditions that its cells share. What
the paper says of a mode stands below it; a cell that failed says how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from runners.records import Record
from runners.reporting import paper
from runners.reporting.pages import Page, Section, commits, failure, images, label, listed, mode_order

Network = tuple[float, int]
"""Width and depth."""

BESIDE_THE_PAPER = ("exact", "exact-one-copy", "checkpoint", "8bit", "4bit", "2bit")
"""Modes that have a row where the paper has figures, whether they were run or not."""

SPREAD = "exact, from batch to batch"


@dataclass(frozen=True)
class Table:
    """One kind of table.

    Attributes:
        name: of its file.
        task: that measures it.
        title: its heading.
        opening: what a reader must know.
        empty: what to run where there is nothing to show.
        conditions: what the cells of one table share, for its title.
        text: what stands in a cell, from its records by metric; predicted ones are named "predicted".
        papers: the paper's figures under some conditions, by depth and width, then mode.
        metric: what a figure of it draws.
        scale: factor on the metric's value, in tables and figures.
        unit: of the product.
    """

    name: str
    task: str
    title: str
    opening: str
    empty: str
    conditions: Callable[[Record], tuple[str, ...]]
    text: Callable[[dict[str, Record]], str]
    papers: Callable[[tuple[str, ...]], Mapping[tuple[int, float], Mapping[str, float]]]
    metric: str
    scale: float = 1.0
    unit: str = ""


def cells(table: Table, found: list[Record]) -> list[Record]:
    """The records that the table shows, in its order.

    Args:
        table: which.
        found: records of any task.
    """
    by_cell: dict[tuple[tuple[object, ...], bool, str], list[Record]] = {}
    for record in _with_tf32(found):
        if record.task == table.task:
            cell = table.conditions(record), record.width, record.depth, record.mode
            by_cell.setdefault((cell, record.predicted, record.failure), []).append(record)
    measured = {cell for cell, _, failed in by_cell if not failed}
    # A failure is shown where nothing was measured under the same conditions.
    kept = [runs for (cell, _, failed), runs in by_cell.items() if not failed or cell not in measured]
    shown = [record for runs in kept for record in _newest_run(runs)]
    return sorted(shown, key=lambda r: (table.conditions(r), -r.width, -r.depth, mode_order(r.mode), r.metric))


def _with_tf32(found: list[Record]) -> list[Record]:
    """The records, and predictions in fp32 again for tf32, whose bytes are the same, where tf32 was run."""
    run = {(record.task, record.note) for record in found if record.precision == "tf32"}
    again = [
        replace(record, precision="tf32")
        for record in found
        if record.predicted and record.precision == "fp32" and (record.task, record.note) in run
    ]
    return [*found, *again]


def _newest_run(of_cell: list[Record]) -> list[Record]:
    """The records that the newest run made: they bear one date, and a ratio belongs to the time beside it."""
    newest = max(record.date for record in of_cell)
    return [record for record in of_cell if record.date == newest]


def page(table: Table, shown: list[Record]) -> Page:
    """The tables of one kind for reading, one for each set of conditions.

    Args:
        table: which.
        shown: what `cells` returns.
    """
    sections = []
    for conditions in dict.fromkeys(map(table.conditions, shown)):
        under = [record for record in shown if table.conditions(record) == conditions]
        machines = {record.device for record in under if record.device != "none"} - set(conditions)
        said = [
            f"torch {listed({record.torch for record in under})}",
            f"commit {commits(under)}",
            f"n = {_range([record.n for record in under])}",
            *([f"measured on {listed(machines)}"] if machines else []),
        ]
        sections.append(Section(", ".join(conditions), rows(table, conditions, under), ["; ".join(said) + "."]))
    return Page(table.title, table.opening, sections, table.empty)


def rows(table: Table, conditions: tuple[str, ...], under: list[Record]) -> list[list[str]]:
    """One table's rows, the head first.

    Args:
        table: of what kind.
        conditions: what its cells share.
        under: their records.
    """
    by_cell: dict[tuple[Network, str], dict[str, Record]] = {}
    for record in under:
        metric = "predicted" if record.predicted else record.metric
        by_cell.setdefault(((record.width, record.depth), record.mode), {})[metric] = record
    papers = {(width, depth): figures for (depth, width), figures in table.papers(conditions).items()}
    networks = sorted({network for network, _ in by_cell} | set(papers), reverse=True)
    modes = {mode for _, mode in by_cell} | (set(BESIDE_THE_PAPER) if papers else set())
    found = [["", *(f"{depth}" if width == 1 else f"{depth} ({width:g}x)" for width, depth in networks)]]
    for mode in sorted(modes, key=mode_order):
        ours = [by_cell.get((network, mode)) for network in networks]
        found.append([label(mode), *(_text(table, cell) for cell in ours)])
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
    """Exact's own spread, which every mode's run measured again on the same batches."""
    metric = "gradient_spread"
    found = [cell[metric] for (at, _), cell in by_cell.items() if at == network and metric in cell]
    return f"{max(found, key=lambda record: record.date).value:.2f}" if found else ""


def _batch_text(cell: dict[str, Record]) -> str:
    texts = [
        f"{record.value:.0f}{told}" if record.value else f"does not fit{told}"
        for metric in ("largest_batch", "predicted")
        if (record := cell.get(metric))
        for told in [" (predicted)" if record.predicted else " (expandable)" if record.segments == "expandable" else ""]
    ]
    return ", ".join(texts)


def _time_text(cell: dict[str, Record]) -> str:
    time, ratio = cell["seconds_per_sample"], cell.get("ratio_to_exact")
    told = [f"batch {time.batch_size}"] if time.note.startswith("largest batch") else []
    told += [f"{ratio.value:.2f} times exact"] if ratio else []
    return f"{1e3 * time.value:.3g} ms" + (f" ({', '.join(told)})" if told else "")


def _gradient_text(cell: dict[str, Record]) -> str:
    return f"{cell['gradient_error'].value:.3g} (cosine {cell['gradient_cosine'].value:.4f})"


def _papers_batches(conditions: tuple[str, ...]) -> Mapping[tuple[int, float], Mapping[str, float]]:
    is_papers = conditions[0].startswith("CIFAR") and paper.is_its_card(conditions[2])
    return paper.LARGEST_BATCH if is_papers else {}


def _papers_times(conditions: tuple[str, ...]) -> Mapping[tuple[int, float], Mapping[str, float]]:
    is_papers = conditions[0].startswith("CIFAR")
    card = conditions[2].removeprefix("largest batch in ")
    return paper.SECONDS_PER_SAMPLE if is_papers and card != conditions[2] and paper.is_its_card(card) else {}


TABLES = (
    Table(
        name="batches",
        task="max-batch",
        title="Largest batch",
        opening="""\
Samples in the largest batch whose training steps fit the memory, for networks of so many layers. `exact` is PyTorch's
own layers; `exact, one copy a unit` is what the paper calls exact. Predicted: counted on the meta device, with an
allowance for the CUDA context and workspaces taken off the memory. Measured with both kinds of segments that PyTorch's
allocator has; "expandable" marks where those fit more. Written by `blpa-run task=tables`.
""",
        empty="blpa-run task=max-batch gpu=gtx1080ti",
        conditions=lambda record: (f"{images(record.dataset)}-size images", record.precision, record.note),
        text=_batch_text,
        papers=_papers_batches,
        metric="largest_batch",
    ),
    Table(
        name="times",
        task="runtime",
        title="Time a sample",
        opening="""\
Median time of a whole training step by the sample: forward, loss, backward, update. The ratio is the median over pairs
of turns, the mode's and exact's one after the other. The paper's figures are from its own card, a GTX 1080 Ti. Written
by `blpa-run task=tables`.
""",
        empty="blpa-run task=runtime",
        conditions=lambda record: (
            f"{images(record.dataset)}-size images",
            record.precision,
            *filter(None, [f"batch {record.batch_size}" if "largest batch" not in record.note else "", record.note]),
            record.device,
        ),
        text=_time_text,
        papers=_papers_times,
        metric="seconds_per_sample",
        scale=1e3,
        unit=" ms",
    ),
    Table(
        name="gradients",
        task="gradient-error",
        title="Error of the gradient",
        opening="""\
|g - g_exact| / |g_exact| over all weights of convolutions and classifier, and the cosine between the two, on the same
weights and batches; medians over n batches. `exact, one copy a unit` is exact but for the order of rounding: its row is
what rounding alone does. Last, what training lives with anyway: how far exact's own gradient of a batch is from the
mean over batches, in units of that mean. Written by `blpa-run task=tables`.
""",
        empty="blpa-run task=gradient-error",
        conditions=lambda record: (images(record.dataset), record.precision, f"batch {record.batch_size}", record.note),
        text=_gradient_text,
        papers=lambda conditions: {},
        metric="gradient_error",
    ),
)
