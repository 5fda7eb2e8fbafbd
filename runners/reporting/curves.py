"""The curves of finished runs: test error at every evaluation.

A run's metrics.csv lives in results/runs, which is not committed. They are gathered in results/curves.csv, which is, so
that a fresh clone draws the same figures. As in the tables, of two runs of the same cell and seed the newer counts.
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
    curves = curves[curves["date"] == curves.groupby(cell)["date"].transform("max")]
    curves = curves.drop_duplicates([*cell, "iteration"], keep="last").sort_values([*cell, "iteration"])
    write_whole(table, curves.to_csv(index=False, lineterminator="\n"))
    return curves


def _curve(record: Record, metrics: Path) -> pd.DataFrame:
    """A run's evaluations; none where the metrics are not those of the record (the run has been started anew)."""
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
    """Read a file of curves, numbers to the last bit, which pandas' own reading does not promise."""
    return pd.read_csv(file, keep_default_na=False, converters=dict.fromkeys(FLOATS, float))
