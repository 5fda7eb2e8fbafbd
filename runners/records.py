"""One record per measured number: what was measured, in which configuration, on which machine, by which commit.

A run writes its own records to results/runs/<run>/records.json and touches no other run's, so that many may finish at
once. `collect` merges those files with the rows of results/records.csv, which is committed and outlives the runs:

    records.csv = newest of (records.csv + runs/*/records.json), cell by cell

Two records belong to the same cell where every field of `CELL` agrees.
"""

import csv
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from filelock import FileLock

from runners.errors import Diverged, UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Record:
    """One measured number; the fields are the columns of records.csv, in this order."""

    experiment: str
    """The group of table cells the run belongs to."""
    task: str
    """What measured it, an option of the group task: train, runtime, max-batch."""
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
    """Measurements the value stands for."""
    dataset: str
    """The data set's name."""
    mode: str
    """The mode's name."""
    bits: int | None
    """Bits a code; None where no code is kept."""
    depth: int
    """Layers of the network."""
    width: float
    """Factor on every channel count as given on the command line; a mode's own factor comes on top of it."""
    seed: int
    """The run's seed."""
    batch_size: int
    """Images in a training step; 0 where that is what was looked for."""
    precision: str
    """fp32, tf32 or bf16."""
    kernels: str
    """Back end of the kernel functions; stock where the mode has none."""
    iterations: int
    """Training steps in all."""
    predicted: bool
    """Whether the value was computed rather than measured."""
    device: str
    """The machine's processor, as it names itself; none where the number was computed without one."""
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
    paper_value: float | None
    """The paper's figure for the same cell, which is fp32's, whatever the precision here."""
    note: str
    """What else a reader must know."""
    command: str = ""
    """What blpa-run was told, the places of data and results left out; empty in records older than this column."""
    failure: str = ""
    """Why there is no value: then metric is "failed", and value is how long the cell ran, in seconds."""
    segments: str = ""
    """Kind of the GPU allocator's segments that the value belongs to, usual or expandable; empty where none was asked
    for."""


COLUMNS = tuple(column.name for column in fields(Record))
REQUIRED = tuple(column.name for column in fields(Record) if column.default is MISSING)

CELL = (
    "experiment", "task", "metric", "dataset", "mode", "bits", "depth", "width", "seed", "batch_size", "precision",
    "kernels", "iterations", "device", "note",
)  # fmt: skip
"""A newer record of the same cell replaces the older."""

GROUP = ("dataset", "depth", "width", "iterations", "batch_size", "precision", "note")
"""Records that agree here differ by mode, seed and machine alone: they share a table and a figure."""


def write(records: Iterable[Record], run_dir: Path) -> None:
    """Write a run's records to `run_dir`/records.json, whole or not at all.

    Args:
        records: what the run measured; replaces what it measured before, which records.csv keeps where another command
            had measured it.
        run_dir: the run's own folder under results/runs.
    """
    written, file = list(records), run_dir / "records.json"
    before = {record.command for record in known(run_dir)}
    if before and before != {record.command for record in written}:
        collect(run_dir.parents[1])
    _write_json(written, file)


def write_failure(record: Record, run_dir: Path) -> None:
    """Write the record of a run that failed to `run_dir`/failure.json, beside what it may have measured before.

    That it diverged is what it came to: no other failure takes the place of that.
    """
    if record.failure.startswith(Diverged.PREFIX) or not diverged(run_dir):
        _write_json([record], run_dir / "failure.json")


def forget_failure(run_dir: Path) -> None:
    """Remove that record, since the run was begun anew or has come to its end."""
    (run_dir / "failure.json").unlink(missing_ok=True)


def _write_json(records: Iterable[Record], file: Path) -> None:
    rows = [asdict(record) for record in records]
    write_atomically(file, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def read(file: Path) -> list[Record]:
    """Read one run's records.

    Args:
        file: a records.json.

    Raises:
        UserError: the file holds something else.
    """
    try:
        return [Record(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not a run's records ({error}): remove it, or run the cell again") from error


def known(run_dir: Path) -> list[Record]:
    """A run's records; none where there are none yet, or where the file is damaged, which is said on stderr.

    Args:
        run_dir: the run's own folder under results/runs.
    """
    return _known(run_dir / "records.json")


def diverged(run_dir: Path) -> list[Record]:
    """The record of a training run that diverged; none of another."""
    return [record for record in _known(run_dir / "failure.json") if record.failure.startswith(Diverged.PREFIX)]


def _known(file: Path) -> list[Record]:
    try:
        return read(file) if file.exists() else []
    except UserError as error:
        print(error, file=sys.stderr)
        return []


def as_text(command: list[str]) -> str:
    """Arguments as a shell takes them."""
    return shlex.join(command)


def collect(results: Path) -> list[Record]:
    """Merge every run's records into records.csv and return them all; one process at a time does it.

    Args:
        results: the folder that holds runs/ and records.csv; either may be missing.

    Returns:
        As `merged`.

    Raises:
        UserError: a file is not what its name says; it is named.
    """
    if not merged(results):
        return []
    with FileLock(results / ".lock"):  # else another process might write what it read before this one's changes
        found = merged(results)
        write_table(results / "records.csv", [asdict(record) for record in found])
    return found


def merged(results: Path) -> list[Record]:
    """Read records.csv and every run's records.

    Args:
        results: the folder that holds runs/ and records.csv; either may be missing.

    Returns:
        One record per cell, the newest, sorted by cell; a failure only where the same command measured nothing later.

    Raises:
        UserError: a file is not what its name says; it is named.
    """
    table = results / "records.csv"
    found = _read_table(table) if table.exists() else []
    for file in sorted(results.glob("runs/*/*.json")):
        if file.name in ("records.json", "failure.json"):
            found += read(file)
    found.sort(key=lambda record: record.date)
    newest = {tuple(getattr(record, name) for name in CELL): record for record in found}
    measured = {record.command: record.date for record in found if not record.failure}
    return [
        record
        for record in (newest[cell] for cell in sorted(newest, key=_none_first))
        if not (record.failure and measured.get(record.command, "") >= record.date)
    ]


def write_table(file: Path, rows: Sequence[Mapping[Any, object]], *, columns: Sequence[str] = ()) -> None:
    """Write a CSV file whole or not at all.

    Args:
        file: where.
        rows: all with the same keys; None is left empty.
        columns: the keys in their order; may be left out where there is a row to tell them.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue())


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Args:
        file: where; its folder is made when missing.
        text: the whole content.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.chmod(name, 0o644)  # mkstemp's own mode would keep the file from everyone else
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _read_table(table: Path) -> list[Record]:
    with table.open(encoding="utf-8", newline="") as text:
        rows = csv.reader(text, strict=True)
        header = tuple(next(rows, ()))
        if header != COLUMNS[: max(len(header), len(REQUIRED))]:  # older tables lack the last ones
            raise UserError(f"{table} does not have the columns of a records table: {', '.join(COLUMNS)}")
        try:
            return [_from_text(header, cells) for cells in rows]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{table}, line {rows.line_num}: {error}") from error


def _from_text(header: tuple[str, ...], cells: list[str]) -> Record:
    """A record from the text of its columns: empty is None where the column may be None."""
    values: dict[str, Any] = {}
    for column, text in zip(fields(Record)[: len(header)], cells, strict=True):
        kinds = get_args(column.type) or (column.type,)
        if text == "" and type(None) in kinds:
            values[column.name] = None
        elif kinds[0] is bool:
            values[column.name] = bool(("False", "True").index(text))
        else:
            values[column.name] = kinds[0](text)
    return Record(**values)


def _none_first(cell: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(value is not None, value) for value in cell]
