"""Run one cell under its lock, and record its failure; an error that a user can cause becomes one line.

On a GPU each cell of a sweep has its own process, since a failed capture or kernel can make CUDA unusable for the rest
of its process.
"""

import importlib
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from runners import fresh, locks, processes, records
from runners.cells import command, folder_name, task_module
from runners.config import Config
from runners.errors import (
    Busy,
    Deferred,
    Diverged,
    Interrupted,
    LostProcess,
    OutOfTime,
    Stopped,
    UserError,
    cannot_run_here,
    classify,
)
from runners.training import budget, signals, turns
from runners.training.turns import Turns

if TYPE_CHECKING:
    from runners.training.stopping import Stopping


BEGINNING_SECONDS = 60.0
"""Start no training run in the last minute of a budget, or the last tenth of a small one: reading data, compiling and
writing records take that long."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock a run against other processes.

    Args:
        run_dir: the run's folder, created if missing.

    Raises:
        Busy: another process holds the lock.
        UserError: the folder is not writable.
    """
    busy = f"another process is working on {run_dir}: name another folder by run="
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(run_dir / "lock", seconds=0, busy=busy))
        except OSError as error:
            raise UserError(f"cannot write into {run_dir} ({error.strerror}): name another folder, results=") from error
        yield


def is_failure(code: int) -> bool:
    """Return whether an exit code is a failure: not success, divergence, a locked cell, or the end of the budget."""
    return code not in (0, Diverged.exit_code, Busy.exit_code, OutOfTime.exit_code)


def has_time_for(config: Config, seconds: float) -> bool:
    """Return whether the budget has time for a cell that takes so long; a training run can stop once it has begun."""
    if config.budget_minutes is not None and config.task.name == "train":
        seconds = min(BEGINNING_SECONDS, 0.1 * 60 * config.budget_minutes)
    return budget.seconds_left(config.budget_minutes) > seconds


def is_finished(config: Config) -> bool:
    """Return whether a cell's own folder holds its records; never with resume=false.

    A training run that diverged is finished. Where there is a GPU, a cell predicted or measured without one is not.

    Raises:
        UserError: the records do not read back whole.
    """
    folder = folder_name(config)
    if folder is None or not config.resume:
        return False
    run_dir = Path(config.results) / "runs" / folder
    found = [r for r in (*records.read_run(run_dir), *records.read_divergence(run_dir)) if r.command == command(config)]
    if not found:
        return False
    return any(record.cuda for record in found) or not is_on_cuda(config)


def is_on_cuda(config: Config) -> bool:
    """Return whether a cell computes on a GPU, without making a CUDA context."""
    needs_no_gpu = hasattr(task_module(config.task.name), "NEEDS_NO_GPU") or folder_name(config) is None
    if needs_no_gpu or config.gpu.device == "cpu":
        return False
    return bool(importlib.import_module("torch").cuda.is_available())


def run_cell(config: Config, *, records_failure: bool = False) -> int:
    """Run one cell; an error that a user can cause becomes one line, a bug keeps its traceback.

    Args:
        config: checked.
        records_failure: whether a failure is recorded; then a bug is not raised either.

    Returns:
        The exit code.
    """
    if processes.launched():
        return _run_joined(config, records_failure=records_failure)
    code = turns.alone(cell_in_turns(config, records_failure=records_failure))
    assert code is not None
    return code


def _run_joined(config: Config, *, records_failure: bool) -> int:
    """Run a cell in one of the processes that torchrun or Slurm started; process 0 locks, records and prints."""
    world = importlib.import_module("runners.training.world")
    folder = folder_name(config)
    run_dir = Path(config.results) / "runs" / str(folder)
    is_silent, began = processes.is_silent(), time.monotonic()
    with ExitStack() as lock:  # a failure is recorded before the lock is released
        try:
            with processes.silence() if is_silent else nullcontext(), world.joined(config.gpu) as here:
                is_done = False
                with here.together():
                    if folder and here.is_first:
                        lock.enter_context(locked(run_dir))
                        records.check(run_dir)
                        is_done = records_failure and is_finished(config)
                if not here.broadcast(is_done):
                    task_module(config.task.name).run(config)
            return 0
        except Exception as error:
            if is_silent:
                return _report_own(error)
            if isinstance(error, Busy) and records_failure:
                print(error, file=sys.stderr)
                return Busy.exit_code
            if isinstance(error, LostProcess):
                error = LostProcess(f"{error}{processes.goes_on(config)}")
            return _failed(config, error, time.monotonic() - began, records_failure=records_failure)


def _report_own(error: Exception) -> int:
    """Print why a process other than 0 failed, unless process 0 prints it too; return the exit code."""
    exit_code, reason = classify(error)
    if isinstance(error, (*processes.AGREED, LostProcess, Busy)) or getattr(error, "is_shared", False):
        return exit_code or 1
    if exit_code is None:
        traceback.print_exception(error)
    rank, size = processes.launched() or (0, 1)
    return report_error(f"rank {rank} of {size}: {reason}", exit_code or 1)


def run_cell_of_sweep(config: Config) -> int:
    """Run one of several cells, on a GPU in its own process; a failure or a dead process is recorded.

    A cell that several tasks of a job run has these as its processes.

    Args:
        config: checked.

    Returns:
        The exit code.
    """
    if not is_on_cuda(config) or processes.launched():
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
    """Run one cell as run_cell does; with `stopping`, yield to other runs after each step (loop.in_turns).

    Args:
        config: checked; a training run if `stopping` is given.
        records_failure: as in run_cell.
        stopping: shared by all runs that take turns. The first one that fails, other than by UserError or Stopped, sets
            its `has_failure`.

    Returns:
        The exit code; None where the cell failed beside others or stopped because another failed. Such a failure may
        have another cause, so it is not recorded, and the cell must be run again in a new process.
    """
    folder = folder_name(config)
    run_dir = Path(config.results) / "runs" / str(folder)
    try:
        with locked(run_dir) if folder else nullcontext():
            if folder:
                records.check(run_dir)
            if records_failure and is_finished(config):  # another process has finished it in the meantime
                return 0
            return (yield from _alone_in_turns(config, records_failure=records_failure, stopping=stopping))
    except Busy as error:
        if not records_failure:
            return report_error(error, Busy.exit_code)
        print(error, file=sys.stderr)
        return Busy.exit_code
    except UserError as error:  # the folder cannot be written, or its records not be read
        return report_error(error, error.exit_code)


def _alone_in_turns(config: Config, *, records_failure: bool, stopping: "Stopping | None") -> Turns[int | None]:
    """Run the cell under its lock, as cell_in_turns; a failure is recorded before the lock is released."""
    began = time.monotonic()
    try:
        task = task_module(config.task.name)
        if hasattr(task, "STARTS_PROCESSES"):
            task.run(config)
        elif stopping is None:
            processes.run(task.run, config)
        else:
            yield from task.in_turns(config, stopping)
    except Exception as error:
        if stopping is not None and not _is_its_own(error, stopping):
            _defer(config, error, stopping)
            return None
        return _failed(config, error, time.monotonic() - began, records_failure=records_failure)
    return 0


def _failed(config: Config, error: Exception, seconds: float, *, records_failure: bool) -> int:
    """Record and print a failure, and return its exit code; raise a bug that is not recorded."""
    exit_code, reason = classify(error)
    if exit_code is None and not records_failure:
        raise error
    if exit_code is None:
        traceback.print_exception(error)
    code = exit_code or 1
    has_failed = records_failure and is_failure(code) and code < 128
    if folder_name(config) and (has_failed or code == Diverged.exit_code):
        _record_failure(config, reason, seconds)
    return report_error(reason, code)


def _is_its_own(error: Exception, stopping: "Stopping") -> bool:
    """Return whether an exception is the run's own, whatever else its process trains."""
    if stopping.has_failure:
        return isinstance(error, OutOfTime | Interrupted)
    return isinstance(error, UserError | Stopped) or cannot_run_here(error)


def _defer(config: Config, error: Exception, stopping: "Stopping") -> None:
    """Print why a cell must be run again in a new process, and make the other runs of this process stop."""
    exit_code, reason = classify(error)
    if isinstance(error, Deferred):
        line = reason
    elif stopping.has_failure:
        line = f"fails after another run in this process, perhaps because of it, and goes on in a new one: {reason}"
    else:
        stopping.has_failure = True
        if exit_code is None:
            traceback.print_exception(error)
        line = f"fails beside other runs, and is tried once more in a process of its own: {reason}"
    print(f"{folder_name(config)}: {line}", file=sys.stderr)


def _record_failure(config: Config, reason: str, seconds: float) -> None:
    try:
        importlib.import_module("runners.provenance").record_failure(config, reason, seconds)
    except (OSError, RuntimeError, UserError) as error:  # a full disk, a failing GPU: perhaps the cause of the failure
        report_error(f"the failure could not be recorded: {classify(error)[1]}", 1)


def report_error(message: object, exit_code: int) -> int:
    """Print an error on one line of stderr, and return the exit code."""
    line = " ".join(str(message).split())
    print(f"blpa-run: error: {line}\n", end="", file=sys.stderr)  # in one write, as others write there too
    return exit_code
