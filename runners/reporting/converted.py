"""The table of other networks, converted: a row for each network, a column for each mode."""

from runners.records import Record, canonical
from runners.reporting.labels import Labels
from runners.reporting.pages import Page, Section, commits, listed

OPENING = """\
The most bytes that one training step allocates at once, gradients of the weights included, and in brackets what is
saved after the forward pass: MiB per sample, counted on the meta device (`blpa.explain`). The networks are
torchvision's and a U-Net with batch norm (`runners/training/models.py`); `exact` is PyTorch's own, the others are
converted by `blpa.convert`. Written by `blpa-run task=tables`.
"""


def cells(found: list[Record], labels: Labels) -> list[Record]:
    """Select the newest record of each cell, in the table's order.

    Args:
        found: records of any task.
        labels: order of modes.
    """
    shown = [record for record in found if record.task == "explain" and not record.failure]
    newest = {(_row(r), r.mode, r.metric): r for r in sorted(shown, key=lambda record: record.date)}
    return sorted(newest.values(), key=lambda r: (_row(r), labels.order(r.mode), r.metric))


def _row(record: Record) -> tuple[str, int, str, str]:
    return str(record.settings["model"]), record.batch_size, record.precision, canonical(record.settings)


def page(shown: list[Record], labels: Labels) -> Page:
    """Lay out the table.

    Args:
        shown: the records that `cells` returns.
        labels: names and order of modes.
    """
    title, empty = "Memory of converted networks (MiB per sample)", "blpa-run experiment=converted -m"
    if not shown:
        return Page(title, OPENING, [], empty)
    modes = sorted({record.mode for record in shown}, key=labels.order)
    rows = [["network, image, batch", *map(labels.label, modes)]]
    for row in dict.fromkeys(map(_row, shown)):
        values = {(r.mode, r.metric): r.value for r in shown if _row(r) == row}
        size = next(r.settings["image_size"] for r in shown if _row(r) == row)
        model, batch, precision, _ = row
        texts = (
            f"{values[mode, 'step_peak_mib']:.1f} ({values[mode, 'saved_mib']:.1f})"
            if (mode, "step_peak_mib") in values
            else "not run"
            for mode in modes
        )
        rows.append([f"{model}, {size}, {batch}, {precision}", *texts])
    note = f"torch {listed({record.torch for record in shown})}; commit {commits(shown)}."
    return Page(title, OPENING, [Section("peak (saved)", rows, [note])], empty)
