"""One run: under its lock, with its failure recorded; an error that a user can cause becomes one line.

On a GPU each cell of a sweep has a process of its own, since a capture or a kernel that fails can make CUDA unusable
for the rest of its process.
"""

import importlib
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from runners import fresh, records
from runners.cells import folder_name, overrides, task_module
from runners.config import Config
from runners.errors import (
    Busy,
    Deferred,
    Diverged,
    Interrupted,
    OutOfTime,
    Stopped,
    UserError,
    cannot_run_here,
    classify,
)
from runners.training import budget, signals, turns
from runners.training.turns import Turns

if TYPE_CHECKING:
    from runners.training.loop import Stopping


BEGINNING_SECONDS = 60.0
"""No training run is begun in the last minute of a budget, which data, compiling and recording would take, or in the
last tenth of a small one."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep every other process away from a run; however this process ends, the system lets go of the lock.

    Args:
        run_dir: the run's folder, made where it is missing.

    Raises:
        Busy: another process has it.
        UserError: nothing can be written there.
    """
    lock = FileLock(run_dir / "lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            lock.acquire(blocking=False)
    except Timeout as error:
        raise Busy(f"another process is working on {run_dir}: name another folder by run=") from error
    except OSError as error:
        raise UserError(f"cannot write into {run_dir} ({error.strerror}): name another folder, results=") from error
    try:
        yield
    finally:
        lock.release()


def is_failure(code: int) -> bool:
    """Whether an exit code is a failure: not a result, not a locked cell, not one that goes on later."""
    return code not in (0, Diverged.exit_code, Busy.exit_code, OutOfTime.exit_code)


def has_time_for(config: Config, seconds: float) -> bool:
    """Whether the budget has time for a cell that takes that long; a training run can stop, once it has begun."""
    if config.budget_minutes is not None and config.task.name == "train":
        seconds = min(BEGINNING_SECONDS, 0.1 * 60 * config.budget_minutes)
    return budget.seconds_left(config.budget_minutes) > seconds


def is_finished(config: Config) -> bool:
    """Whether a cell's own folder holds its records, and resume=false does not ask for new ones.

    A training run that diverged is finished. Where there is a GPU, a cell predicted or measured without one is not.
    """
    folder = folder_name(config)
    if folder is None or not config.resume:
        return False
    run_dir, command = Path(config.results) / "runs" / folder, shlex.join(overrides(config))
    found = [r for r in (*records.read_run(run_dir), *records.read_divergence(run_dir)) if r.command == command]
    if not found:
        return False
    return any(record.cuda for record in found) or not is_on_cuda(config)


def is_on_cuda(config: Config) -> bool:
    """Whether a cell computes on a GPU; finding out makes no CUDA context."""
    if folder_name(config) is None or hasattr(task_module(config.task.name), "COUNTS") or config.gpu.device == "cpu":
        return False
    return bool(importlib.import_module("torch").cuda.is_available())


def run_cell(config: Config, *, records_failure: bool = False) -> int:
    """Run one cell; an error that a user can cause becomes one line, a bug keeps its traceback.

    Args:
        config: checked.
        records_failure: whether a failure leaves a record; then a bug is not raised either.

    Returns:
        The exit code.
    """
    code = turns.alone(cell_in_turns(config, records_failure=records_failure))
    assert code is not None
    return code


def run_cell_of_sweep(config: Config) -> int:
    """Run one of several cells, on a GPU in a process of its own; a failure or a dead process leaves a record.

    Args:
        config: checked.

    Returns:
        The exit code.
    """
    if not is_on_cuda(config):
        return run_cell(config, records_failure=True)
    began = time.monotonic()
    reason = ""
    with signals.deferred() as stop:  # fresh.call passes them on
        try:
            code: int = fresh.call(_run_recording, config)
        except Stopped as error:
            code, reason = error.exit_code, str(error)
    if stop.received is not None:
        return 128 + stop.received
    if reason:
        report_error(reason, code)
        fresh.call(_record_failure, config, reason, time.monotonic() - began)
    return code


def _run_recording(config: Config) -> int:
    return run_cell(config, records_failure=True)


def cell_in_turns(config: Config, *, records_failure: bool, stopping: "Stopping | None" = None) -> Turns[int | None]:
    """As run_cell; with `stopping` other runs have their turns between the steps of this one (training.in_turns).

    Args:
        config: checked; with `stopping` a training run.
        records_failure: as in run_cell.
        stopping: shared by all runs that take turns. The first of them that fails, other than by UserError or Stopped,
            sets its `has_failure`.

    Returns:
        The exit code; None where the cell failed beside others, or because of another one: such a failure may not be
        its own, so that it leaves no record, and the cell must be run again in a new process.
    """
    folder = folder_name(config)
    try:
        with locked(Path(config.results) / "runs" / folder) if folder else nullcontext():
            if records_failure and is_finished(config):  # since it was looked at, by another process
                return 0
            return (yield from _alone_in_turns(config, records_failure=records_failure, stopping=stopping))
    except Busy as error:
        if not records_failure:
            return report_error(error, Busy.exit_code)
        print("locked by another process", file=sys.stderr)
        return Busy.exit_code
    except UserError as error:  # the folder cannot be written
        return report_error(error, error.exit_code)


def _alone_in_turns(config: Config, *, records_failure: bool, stopping: "Stopping | None") -> Turns[int | None]:
    """As cell_in_turns, while the run is locked; its failure is recorded before the lock is released."""
    began = time.monotonic()
    try:
        task = task_module(config.task.name)
        if stopping is None:
            task.run(config)
        else:
            yield from task.in_turns(config, stopping)
    except Exception as error:
        exit_code, reason = classify(error)
        if stopping is not None and not _is_its_own(error, stopping):
            _defer(config, error, reason, stopping)
            return None
        if exit_code is None and not records_failure:
            raise
        if exit_code is None:
            traceback.print_exc()
        code = exit_code or 1
        has_failed = records_failure and is_failure(code) and code < 128
        if folder_name(config) and (has_failed or code == Diverged.exit_code):
            _record_failure(config, reason, time.monotonic() - began)
        return report_error(reason, code)
    return 0


def _is_its_own(error: Exception, stopping: "Stopping") -> bool:
    """Whether an exception says something of its run, whatever else its process trains."""
    if stopping.has_failure:
        return isinstance(error, OutOfTime | Interrupted)
    return isinstance(error, UserError | Stopped) or cannot_run_here(error)


def _defer(config: Config, error: Exception, reason: str, stopping: "Stopping") -> None:
    """Print why a cell is to be run again in a new process, and have the others of this process stop."""
    if isinstance(error, Deferred):
        line = reason
    elif stopping.has_failure:
        line = f"fails after another run in this process, perhaps because of it, and goes on in a new one: {reason}"
    else:
        stopping.has_failure = True
        if classify(error)[0] is None:
            traceback.print_exception(error)
        line = f"fails beside other runs, and is tried once more in a process of its own: {reason}"
    print(f"{folder_name(config)}: {line}", file=sys.stderr)


def _record_failure(config: Config, reason: str, seconds: float) -> None:
    try:
        settings_of = getattr(task_module(config.task.name), "settings_of", None)
        importlib.import_module("runners.provenance").record_failure(config, reason, seconds, settings_of=settings_of)
    except (OSError, RuntimeError) as error:  # a full disk, or a GPU that fails, which may be why the cell failed
        report_error(f"the failure could not be recorded: {classify(error)[1]}", 1)


def report_error(message: object, exit_code: int) -> int:
    """Print on one line of stderr why something was not done, and return the exit code."""
    print("blpa-run: error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code
