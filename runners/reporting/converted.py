"""The tables of other networks, converted: memory, and times on each machine; rows are networks, columns modes.

There is a table for each device, and for other settings.
"""

from collections.abc import Callable, Mapping

from runners.records import Record, canonical
from runners.reporting.labels import Labels, settings_text
from runners.reporting.pages import Page, Section, commits, listed, number

OPENING = """\
The networks are torchvision's and a U-Net with batch norm (`runners/training/models.py`); `exact` is PyTorch's own, the
others are converted by `blpa.convert`. Memory is the most bytes that one training step allocates at once, gradients of
the weights included, and in brackets what is saved after the forward pass: MiB per sample, counted on the meta device
(`blpa.explain`). Times: of `exact` the median of whole steps, per sample; of a converted network the median ratio of
its steps to exact ones timed in turn, with 20 and 80 % quantiles; on a GPU also the memory that PyTorch reserves for a
forward and backward pass, MiB per sample. Written by `blpa-run task=tables`.
"""
TASKS = ("explain", "converted-runtime")
IN_ROWS = ("model", "image_size", "channels_last")
"""Settings that a row names."""
TITLES = {"explain": "Memory: peak (saved)", "converted-runtime": "Time of a step"}

Cell = Mapping[str, Record]
"""Records of a row and a mode by metric."""


def cells(found: list[Record], labels: Labels) -> list[Record]:
    """Select the records of each cell's newest run, in the tables' order.

    Args:
        found: records of any task.
        labels: order of modes.
    """
    shown = [record for record in found if record.task in TASKS and not record.failure]
    newest: dict[object, str] = {}
    for record in shown:
        newest[_cell(record)] = max(record.date, newest.get(_cell(record), ""))
    of_newest = [record for record in shown if record.date == newest[_cell(record)]]
    return sorted(of_newest, key=lambda r: (_table(r), _row(r), labels.order(r.mode), r.metric))


def page(shown: list[Record], labels: Labels) -> Page:
    """Lay out the tables.

    Args:
        shown: the records that `cells` returns.
        labels: names and order of modes.
    """
    sections = []
    for table in dict.fromkeys(map(_table, shown)):
        task, *conditions = table
        found = [record for record in shown if _table(record) == table]
        text = _memory if task == "explain" else _time
        notes = [f"torch {listed({record.torch for record in found})}", f"commit {commits(found)}"]
        if task != "explain":
            turns = sorted({record.n for record in found if record.metric == "seconds_per_sample"})
            notes += [f"n = {', '.join(map(str, turns))}", f"kernels {listed({r.kernels for r in found} - {'stock'})}"]
        title = ", ".join(part for part in (TITLES[task], *conditions) if part)
        sections.append(Section(title, _rows(found, text, labels), ["; ".join(notes) + "."]))
    return Page("Converted networks", OPENING, sections, "blpa-run experiment=converted -m")


def _table(record: Record) -> tuple[str, str, str]:
    others = {name: value for name, value in record.settings.items() if name not in IN_ROWS}
    return record.task, "" if record.task == "explain" else record.device, settings_text(others)


def _cell(record: Record) -> tuple[object, ...]:
    return _table(record), _row(record), record.mode


def _row(record: Record) -> tuple[str, int, str, str]:
    return str(record.settings.get("model")), record.batch_size, record.precision, canonical(record.settings)


def _rows(found: list[Record], text: Callable[[Cell], str], labels: Labels) -> list[list[str]]:
    modes = sorted({record.mode for record in found}, key=labels.order)
    rows = [["network, image, batch", *map(labels.label, modes)]]
    for row in dict.fromkeys(map(_row, found)):
        of_row = [record for record in found if _row(record) == row]
        by_mode = {mode: {r.metric: r for r in of_row if r.mode == mode} for mode in modes}
        settings = of_row[0].settings
        name = f"{settings.get('model')}, {settings.get('image_size')}, {of_row[0].batch_size}, {of_row[0].precision}"
        name += ", channels-last" if settings.get("channels_last") else ""
        rows.append([name, *(text(cell) if cell else "not run" for cell in by_mode.values())])
    return rows


def _memory(cell: Cell) -> str:
    return f"{number(cell.get('step_peak_mib'), '.1f')} ({number(cell.get('saved_mib'), '.1f')})"


def _time(cell: Cell) -> str:
    seconds, ratio, reserved = (cell.get(name) for name in ("seconds_per_sample", "ratio_to_exact", "reserved_mib"))
    text = f"{1e3 * seconds.value:.1f} ms" if seconds else "-"
    if ratio:
        text = f"{ratio.value:.3f} times ({ratio.low:.3f} to {ratio.high:.3f})"
    return text + (f"; {reserved.value:.1f} MiB" if reserved else "")
