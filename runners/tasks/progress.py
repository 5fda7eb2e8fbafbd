"""Progress of each training run, and its newest checkpoint, with which another machine can continue it."""

from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.config import Config
from runners.errors import Refusals
from runners.records import Record
from runners.reporting.pages import aligned
from runners.training import checkpoints


@dataclass
class Settings:
    """Settings of this task."""

    name: str


ONLY_PRINTS = True


def run(config: Config) -> list[Record]:
    """Print a row for each run.

    Args:
        config: `results` is the folder of runs.

    Returns:
        An empty list: nothing is measured.

    Raises:
        UserError: a run's records or newest checkpoint do not read back whole; it has no row.
    """
    runs, rows, refusals = Path(config.results) / "runs", [], Refusals()
    for run_dir in sorted(filter(Path.is_dir, runs.glob("*"))):
        with refusals.collected():
            rows += _row(run_dir)
    if rows:
        print(aligned([["run", "iterations", "of", "test error (%)", "newest checkpoint"], *rows]))
    elif not refusals.messages:
        print(f"no training run under {runs} has come to a checkpoint yet")
    refusals.raise_if_any()
    return []


def _row(run_dir: Path) -> list[list[str]]:
    """Return the row of a training run that diverged, has records or has a good checkpoint; else no row."""
    found = checkpoints.newest(run_dir)
    file = str(found[0]) if found else "-"
    for record in records.read_divergence(run_dir):
        return [[run_dir.name, "diverged", f"{record.iterations:,}", "-", file]]
    if found:
        progress, iterations = found[1]["progress"], found[1]["configuration"]["dataset.iterations"]
        error = f"{progress['rows'][-1][-1]:.2f}" if progress["rows"] else "-"
        return [[run_dir.name, f"{progress['iteration']:,}", f"{iterations:,}", error, file]]
    return [
        [run_dir.name, f"{record.iterations:,}", f"{record.iterations:,}", f"{record.value:.2f}", file]
        for record in records.read_run(run_dir)
        if record.metric == "test_error_percent"
    ]
