"""The curves of finished runs: test error at every evaluation.

A run's metrics.csv is in results/runs, which is not committed. All are gathered in results/curves.csv, which is, so a
fresh clone draws the same figures. As in the tables, the newer of two runs of the same cell and seed counts.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from runners import records
from runners.errors import Refusals, UserError
from runners.files import write_csv
from runners.reading import ANY_NUMBER, FINITE, WHOLE, Kind, Row, read_csv
from runners.records import GROUP, KINDS, Record, canonical

METRICS = {
    "iteration": WHOLE,
    "learning_rate": FINITE,
    "train_loss": FINITE,
    "train_error_percent": FINITE,
    "test_loss": ANY_NUMBER,  # only a training loss that is not finite ends a run
    "test_error_percent": FINITE,
}
"""Columns of metrics.csv."""

TOP5 = {"test_top5_error_percent": FINITE.or_none()}
"""Its last column, where the data set has a top-5 error."""

RUN = (*GROUP, "mode", "seed", "date")
COLUMNS: dict[str, Kind] = {**{name: KINDS[name] for name in RUN}, **METRICS, **TOP5}
"""Columns of curves.csv; without the last one where no run has it."""


def gather(results: Path, refusals: Refusals | None = None) -> pd.DataFrame:
    """Merge the metrics of finished runs into curves.csv.

    Args:
        results: the folder that holds runs/ and curves.csv; either may be missing.
        refusals: collects the refusal of a metrics.csv that does not read back whole; curves.csv keeps what it has of
            that run. None raises it.

    Returns:
        The newest curve of each cell and seed, a row per evaluation: the fields of GROUP, mode, seed, date, then the
        columns of metrics.csv.

    Raises:
        UserError: curves.csv or the records of a run do not read back whole; nothing is written.
    """
    table, curves = results / "curves.csv", list[list[Row]]()
    if table.exists() or any(results.glob("runs/*/metrics.csv")):
        with records.locked(results):
            curves = _merge(results, refusals)
            if curves:
                rows = [row for curve in curves for row in curve]
                unused = {name for name in TOP5 if all(row[name] is None for row in rows)}
                write_csv(table, [{name: row[name] for name in row if name not in unused} for row in rows])
    newest = {_values(curve, (*GROUP, "mode", "seed")): curve for curve in curves}
    return pd.DataFrame([row for curve in newest.values() for row in curve], columns=list(COLUMNS))


def _merge(results: Path, refusals: Refusals | None) -> list[list[Row]]:
    """Return the curve of every run, sorted by cell, seed and date.

    A curve that was gathered before must be that of its run still: else one of the two was damaged since.
    """
    table = results / "curves.csv"
    before = {_values(curve, RUN): curve for curve in (_gathered(table) if table.exists() else [])}
    found: list[tuple[Path, list[Row]]] = []
    for file in sorted(results.glob("runs/*/records.json")):
        for record in records.read(file):
            metrics = file.with_name("metrics.csv")
            if record.metric == "test_error_percent" and metrics.exists():
                with refusals.collected() if refusals else nullcontext():
                    if curve := _of_run(record, metrics):
                        found.append((metrics, curve))
    curves = {_values(curve, RUN): curve for _, curve in found} | before
    texts = {str(curve) for _, curve in found}
    for metrics, curve in found:
        gathered = curves[_values(curve, RUN)]
        with refusals.collected() if refusals else nullcontext():
            if str(gathered) not in texts:
                at = min(row["iteration"] for row in (*curve, *gathered) if (row in curve) != (row in gathered))
                raise UserError(f"{metrics}, iteration {at}: expected what {table} has of the same run; mend either")
    return [curves[run] for run in sorted(curves)]


def _values(curve: list[Row], columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(curve[0][name] for name in columns)


def _gathered(table: Path) -> list[list[Row]]:
    """Read the curves of curves.csv."""
    runs: dict[tuple[Any, ...], dict[int, Row]] = {}
    for line, row in read_csv(table, COLUMNS, dict, of="curves", newer=TOP5).items():
        row["settings"] = canonical(row["settings"])
        runs.setdefault(tuple(row[name] for name in RUN), {})[line] = row
    curves = [_curve(table, lines) for lines in runs.values()]
    for curve, lines in zip(curves, runs.values(), strict=True):
        end, expected = curve[-1]["iteration"], curve[-1]["iterations"]
        if end != expected:
            raise UserError(f"{table}, line {max(lines)}: the curve ends at iteration {end}, expected {expected}")
    return curves


def _of_run(record: Record, metrics: Path) -> list[Row]:
    """Read a run's curve; none where its metrics are newer than the record, as the run was started anew."""
    curve = _curve(metrics, read_csv(metrics, METRICS | TOP5, dict, of="metrics", newer=TOP5))
    if not curve or curve[-1]["iteration"] != record.iterations:
        return []
    run = dict(zip(RUN, records.key(record, RUN), strict=True))
    return [run | row for row in curve]


def _curve(file: Path, lines: Mapping[int, Row]) -> list[Row]:
    """Sort the evaluations of one run, read from the lines of a file; the same evaluation may be there twice."""
    found: dict[int, Row] = {}
    for line, row in lines.items():
        iteration = row["iteration"]
        if found.setdefault(iteration, row) != row:
            raise UserError(f"{file}, line {line}: iteration is {iteration}, which is there before with other values")
    return [found[iteration] for iteration in sorted(found)]
