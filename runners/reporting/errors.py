"""The table of test errors, beside the paper's.

An error is a mean over seeds, with its standard deviation. A table belongs to a group of records that differ only by
mode and seed. The paper's own cells come first, in every precision that was run, and are shown even before any run.
Where a cell was run twice with the same seed, for example on two machines, the newer run counts.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pandas as pd

from runners.records import COLUMNS, GROUP, Record, as_row, canonical
from runners.reporting import paper
from runners.reporting.labels import IN_TITLES, Labels, settings_text
from runners.reporting.pages import Page, Section, failure

Group = tuple[Any, ...]
"""A value for each name of records.GROUP, as in records.as_row."""

PRECISIONS = ("tf32", "bf16", "fp32")
"""In the order of the tables."""

TOP1, TOP5 = "", "top5_"
"""Kinds of errors, as a part of the names of columns. A cell has the first; the second where its records have it."""

OPENING = """\
Mean over seeds ± sample standard deviation (n runs). alpha is the number of bits saved per activation over 32, as the
paper counts them; `exact` here is PyTorch's own layers, which save two tensors per batch norm, ReLU and convolution.
Written by `blpa-run task=tables`.
"""


def summarise(found: list[Record], labels: Labels) -> pd.DataFrame:
    """Summarise the cells of every table, in reading order.

    Args:
        found: records of any metric; test_error_percent counts, with the train_seconds and test_top5_error_percent of
            the same run, and where there is none, a failed training.
        labels: alpha and order of modes.

    Returns:
        A row per group and mode: the fields of GROUP, mode, alpha, error_percent, error_percent_std (sample standard
        deviation; empty below two runs), n, the same of the top-5 error, failed (how, where one did), diverged (how
        many did, which the mean leaves out), seeds, the paper's means and deviations, minutes (of training, the mean),
        device, torch, commit, dates. A cell not run has n = 0.
    """
    run = (*GROUP, "mode", "seed", "date")
    table = [as_row(record) | {"failed": failure(record) if record.failure else ""} for record in found]
    beside = {"seconds": "train_seconds", "top5": "test_top5_error_percent"}
    values = {(row["metric"], *(row[name] for name in run)): row["value"] for row in table}
    errors = [
        row | {column: values.get((metric, *(row[name] for name in run))) for column, metric in beside.items()}
        for row in table
        if row["metric"] == "test_error_percent" or (row["failed"] and row["task"] == "train")
    ]
    frame = pd.DataFrame(errors, columns=[*COLUMNS, "failed", *beside]).astype(dict.fromkeys(beside, "float"))
    frame = frame.assign(measured=frame["failed"] == "").sort_values(["measured", "date"], kind="stable")
    frame = frame.drop_duplicates([*GROUP, "mode", "seed"], keep="last").sort_values("seed")
    runs: dict[Group, dict[str, pd.DataFrame]] = {}
    for key, cell in frame.groupby([*GROUP, "mode"]):
        *group, mode = key
        runs.setdefault(tuple(group), {})[str(mode)] = cell
    for cells in paper.ERROR_PERCENT.keys() - set(map(paper.cells_of, runs)):
        runs[*cells, "", canonical({})] = {}  # in no precision yet
    rows = []
    for place in sorted(runs, key=_reading_order):
        by_mode = runs[place]
        shown = set(by_mode) | {name for name, mode in labels.modes.items() if mode.in_every_error_table}
        for mode in sorted(shown, key=labels.order):
            rows.append(_cell(place, mode, labels.mode(mode).alpha, by_mode.get(mode, frame[:0])))
    return pd.DataFrame(rows)


def _cell(group: Group, mode: str, alpha: str, runs: pd.DataFrame) -> dict[str, Any]:
    """Summarise the runs of one mode in one group, at most one per seed."""
    failed, runs = runs[runs["failed"] != ""]["failed"], runs[runs["failed"] == ""]
    papers = {kind: (None, None) for kind in (TOP1, TOP5)} | {_papers_kind(group): paper.error_percent(group, mode)}
    return dict(zip(GROUP, group, strict=True)) | {
        "mode": mode,
        "alpha": alpha,
        **_statistics(TOP1, runs["value"]),
        **_statistics(TOP5, runs["top5"].dropna()),
        "failed": _listed(failed),
        "diverged": (failed == "diverged").sum(),
        "seeds": _listed(runs["seed"]),
        **{f"paper_{kind}error_percent": mean for kind, (mean, _) in papers.items()},
        **{f"paper_{kind}error_percent_std": deviation for kind, (_, deviation) in papers.items()},
        "minutes": runs["seconds"].mean() / 60 if runs["seconds"].notna().any() else None,
        "device": _listed(runs["device"], "; "),
        "torch": _listed(runs["torch"]),
        "commit": _listed(_commits(runs)),
        "dates": _listed(sorted(date[:10] for date in runs["date"])),
    }


def _statistics(kind: str, values: "pd.Series[float]") -> dict[str, Any]:
    """Return mean, sample standard deviation and number of the errors of one kind, by column."""
    return {
        f"{kind}error_percent": values.mean() if len(values) else None,
        f"{kind}error_percent_std": values.std() if len(values) > 1 else None,
        f"{kind}n": len(values),
    }


def _papers_kind(group: Group) -> str:
    """Return the kind of the errors that the paper has of a group: top-5 for ImageNet, else the usual, top-1."""
    return TOP5 if paper.cells_of(group) in paper.TOP5 else TOP1


def _reading_order(group: Group) -> tuple[Any, ...]:
    """Return the key that sorts groups: the paper's own cells in its order, then the rest by name, digits last."""
    *recipe, precision, settings = group
    place = PRECISIONS.index(precision) if precision in PRECISIONS else -1
    cells = paper.cells_of(group)
    if cells:
        return 0, list(paper.ERROR_PERCENT).index(cells), place
    return 2 if group[0] == "digits" else 1, recipe, place, _settings_text(settings)


def _commits(runs: pd.DataFrame) -> list[str]:
    return [
        f"{commit[:9]}{' with changes' if is_dirty else ''}"
        for commits, is_dirty in zip(runs["commit"], runs["is_dirty"], strict=True)
        if isinstance(commits, str)  # pandas turns None into NaN in a column of strings
        for commit in commits.split("; ")  # a run trained in parts has one per part
    ]


def _listed(values: Iterable[object], separator: str = ", ") -> str:
    """Join the values, each once, in the order of first appearance."""
    return separator.join(dict.fromkeys(map(str, values)))


def page(cells: pd.DataFrame, labels: Labels) -> Page:
    """Lay out the tables: the paper's own cells side by side, then one table per group, with every kind of error.

    A group of the paper's with top-5 errors has a table of its own too, for its top-1 errors.

    Args:
        cells: the rows that `summarise` returns.
        labels: names of modes and data sets.
    """
    groups = dict(iter(cells.groupby(list(GROUP), sort=False)))
    papers = {group: groups.pop(group) for group in list(groups) if paper.cells_of(group)}
    notes = [_notes(group, frame, labels) for group, frame in papers.items()]
    sections = [Section("The paper's cells", _papers_rows(papers, labels), notes)]
    ran_too = {group: frame for group, frame in papers.items() if _papers_kind(group) == TOP5 and frame["n"].any()}
    for group, frame in (ran_too | groups).items():
        width = f" ({group[2]:g}x)" if group[2] != 1 else ""
        title = f"{labels.images(str(group[0]))}, depth {group[1]}{width}, {group[3]:,} iterations, {group[5]}"
        in_title = {key: value for key, value in json.loads(str(group[-1])).items() if key in IN_TITLES}
        title = ", ".join(filter(None, [title, settings_text(in_title)]))
        sections.append(Section(title, _own_rows(group, frame, labels), [_notes(group, frame, labels)]))
    ran = cells[cells["n"] > 0]
    if len(ran):
        notes = ["minutes: wall time of the training steps of a run"]
        sections.append(Section("What ran where", _runs(ran, labels), notes))
    return Page("Test error (%)", OPENING, sections)


def _papers_rows(groups: dict[Group, pd.DataFrame], labels: Labels) -> list[list[str]]:
    """Lay out the paper's cells side by side, a row per mode; its figures stand after all precisions."""
    modes = list(dict.fromkeys(mode for frame in groups.values() for mode in frame["mode"]))
    columns = _first_columns(modes, labels)
    for _, in_precisions in groupby(groups.items(), key=lambda item: paper.cells_of(item[0])):
        for group, frame in in_precisions:
            kind, by_mode = _papers_kind(group), {cell["mode"]: cell for cell in frame.to_dict("records")}
            title = f"{_images(group, labels)}, {group[5]}".removesuffix(", ")
            columns.append([title, *(_ours(by_mode.get(mode), kind) for mode in modes)])
        columns.append(["paper", *(_papers(by_mode.get(mode), kind) for mode in modes)])
    return [list(row) for row in zip(*columns, strict=True)]


def _own_rows(group: Group, frame: pd.DataFrame, labels: Labels) -> list[list[str]]:
    """Lay out one group, a row per mode."""
    images, columns = labels.images(group[0]), _first_columns(frame["mode"], labels)
    kinds = {f"{images} top-1": TOP1, f"{images} top-5": TOP5} if frame["top5_n"].any() else {images: TOP1}
    for title, kind in kinds.items():
        columns.append([title, *(_ours(cell, kind) for cell in frame.to_dict("records"))])
    return [list(row) for row in zip(*columns, strict=True)]


def _first_columns(modes: Iterable[str], labels: Labels) -> list[list[str]]:
    return [["", *map(labels.label, modes)], ["alpha", *(labels.mode(mode).alpha for mode in modes)]]


def _images(group: Group, labels: Labels) -> str:
    """Name the images and the errors that the paper has of a group: ImageNet top-5."""
    return labels.images(group[0]) + (" top-5" if _papers_kind(group) == TOP5 else "")


def _runs(cells: pd.DataFrame, labels: Labels) -> list[list[str]]:
    """Lay out time, machine and date of every cell that has been run."""
    rows = [["", "images", "depth", "iterations", "precision", "n", "minutes", "on", "dates"]]
    for cell in cells.to_dict("records"):
        minutes = "-" if pd.isna(cell["minutes"]) else f"{cell['minutes']:.1f}"
        width = f" ({cell['width']:g}x)" if cell["width"] != 1 else ""
        network = [labels.images(cell["dataset"]), f"{cell['depth']}{width}"]
        run = [f"{cell['iterations']:,}", cell["precision"], str(cell["n"]), minutes, cell["device"], cell["dates"]]
        rows.append([labels.label(cell["mode"]), *network, *run])
    return rows


def _ours(cell: dict[Any, Any] | None, kind: str) -> str:
    n = cell[f"{kind}n"] if cell else 0
    if cell is None or not n:
        return str((cell and cell["failed"]) or "not run")
    diverged = f", {cell['diverged']} diverged" if cell["diverged"] else ""
    return f"{_mean_and_deviation(cell, f'{kind}error_percent')} (n={n}{diverged})"


def _papers(cell: dict[Any, Any] | None, kind: str) -> str:
    column = f"paper_{kind}error_percent"
    return "-" if cell is None or pd.isna(cell[column]) else _mean_and_deviation(cell, column)


def _mean_and_deviation(cell: dict[Any, Any], column: str) -> str:
    mean, deviation = cell[column], cell[f"{column}_std"]
    return f"{mean:.2f}" if pd.isna(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _notes(group: Group, frame: pd.DataFrame, labels: Labels) -> str:
    """Write what the table does not hold: recipe, seeds, machine, versions."""
    _, depth, width, iterations, batch_size, precision, settings = group
    recipe = f"depth {depth}, width {width:g}, {iterations:,} iterations of batch {batch_size}"
    recipe = ", ".join(filter(None, [recipe, precision, _settings_text(settings)]))
    ran = frame[frame["n"] > 0]
    source = _listed(filter(None, frame["failed"])) or "not run"
    if len(ran):
        source = f"seeds {_listed(ran['seeds'], ' / ')}; {_listed(ran['device'], '; ')}; torch {_listed(ran['torch'])}"
        source += f"; commit {_listed(filter(None, ran['commit'])) or 'unknown'}"
    return f"{_images(group, labels)}: {recipe}; {source}."


def _settings_text(settings: str) -> str:
    """Write the settings of a group for people."""
    return settings_text(json.loads(settings))
