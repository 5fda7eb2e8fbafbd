"""The table of kernels: bandwidth of each function relative to a copy, and time of a BN-ReLU-conv relative to exact."""

from runners.records import Record, Settings, canonical
from runners.reporting.labels import Labels, settings_text
from runners.reporting.pages import Page, Section, commits, listed, number

SHARE = "_share_of_copy"
SHAPE = ("kernel_size", "in_channels", "out_channels")
"""Settings that name a BN-ReLU-conv."""
OPENING = """\
Functions: time, and bandwidth as a percentage of the bandwidth of a copy of the same activation, counting every element
that must be read or written once. Measured on the activations of the network's own blocks, which fit the cache of a
large GPU, and on one that fits no cache. BN-ReLU-conv: forward and backward time of batch norm, ReLU and convolution,
in milliseconds and relative to exact. Medians over n turns. Written by `blpa-run task=tables`.
"""


def cells(found: list[Record], labels: Labels) -> list[Record]:
    """Select the records that the table shows, in its order.

    Args:
        found: records of any task.
        labels: names and order of modes.
    """
    shown = [record for record in found if record.task == "kernels" and not record.failure]
    return sorted(shown, key=lambda r: (
        *_conditions(r), canonical(r.settings), _place(r.metric), labels.order(r.mode), r.kernels
    ))  # fmt: skip


def _place(metric: str) -> tuple[int, str]:
    """Return the key that sorts metrics: the copy first, then the functions in the order in which a step calls them."""
    functions = ("copy", "channel_stats", "normalise_rectify_encode", "decode", "backward")
    name = metric.removesuffix(SHARE)
    return (functions.index(name) if name in functions else len(functions)), metric


def page(shown: list[Record], labels: Labels) -> Page:
    """Lay out the tables, one for each precision, mode and machine.

    Args:
        shown: the records that `cells` returns.
        labels: names and order of modes.
    """
    sections = []
    for conditions in dict.fromkeys(map(_conditions, shown)):
        group = [record for record in shown if _conditions(record) == conditions]
        notes = (
            f"torch {listed({record.torch for record in group})}; triton {listed({str(r.triton) for r in group})}; "
            f"n = {listed({str(record.n) for record in group})}; commit {commits(group)}."
        )
        device, precision, command = conditions
        title = f"{precision}, {device}"
        mode = labels.label(next((record.mode for record in group if record.metric.endswith(SHARE)), command))
        functions = [record for record in group if not record.metric.startswith("unit_")]
        for batch in sorted({record.batch_size for record in functions}, reverse=True):
            on = f"functions at batch {batch}" if batch else "functions beyond any cache"
            at_batch = [record for record in functions if record.batch_size == batch]
            sections.append(Section(f"{mode}, {title}: {on}", _functions(at_batch), [notes]))
        sections.append(Section(f"{mode}, {title}: BN-ReLU-conv", _bn_relu_convs(group, labels), []))
    return Page("Kernels", OPENING, sections, "blpa-run task=kernels mode=4bit")


def _functions(group: list[Record]) -> list[list[str]]:
    """Lay out a row per function and backend, a column per shape; shapes with many rows first."""
    by_shape = {canonical(record.settings): record.settings for record in group if record.unit == "s"}
    shapes = sorted(
        by_shape, key=lambda shape: (-_size(by_shape[shape], "rows"), _size(by_shape[shape], "channels"), shape)
    )
    seconds = {(r.metric, r.kernels, canonical(r.settings)): r for r in group if r.unit == "s"}
    shares = {(r.metric, r.kernels, canonical(r.settings)): r.value for r in group if r.metric.endswith(SHARE)}
    rows = [["", "kernels", *(settings_text(by_shape[shape]) for shape in shapes)]]
    for name, backend in dict.fromkeys((metric, kernels) for metric, kernels, _ in seconds):
        rows.append([
            name, backend,
            *(_time(seconds.get((name, backend, shape)), shares.get((f"{name}{SHARE}", backend, shape)))
              for shape in shapes),
        ])  # fmt: skip
    return rows


def _size(settings: Settings, name: str) -> int:
    size = settings.get(name)
    return size if isinstance(size, int) else 0


def _time(seconds: Record | None, share: float | None) -> str:
    if seconds is None:
        return "not run"
    return f"{1e3 * seconds.value:.3g} ms" + (f" ({100 * share:.0f} %)" if share else "")


def _bn_relu_convs(group: list[Record], labels: Labels) -> list[list[str]]:
    """Lay out a row per mode, a column per BN-ReLU-conv."""
    found = {
        (r.mode, settings_text({name: r.settings[name] for name in SHAPE if name in r.settings}), r.metric): r
        for r in group
        if r.metric.startswith("unit_")
    }
    shapes = list(dict.fromkeys(shape for _, shape, metric in found if metric == "unit_seconds"))
    modes = list(dict.fromkeys(mode for mode, _, metric in found if metric == "unit_seconds"))
    rows = [["", *shapes]]
    for mode in sorted(modes, key=labels.order):
        times = [
            f"{1e3 * seconds.value:.3g} ms ({number(found.get((mode, shape, 'unit_ratio_to_exact')), '.2f')})"
            if (seconds := found.get((mode, shape, "unit_seconds")))
            else "not run"
            for shape in shapes
        ]
        rows.append([labels.label(mode), *times])
    return rows


def _conditions(record: Record) -> tuple[str, str, str]:
    """Return what the cells of one table share: machine, precision, and the command that measured them."""
    return record.device, record.precision, record.command
