"""Files that are damaged at random, and what the command that reads them does: all or nothing.

    python tests/cases/fuzz.py records.csv 1000     try a thousand damages of records.csv

A damaged file is refused in one line that names it, and every file is left as it is; or it reads back whole, and
nothing that it or another file holds is lost. To add a kind of file, add a `Case` to CASES. test_damaged_files.py tries
a few damages of each.
"""

import csv
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from damage import damages

from runners import reading, records
from runners.cells import task_settings
from runners.config import Config
from runners.files import write_csv
from runners.records import CELL, KINDS, Record, as_row, key
from runners.reporting import curves
from runners.run import run_cell


@dataclass(frozen=True)
class Case:
    """One kind of file."""

    make: Callable[[Path], Path]
    """Fill an empty folder with whole files, and return the one to damage."""
    run: Callable[[Path], int]
    """Run the command that reads the file in a folder; its exit code."""
    check: Callable[[Path, Path], None]
    """Assert that nothing that could be read in the folder before is missing in the folder after the command."""


def fuzz(case: Case, count: int, folder: Path, *, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Try damages of a file.

    Args:
        case: the kind of file.
        count: number of damages.
        folder: an empty folder.
        seed: of the damages.

    Returns:
        How many were refused and accepted, and what went wrong, a text for each.
    """
    whole = folder / "whole"
    file = case.make(whole).relative_to(whole)
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, content in enumerate(damages((whole / file).read_bytes(), count, seed=seed)):
        before, after = folder / "before", folder / "after"
        shutil.copytree(whole, before)
        (before / file).write_bytes(content)
        shutil.copytree(before, after)
        try:
            outcomes[_outcome(case, before, after, file)] += 1
        except Exception as error:
            wrong.append(f"damage {number}: {type(error).__name__}: {error}")
        shutil.rmtree(before)
        shutil.rmtree(after)
    return outcomes, wrong


def _outcome(case: Case, before: Path, after: Path, file: Path) -> str:
    err = StringIO()
    with redirect_stderr(err), redirect_stdout(StringIO()):
        code = case.run(after)
    if code == 0:
        assert err.getvalue() == "", err.getvalue()
        case.check(before, after)
        return "accepted"
    (line,) = err.getvalue().splitlines()
    assert str(after / file) in line, line  # a table that differs from a run's own file is named with it
    for other in before.rglob("*"):
        if other.is_file():
            assert (after / other.relative_to(before)).read_bytes() == other.read_bytes(), f"{other} changed: {line}"
    return "refused"


# ---- results


def record(**values: object) -> Record:
    """Make a record of a training."""
    common = {
        "experiment": "single", "task": "train", "metric": "test_error_percent", "unit": "%", "value": 2.5, "low": 2.5,
        "high": 2.5, "n": 1, "dataset": "digits", "mode": "4bit", "bits": 4, "depth": 29, "width": 1.0, "seed": 0,
        "batch_size": 64, "precision": "fp32", "kernels": "torch", "iterations": 300, "predicted": False,
        "device": "a CPU, 2 threads", "torch": "2.11.0", "triton": None, "cuda": None, "commit": "0123abc",
        "is_dirty": False, "date": "2026-01-01T00:00:00+00:00", "command": "experiment=single task=train",
    }  # fmt: skip
    return Record(**{**common, **values})


def _of_every_task() -> Iterator[Record]:
    """Make what every table shows."""
    yield from (record(metric=metric, seed=2) for metric in ("test_error_percent", "train_seconds"))
    yield record(task="memory", metric="step_peak_mib", predicted=True, device="none", command="task=memory")
    card = {"memory_gib": 11.0, "allowance_mib": 512}
    yield record(task="max-batch", metric="largest_batch", batch_size=0, settings=card, command="task=max-batch")
    for metric in ("seconds_per_sample", "ratio_to_exact"):
        yield record(task="runtime", metric=metric, unit="s", settings=card | {"largest_batch": True})
        yield record(task="converted-runtime", metric=metric, settings={"model": "unet", "image_size": 64}, depth=0)
    for metric in ("error", "cosine", "spread"):
        yield record(task="gradient-error", metric=f"gradient_{metric}", settings={"checkpoint": None})
    for metric in ("saved_mib", "step_peak_mib"):
        yield record(task="explain", metric=metric, predicted=True, settings={"model": "unet", "image_size": 64})
    for metric, unit in (("copy", "s"), ("copy_share_of_copy", "")):
        yield record(task="kernels", metric=metric, unit=unit, settings={"rows": 128, "channels": 64})
    for metric in ("unit_seconds", "unit_ratio_to_exact"):
        shape = {"kernel_size": 3, "in_channels": 16, "out_channels": 16}
        yield record(task="kernels", metric=metric, unit="times", settings=shape)


def _results(folder: Path) -> Path:
    """Make a table, two runs, one of them begun anew by another command, and one that failed."""
    write_csv(folder / "records.csv", list(map(as_row, _of_every_task())))
    run = folder / "runs"
    records.write([record(settings={"mode.clip": 2.0}, command="mode.clip=2")], run / "a")
    records.write([record(date="2026-01-02T00:00:00+00:00"), record(metric="train_seconds", value=0.1)], run / "a")
    records.write([record(seed=1, bits=None, is_dirty=None)], run / "b")
    failed = record(seed=3, metric="failed", failure="diverged: the loss is nan", command="seed=3")
    records.write_failure(failed, run / "c")
    return folder


def _results_with_curves(folder: Path) -> Path:
    """Make the curves of those runs, and of one whose folder is gone."""
    _results(folder)
    for run in ("a", "b"):
        (folder / "runs" / run / "metrics.csv").write_text(
            "iteration,learning_rate,train_loss,train_error_percent,test_loss,test_error_percent\n"
            "100,0.1,1.5,50.25,1.0,40.5\n200,0.1,1.25,30.5,0.75,20.5\n300,0.01,0.5,1.25,0.25,2.5\n"
        )
    gone = folder / "runs" / "gone"
    records.write([record(seed=4)], gone)
    shutil.copy(folder / "runs" / "a" / "metrics.csv", gone)
    curves.gather(folder)
    records.collect(folder)
    shutil.rmtree(gone)
    return folder


def _task(name: str) -> Callable[[Path], int]:
    return lambda folder: run_cell(Config(results=str(folder), task=task_settings(name)))


def records_stay(before: Path, after: Path) -> None:
    """Every record is in the table after, or a newer one of its cell, or what a failed command measured later."""
    found = _records(before)
    table = reading.read_csv(after / "records.csv", KINDS, lambda row: Record(**row), of="records")
    newest = {key(one, CELL): one for one in table.values()}
    for one in found:
        there = newest.get(key(one, CELL))
        if there is None:
            assert one.failure, f"lost: {one}"
            assert any(r.command == one.command and r.date >= one.date and not r.failure for r in found)
        else:
            assert there in found
            assert there.date >= one.date, f"older: {there}"


def _records(folder: Path) -> list[Record]:
    table = folder / "records.csv"
    found = list(reading.read_csv(table, KINDS, lambda row: Record(**row), of="records").values())
    assert len(found) == sum(any(map(str.strip, cells)) for cells in _cells(table)) - 1
    for file in folder.glob("runs/*/*.json"):
        read = records.read(file)
        assert len(read) == len(json.loads(file.read_text(encoding="utf-8-sig")))
        found += read
    return found


def _cells(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        return list(csv.reader(text))


def curves_stay(before: Path, after: Path) -> None:
    """Every evaluation of a finished run is in the table after, or its cell has a newer curve."""
    cell = [name for name in curves.RUN if name != "date"]
    rows_after = _curves(after)
    dates = {_of(row, cell): row["date"] for row in rows_after}
    found = _curves(before)
    assert len(found) == sum(any(map(str.strip, cells)) for cells in _cells(before / "curves.csv")) - 1
    for run_dir in before.glob("runs/*"):
        for one in records.read_run(run_dir):
            if one.metric == "test_error_percent" and (run_dir / "metrics.csv").exists():
                kinds = curves.METRICS | curves.TOP5
                rows = reading.read_csv(run_dir / "metrics.csv", kinds, dict, of="metrics", newer=curves.TOP5).values()
                run = {name: getattr(one, name) for name in curves.RUN}
                if one.iterations == max((row["iteration"] for row in rows), default=0):  # else it was begun anew
                    found += [run | row for row in rows]
    for row in found:
        assert row in rows_after or dates[_of(row, cell)] > row["date"], f"lost: {row}"
    records_stay(before, after)


def _curves(folder: Path) -> list[reading.Row]:
    table = folder / "curves.csv"
    return list(reading.read_csv(table, curves.COLUMNS, dict, of="curves", newer=curves.TOP5).values())


def _of(row: reading.Row, names: list[str]) -> str:
    return json.dumps([row[name] for name in names], sort_keys=True)


CASES = {
    "records.csv": Case(lambda folder: _results(folder) / "records.csv", _task("tables"), records_stay),
    "records.json": Case(lambda folder: _results(folder) / "runs/a/records.json", _task("tables"), records_stay),
    "earlier.json": Case(lambda folder: _results(folder) / "runs/a/earlier.json", _task("tables"), records_stay),
    "failure.json": Case(lambda folder: _results(folder) / "runs/c/failure.json", _task("tables"), records_stay),
    "curves.csv": Case(lambda folder: _results_with_curves(folder) / "curves.csv", _task("plots"), curves_stay),
    "metrics.csv": Case(
        lambda folder: _results_with_curves(folder) / "runs/a/metrics.csv", _task("plots"), curves_stay
    ),
}
"""By the name of the file."""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        outcomes, wrong = fuzz(CASES[sys.argv[1]], int(sys.argv[2]), Path(scratch))
    print(*wrong, sep="\n")
    print(f"{sys.argv[1]}: {outcomes['refused']} refused, {outcomes['accepted']} accepted, {len(wrong)} wrong")
    sys.exit(bool(wrong))
