"""The table of kernels: what part of a copy's bandwidth each function reaches, and one unit's time beside exact's."""

from runners.records import Record
from runners.reporting.pages import Page, Section, commits, label, listed, mode_order

SHARE = "_share_of_copy"
OPENING = """\
Functions: bytes a second, counting every element that must be read or written once, as a part of what a copy of the
same activation reaches; on the activations of the network's own blocks, which the cache of a large GPU holds, and on
one that no cache holds. Units: batch norm, ReLU and convolution, forward and backward, in milliseconds and beside
exact's. Medians over n turns. Written by `blpa-run task=tables`.
"""


def cells(found: list[Record]) -> list[Record]:
    """The records that the table shows, in its order.

    Args:
        found: records of any task.
    """
    shown = [record for record in found if record.task == "kernels" and not record.failure]
    return sorted(shown, key=lambda r: (*_conditions(r), r.note, _place(r.metric), mode_order(r.mode), r.kernels))


def _place(metric: str) -> tuple[int, str]:
    """A copy first, then the functions in the order in which a step calls them."""
    functions = ("copy", "channel_stats", "normalise_rectify_encode", "decode", "backward")
    name = metric.removesuffix(SHARE)
    return (functions.index(name) if name in functions else len(functions)), metric


def page(shown: list[Record]) -> Page:
    """The tables for reading, one for each precision, mode and machine.

    Args:
        shown: what `cells` returns.
    """
    sections = []
    for conditions in dict.fromkeys(map(_conditions, shown)):
        under = [record for record in shown if _conditions(record) == conditions]
        said = (
            f"torch {listed({record.torch for record in under})}; triton {listed({str(r.triton) for r in under})}; "
            f"n = {listed({str(record.n) for record in under})}; commit {commits(under)}."
        )
        device, precision, command = conditions
        title = f"{precision}, {device}"
        mode = next((record.mode for record in under if record.metric.endswith(SHARE)), command)
        functions = [record for record in under if not record.metric.startswith("unit_")]
        for batch in sorted({record.batch_size for record in functions}, reverse=True):
            on = f"functions at batch {batch}" if batch else "functions beyond any cache"
            at = [record for record in functions if record.batch_size == batch]
            sections.append(Section(f"{label(mode)}, {title}: {on}", _functions(at), [said]))
        sections.append(Section(f"{label(mode)}, {title}: units", _units(under), []))
    return Page("Kernels", OPENING, sections, "blpa-run task=kernels mode=4bit")


def _functions(under: list[Record]) -> list[list[str]]:
    """A row a function and back end, a column a shape."""
    seconds = {(r.metric, r.kernels, r.note): r for r in under if r.unit == "s"}
    shapes = sorted({note for _, _, note in seconds}, key=_shape)
    rows = [["", "kernels", *shapes]]
    for name, back_end in dict.fromkeys((metric, kernels) for metric, kernels, _ in seconds):
        shares = {r.note: r.value for r in under if (r.metric, r.kernels) == (f"{name}{SHARE}", back_end)}
        rows.append([
            name, back_end,
            *(_time(seconds.get((name, back_end, shape)), shares.get(shape)) for shape in shapes),
        ])  # fmt: skip
    return rows


def _shape(note: str) -> tuple[int, int]:
    """How shapes are ordered: as the network's groups, the largest image first."""
    rows, _, _, channels, _ = note.split()
    return -int(rows), int(channels)


def _time(seconds: Record | None, share: float | None) -> str:
    if seconds is None:
        return "not run"
    return f"{1e3 * seconds.value:.3g} ms" + (f" ({100 * share:.0f} %)" if share else "")


def _units(under: list[Record]) -> list[list[str]]:
    """A row a mode, a column a unit."""
    found = {(r.mode, r.note, r.metric): r.value for r in under}
    units = list(dict.fromkeys(note for _, note, metric in found if metric == "unit_seconds"))
    modes = list(dict.fromkeys(mode for mode, _, metric in found if metric == "unit_seconds"))
    rows = [["", *units]]
    for mode in sorted(modes, key=mode_order):
        times = [
            f"{1e3 * found[mode, unit, 'unit_seconds']:.3g} ms ({found[mode, unit, 'unit_ratio_to_exact']:.2f})"
            for unit in units
        ]
        rows.append([label(mode), *times])
    return rows


def _conditions(record: Record) -> tuple[str, str, str]:
    """What the cells of one table share: machine, precision, and the command that measured them."""
    return record.device, record.precision, record.command
