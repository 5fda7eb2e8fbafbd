"""How far each training run is, and the files that another machine needs to go on with all of them.

    results/carry.txt    their names, a line each, relative to results:   tar -cf carried.tar -C results -T carry.txt
    results/keep.txt     the other checkpoints: what task.keep_every keeps for other tasks, and the one to fall back on

A run that is under way needs its newest checkpoint, which holds its curve as well; one that is finished is its records
and its curve, one that diverged the record of that too.
"""

from pathlib import Path

from runners import records
from runners.config import Config
from runners.files import write_whole
from runners.records import Record
from runners.reporting.pages import aligned
from runners.training import checkpoints

MIB = 2**20


def run(config: Config) -> list[Record]:
    """Print a row a run, and write carry.txt and keep.txt.

    Args:
        config: `results` is the folder of runs.

    Returns:
        Nothing is measured: an empty list.
    """
    results = Path(config.results)
    rows = [["run", "iterations", "of", "test error (%)", "carried (MiB)"]]
    carried: list[Path] = []
    kept: list[Path] = []
    for run_dir in sorted(path for path in results.glob("runs/*") if path.is_dir()):
        found = _diverged(run_dir) or _under_way(run_dir) or _finished(run_dir)
        if found is not None:
            cells, files = found
            rows.append([run_dir.name, *cells, f"{_mib(files):.1f}"])
            carried += files
            kept += [file for file in checkpoints.checkpoints(run_dir) if file not in files]
    if not carried:
        print(f"no training run under {results / 'runs'} has come to a checkpoint yet")
        return []
    print(aligned(rows))
    for name, files in (("carry.txt", carried), ("keep.txt", kept)):
        write_whole(results / name, "".join(f"{file.relative_to(results)}\n" for file in files))
        print(f"{results / name}: {len(files)} files, {_mib(files):.1f} MiB")
    return []


def _diverged(run_dir: Path) -> tuple[list[str], list[Path]] | None:
    """The same four things as _finished of a run that diverged."""
    for record in records.read_divergence(run_dir):
        files = _existing(run_dir, "failure.json", "records.json", "metrics.csv")
        return ["diverged", f"{record.iterations:,}", "-"], files
    return None


def _finished(run_dir: Path) -> tuple[list[str], list[Path]] | None:
    """Iterations, of how many, test error, and the files of a run that has its records."""
    for record in records.read_run(run_dir):
        if record.metric == "test_error_percent":
            cells = [f"{record.iterations:,}", f"{record.iterations:,}", f"{record.value:.2f}"]
            return cells, _existing(run_dir, "records.json", "metrics.csv")
    return None


def _under_way(run_dir: Path) -> tuple[list[str], list[Path]] | None:
    """The same of a run that has a good checkpoint, unless that is its end and the records have been made of it."""
    found = checkpoints.newest(run_dir)
    if found is None:
        return None
    file, state = found
    progress, iterations = state["progress"], state["configuration"]["dataset.iterations"]
    if progress["iteration"] == iterations and records.read_run(run_dir):
        return None
    error = f"{progress['rows'][-1][-1]:.2f}" if progress["rows"] else "-"
    return [f"{progress['iteration']:,}", f"{iterations:,}", error], [file]


def _existing(run_dir: Path, *names: str) -> list[Path]:
    return [run_dir / name for name in names if (run_dir / name).exists()]


def _mib(files: list[Path]) -> float:
    return sum(file.stat().st_size for file in files) / MIB
