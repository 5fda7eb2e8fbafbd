"""The curves of finished runs: test error at every evaluation.

A run's metrics.csv is in results/runs, which is not committed. All are gathered in results/curves.csv, which is, so a
fresh clone draws the same figures. As in the tables, the newer of two runs of the same cell and seed counts.
"""

from pathlib import Path

import pandas as pd

from runners import records
from runners.files import write_whole
from runners.records import GROUP, Record

FLOATS = ("width", "learning_rate", "train_loss", "train_error_percent", "test_loss", "test_error_percent")
"""Columns of curves.csv and metrics.csv that are not whole numbers."""


def gather(results: Path) -> pd.DataFrame:
    """Merge the metrics of finished runs into curves.csv.

    Args:
        results: the folder that holds runs/ and curves.csv; either may be missing.

    Returns:
        A row per evaluation: the fields of GROUP, mode, seed, date, then the columns of metrics.csv.
    """
    table = results / "curves.csv"
    found = [_read(table)] if table.exists() else []
    for file in sorted(results.glob("runs/*/records.json")):
        for record in records.read(file):
            if record.metric == "test_error_percent":
                found.append(_curve(record, file.with_name("metrics.csv")))
    found = [rows for rows in found if len(rows)]
    if not found:
        return pd.DataFrame(columns=[*GROUP, "mode", "seed", "date", "iteration", "test_error_percent"])
    cell = [*GROUP, "mode", "seed"]
    curves = pd.concat(found, ignore_index=True)
    place = [*cell, "date", "iteration"]
    curves = curves.drop_duplicates(place, keep="last").sort_values(place)
    write_whole(table, curves.to_csv(index=False, lineterminator="\n"))
    return curves[curves["date"] == curves.groupby(cell)["date"].transform("max")]


def _curve(record: Record, metrics: Path) -> pd.DataFrame:
    """Return a run's evaluations; none where its metrics are newer than the record, as the run was started anew."""
    if not metrics.exists():
        return pd.DataFrame()
    rows = _read(metrics)
    if rows.empty or rows["iteration"].iloc[-1] != record.iterations:
        return pd.DataFrame()
    columns = (*GROUP, "mode", "seed", "date")
    for position, (name, value) in enumerate(zip(columns, records.key(record, columns), strict=True)):
        rows.insert(position, name, value)
    return rows


def _read(file: Path) -> pd.DataFrame:
    """Read a file of curves with numbers exact to the last bit, which pandas' own parser does not guarantee."""
    return pd.read_csv(file, keep_default_na=False, converters=dict.fromkeys(FLOATS, float))
