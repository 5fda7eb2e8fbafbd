"""One record per measured number: what was measured, in which configuration, on which machine, by which commit.

A run writes its own records to results/runs/<run>/records.json and touches no other file, so that many may finish at
once. `collect` merges those files with the rows of results/records.csv, which is committed and outlives the runs:

    records.csv = newest of (records.csv + runs/*/records.json), cell by cell

A file that does not read back whole is never written over: it is named, and nothing is written from the others.
Two records belong to the same cell where every field of `CELL` agrees, and the name given by run=, if any.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runners import locks, reading
from runners.errors import Diverged
from runners.files import write_csv, write_whole
from runners.reading import FINITE, FLAG, NAME, OBJECT, TEXT, TIME_UTC, WHOLE, Kind, Row

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

KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(COLUMNS, NAME),
    **dict.fromkeys(("unit", "command", "failure", "segments"), TEXT),
    **dict.fromkeys(("value", "low", "high", "width"), FINITE),
    **dict.fromkeys(("n", "depth", "seed", "batch_size", "iterations"), WHOLE),
    **dict.fromkeys(("triton", "cuda", "commit"), NAME.or_none()),
    "bits": WHOLE.or_none(), "predicted": FLAG, "is_dirty": FLAG.or_none(), "date": TIME_UTC, "settings": OBJECT,
}  # fmt: skip
"""What each column holds in files."""

CELL = (
    "experiment", "task", "metric", "dataset", "mode", "bits", "depth", "width", "seed", "batch_size", "precision",
    "kernels", "iterations", "device", "settings",
)  # fmt: skip
"""A newer record of the same cell replaces the older."""

RECORDS, EARLIER, FAILURE = FILES = "records.json", "earlier.json", "failure.json"
"""A run's files: what it measured, what other commands measured in the same folder, and why it failed."""

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
        records: what the run measured. They replace what it measured before; records of another command that the
            folder held are added to `run_dir`/earlier.json first.
        run_dir: the run's own folder under results/runs.

    Raises:
        UserError: what the folder holds does not read back whole; it is untouched.
    """
    written, before = list(records), read_run(run_dir)
    commands = {record.command for record in written}
    if any(record.command not in commands for record in before):
        earlier = run_dir / EARLIER
        _write_json(_newest([*_read_if_there(earlier), *before]), earlier)
    _write_json(written, run_dir / RECORDS)


def write_failure(record: Record, run_dir: Path) -> None:
    """Write the record of a run that failed to `run_dir`/failure.json, beside what it may have measured before.

    A divergence is final: a later failure does not replace it.

    Raises:
        UserError: the failure there does not read back whole; it is untouched.
    """
    if record.failure.startswith(Diverged.PREFIX) or not read_divergence(run_dir):
        _write_json([record], run_dir / FAILURE)


def forget_failure(run_dir: Path) -> None:
    """Remove the record of a failure, when the run starts anew or has finished."""
    (run_dir / FAILURE).unlink(missing_ok=True)


def _write_json(records: Iterable[Record], file: Path) -> None:
    rows = [asdict(record) for record in records]
    write_whole(file, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def read(file: Path) -> list[Record]:
    """Read one run's records.

    Args:
        file: a records.json.

    Raises:
        UserError: the file holds something else; it is named, with the record and the column.
    """
    return reading.read_json(file, KINDS, _record, of="records")


def read_run(run_dir: Path) -> list[Record]:
    """Read a run's records; none where there are none yet.

    Args:
        run_dir: the run's own folder under results/runs.

    Raises:
        UserError: the file does not read back whole.
    """
    return _read_if_there(run_dir / RECORDS)


def read_divergence(run_dir: Path) -> list[Record]:
    """Read the record of a training run that diverged, as `read_run` does; none of another run."""
    return [record for record in _read_if_there(run_dir / FAILURE) if record.failure.startswith(Diverged.PREFIX)]


def check(run_dir: Path) -> None:
    """Check that what a run would write over can be read, before it takes hours.

    Raises:
        UserError: a file of records in the run's folder does not read back whole.
    """
    for name in FILES:
        _read_if_there(run_dir / name)


def _read_if_there(file: Path) -> list[Record]:
    return read(file) if file.exists() else []


def collect(results: Path) -> list[Record]:
    """Merge every run's records into records.csv and return them all; one process at a time does it.

    Args:
        results: the folder that holds runs/ and records.csv; either may be missing.

    Returns:
        As `merge`.

    Raises:
        UserError: a file does not hold records; it is named.
        Busy: as `locked`.
    """
    if not merge(results):
        return []
    with locked(results):
        found = merge(results)
        write_csv(results / "records.csv", list(map(as_row, found)))
    return found


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Keep other processes from the tables that gather runs: who reads and then writes would lose another's rows.

    Raises:
        Busy: another process holds the lock; only without flock (runners/locks.py), else it is waited for.
    """
    busy = f"another process is writing the tables of {results}"
    with locks.held(results / ".lock", seconds=60, busy=busy):
        yield


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
    found = list(reading.read_csv(table, KINDS, _record, of="records").values()) if table.exists() else []
    for file in sorted(results.glob("runs/*/*.json")):
        if file.name in FILES:
            found += _read_if_there(file)  # a run begun anew removes its failure
    measured: dict[str, str] = {}
    for record in found:
        if not record.failure:
            measured[record.command] = max(record.date, measured.get(record.command, ""))
    return [
        record for record in _newest(found) if not (record.failure and measured.get(record.command, "") >= record.date)
    ]


def _newest(found: Iterable[Record]) -> list[Record]:
    """Return the newest record of each cell, sorted by cell; of two of one date the last."""
    by_date = sorted(found, key=lambda record: record.date)
    newest = {(*key(record, CELL), _given_name(record)): record for record in by_date}
    return [newest[cell] for cell in sorted(newest, key=_none_first)]


def _record(row: Row) -> Record:
    """Make a record of the values of its columns."""
    record = Record(**row)
    if bool(record.failure) != (record.metric == "failed"):
        raise ValueError(f"metric is {record.metric!r} with failure {record.failure!r}, expected failed with a reason")
    return record


def _given_name(record: Record) -> str:
    """Return the end of the command that names the run, as cells.overrides writes it; empty where none was given."""
    end = record.command.rpartition(" ")[2]
    return end if "run=" in end else ""


def _none_first(cell: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(value is not None, value) for value in cell]
