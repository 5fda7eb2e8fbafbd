"""One record per measured number: what was measured, in which configuration, on which machine, by which commit.

A run writes its own records to results/runs/<run>/records.json and touches no other run's, so that many may finish at
once. `collect` merges those files with the rows of results/records.csv, which is committed and outlives the runs:

    records.csv = newest of (records.csv + runs/*/records.json), cell by cell

Two records belong to the same cell where every field of `CELL` agrees, and the name given by run=, if any.
"""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock

from runners.errors import Diverged, UserError
from runners.files import write_csv, write_whole

Settings = Mapping[str, Any]
"""What decides a number besides the columns of its record, by name; values are those of JSON."""


@dataclass(frozen=True)
class Record:
    """One measured number; the fields are the columns of records.csv, in this order."""

    experiment: str
    """The group of table cells the run belongs to."""
    task: str
    """The task that measured it: train, runtime, max-batch."""
    metric: str
    """What was measured: test_error_percent."""
    unit: str
    """Unit of value, low and high."""
    value: float
    """The number."""
    low: float
    """Lower end of its spread; the value itself where there is none."""
    high: float
    """Upper end of its spread; the value itself where there is none."""
    n: int
    """Number of measurements behind the value."""
    dataset: str
    """The data set's name."""
    mode: str
    """The mode's name."""
    bits: int | None
    """Bits per element of the saved codes; None where the mode has no codes."""
    depth: int
    """Layers of the network."""
    width: float
    """Factor on every channel count as given on the command line; a mode's own factor comes on top of it."""
    seed: int
    """The run's seed."""
    batch_size: int
    """Images per training step; 0 where it is the result."""
    precision: str
    """fp32, tf32 or bf16."""
    kernels: str
    """Backend of the kernel functions; stock where the mode has none."""
    iterations: int
    """Number of training steps."""
    predicted: bool
    """Whether the value was computed rather than measured."""
    device: str
    """Name of the machine's processor; none where the number was computed without one."""
    torch: str
    """Version of torch."""
    triton: str | None
    """Version of triton; None where it is not installed."""
    cuda: str | None
    """CUDA version torch was built with, where the run used CUDA."""
    commit: str | None
    """Commit of the source; None for an installed package."""
    is_dirty: bool | None
    """Whether the package's source differed from the commit."""
    date: str
    """When the record was made: UTC, ISO 8601, to the second."""
    settings: Settings = field(default_factory=dict, hash=False)
    """What else decides the number: the memory budget, the checkpoint, recipe and mode settings that differ from their
    YAML file. A JSON object in files."""
    command: str = ""
    """Arguments of blpa-run that repeat the run, without data and results paths; empty in the oldest records."""
    failure: str = ""
    """Why there is no value: then metric is "failed", and value is how long the cell ran, in seconds."""
    segments: str = ""
    """Kind of the GPU allocator's segments that the value belongs to, usual or expandable; empty where none was
    chosen."""


COLUMNS = tuple(column.name for column in fields(Record))

CELL = (
    "experiment", "task", "metric", "dataset", "mode", "bits", "depth", "width", "seed", "batch_size", "precision",
    "kernels", "iterations", "device", "settings",
)  # fmt: skip
"""A newer record of the same cell replaces the older."""

GROUP = ("dataset", "depth", "width", "iterations", "batch_size", "precision", "settings")
"""Records that agree here differ by mode, seed and machine alone: they share a table and a figure."""


def canonical(settings: Settings) -> str:
    """Write settings as JSON text; equal settings give equal text."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def as_row(record: Record) -> dict[str, Any]:
    """Return a record as a row of a table, by column; settings are their canonical text."""
    return asdict(record) | {"settings": canonical(record.settings)}


def key(record: Record, columns: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of some columns, in the form of `as_row`, such as those of `CELL` or `GROUP`."""
    row = as_row(record)
    return tuple(row[name] for name in columns)


def write(records: Iterable[Record], run_dir: Path) -> None:
    """Write a run's records to `run_dir`/records.json, whole or not at all.

    Args:
        records: what the run measured. They replace what it measured before; records of another command are merged
            into records.csv first.
        run_dir: the run's own folder under results/runs.
    """
    written, file = list(records), run_dir / "records.json"
    before = {record.command for record in read_run(run_dir)}
    if before and before != {record.command for record in written}:
        collect(run_dir.parents[1])
    _write_json(written, file)


def write_failure(record: Record, run_dir: Path) -> None:
    """Write the record of a run that failed to `run_dir`/failure.json, beside what it may have measured before.

    A divergence is final: a later failure does not replace it.
    """
    if record.failure.startswith(Diverged.PREFIX) or not read_divergence(run_dir):
        _write_json([record], run_dir / "failure.json")


def forget_failure(run_dir: Path) -> None:
    """Remove the record of a failure, when the run starts anew or has finished."""
    (run_dir / "failure.json").unlink(missing_ok=True)


def _write_json(records: Iterable[Record], file: Path) -> None:
    rows = [asdict(record) for record in records]
    write_whole(file, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def read(file: Path) -> list[Record]:
    """Read one run's records.

    Args:
        file: a records.json.

    Raises:
        UserError: the file holds something else.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        for row in rows:
            _check_columns(row)
        return [Record(**row) for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not a run's records ({error}): remove it, or run the cell again") from error


def read_run(run_dir: Path) -> list[Record]:
    """Read a run's records; none where there are none yet, or where the file is damaged, which is printed to stderr.

    Args:
        run_dir: the run's own folder under results/runs.
    """
    return _read_undamaged(run_dir / "records.json")


def read_divergence(run_dir: Path) -> list[Record]:
    """Read the record of a training run that diverged; none of another run."""
    found = _read_undamaged(run_dir / "failure.json")
    return [record for record in found if record.failure.startswith(Diverged.PREFIX)]


def _read_undamaged(file: Path) -> list[Record]:
    try:
        return read(file) if file.exists() else []
    except UserError as error:
        print(error, file=sys.stderr)
        return []


def collect(results: Path) -> list[Record]:
    """Merge every run's records into records.csv and return them all; one process at a time does it.

    Args:
        results: the folder that holds runs/ and records.csv; either may be missing.

    Returns:
        As `merge`.

    Raises:
        UserError: a file does not hold records; it is named.
    """
    if not merge(results):
        return []
    with FileLock(results / ".lock"):  # two processes that read and then write would lose each other's rows
        found = merge(results)
        write_csv(results / "records.csv", list(map(as_row, found)))
    return found


def merge(results: Path) -> list[Record]:
    """Read records.csv and every run's records.

    Args:
        results: the folder that holds runs/ and records.csv; either may be missing.

    Returns:
        One record per cell, the newest, sorted by cell; a failure only where the same command measured nothing later.

    Raises:
        UserError: a file does not hold records; it is named.
    """
    table = results / "records.csv"
    found = _read_csv(table) if table.exists() else []
    for file in sorted(results.glob("runs/*/*.json")):
        if file.name in ("records.json", "failure.json"):
            found += read(file)
    found.sort(key=lambda record: record.date)
    newest = {(*key(record, CELL), _given_name(record)): record for record in found}
    measured = {record.command: record.date for record in found if not record.failure}
    return [
        record
        for record in (newest[cell] for cell in sorted(newest, key=_none_first))
        if not (record.failure and measured.get(record.command, "") >= record.date)
    ]


def _check_columns(columns: Sequence[str]) -> None:
    """Raise a ValueError that names the columns that are unknown and those that are missing."""
    unknown = [name for name in columns if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in columns]
    if unknown or missing:
        raise ValueError(
            f"its columns are not those of records: unknown {', '.join(unknown) or 'none'}; "
            f"missing {', '.join(missing) or 'none'}; expected {', '.join(COLUMNS)}"
        )


def _read_csv(table: Path) -> list[Record]:
    with table.open(encoding="utf-8", newline="") as text:
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, [])
            _check_columns(header)
            return [_from_text(dict(zip(header, cells, strict=True))) for cells in rows]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{table}, line {rows.line_num}: {error}") from error


def _from_text(row: Mapping[str, str]) -> Record:
    """Make a record from the text of its columns: empty is None where the column may be None."""
    values: dict[str, Any] = {}
    for column in fields(Record):
        text, kinds = row[column.name], get_args(column.type) or (column.type,)
        if column.name == "settings":
            values[column.name] = json.loads(text)
        elif text == "" and type(None) in kinds:
            values[column.name] = None
        elif kinds[0] is bool:
            values[column.name] = bool(("False", "True").index(text))
        else:
            values[column.name] = kinds[0](text)
    return Record(**values)


def _given_name(record: Record) -> str:
    """Return the end of the command that names the run, as cells.overrides writes it; empty where none was given."""
    end = record.command.rpartition(" ")[2]
    return end if "run=" in end else ""


def _none_first(cell: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(value is not None, value) for value in cell]
