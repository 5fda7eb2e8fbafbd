"""One run after the other: those of a sweep that are finished are skipped, one that fails does not stop the rest.

Several processes may work on the same sweep: a cell locked by another one is passed over. On a GPU each cell has a
process of its own, since a capture or a kernel that fails can make CUDA unusable for the rest of its process.

torch is imported after every cell of the sweep has been checked.
"""

import importlib
import itertools
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from runners import fresh, records
from runners.cells import folder_name, overrides
from runners.config import Config
from runners.errors import Busy, Deferred, Diverged, Interrupted, OutOfTime, Stopped, UserError
from runners.failures import judge
from runners.locks import alone_in
from runners.training import budget, signals, turns
from runners.training.turns import Turns

if TYPE_CHECKING:
    from runners.training.loop import Stopping

BEGINNING_SECONDS = 60.0
"""No training run is begun in the last minute of a budget, which data, compiling and recording would take, or in the
last tenth of a small one."""


def run_all(configs: list[Config]) -> int:
    """Run the cells of a sweep one after the other, except those that are finished or locked.

    A cell that fails leaves a record of its failure, and the next one runs, unless a signal ended it. Consecutive
    training runs on a GPU run side by side, at most `jobs` at a time.

    Args:
        configs: checked. `budget_minutes` ends the sweep, by the cell under way where that can go on from a checkpoint,
            else before the first that might not end in time.

    Returns:
        The exit code: that of the last cell that failed, or else OutOfTime's where cells are left.
    """
    codes: list[int] = []
    skipped, longest = 0, 0.0
    began = time.monotonic()
    for numbers in _taken_together(configs):
        waiting = [number for number in numbers if not is_finished(configs[number])]
        skipped += len(numbers) - len(waiting)
        if not waiting:
            continue
        if codes and not has_time_for(configs[waiting[0]], longest):
            break
        if len(numbers) > 1:
            codes += importlib.import_module("runners.streams").run(configs, waiting)
        else:
            config = configs[waiting[0]]
            _announce(f"[{waiting[0] + 1}/{len(configs)}] {folder_name(config) or config.task.name}", codes, skipped,
                      began, to_come=len(configs) - waiting[0])  # fmt: skip
            cell_began = time.monotonic()
            codes.append(run_cell_of_sweep(config))
            longest = max(longest, time.monotonic() - cell_began)
        if codes and codes[-1] > 128:
            return codes[-1]
        if OutOfTime.exit_code in codes:
            break
    skipped += sum(is_finished(config) for config in configs[numbers[-1] + 1 :])
    failures = list(filter(is_failure, codes))
    busy, diverged = codes.count(Busy.exit_code), codes.count(Diverged.exit_code)
    done = codes.count(0) + diverged
    cells_left = len(configs) - done - skipped - len(failures) - busy
    finished = f"{done} done ({diverged} diverged)" if diverged else f"{done} done"
    elsewhere = f", {busy} under way in other processes" if busy else ""
    out_of_time = f", {cells_left} left when budget_minutes={configs[0].budget_minutes} were over" if cells_left else ""
    print(
        f"{len(configs)} cells: {finished}, {skipped} finished before (resume=false does them again), "
        f"{len(failures)} failed{elsewhere}{out_of_time}; {_minutes(time.monotonic() - began)}",
        file=sys.stderr,
    )
    return failures[-1] if failures else OutOfTime.exit_code if cells_left else 0


def _taken_together(configs: list[Config]) -> Iterator[list[int]]:
    """The numbers of the cells in their order: one by one, or together where training runs side by side on a GPU."""

    def is_beside(number: int) -> bool:
        config = configs[number]
        return config.jobs > 1 and config.task.name == "train" and is_on_cuda(config)

    for beside, numbers in itertools.groupby(range(len(configs)), is_beside):
        if beside:
            yield list(numbers)
        else:
            yield from ([number] for number in numbers)


def is_failure(code: int) -> bool:
    """Whether an exit code is a failure: not a result, not a locked cell, not one that goes on later."""
    return code not in (0, Diverged.exit_code, Busy.exit_code, OutOfTime.exit_code)


def _announce(cell: str, codes: list[int], skipped: int, began: float, *, to_come: int) -> None:
    """Print which cell begins, how many are done or failed, and how long the others will take at that pace."""
    elapsed, failed = time.monotonic() - began, sum(map(is_failure, codes))
    counts = [f"{skipped} finished before, {failed} failed"] if skipped or failed else []
    left = f", about {_minutes(elapsed / len(codes) * to_come)} left" if codes else ""
    print(f"{cell} ({', '.join([*counts, f'{_minutes(elapsed)} done'])}{left})", file=sys.stderr)


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
    if folder_name(config) is None or config.task.name in ("memory", "thresholds") or config.gpu.device == "cpu":
        return False
    return bool(importlib.import_module("torch").cuda.is_available())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


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
    with signals.noted() as stop:  # fresh.call passes them on
        try:
            code: int = fresh.call(_run_recording, config)
        except Stopped as error:
            code, reason = error.exit_code, str(error)
    if stop.received is not None:
        return 128 + stop.received
    if reason:
        refuse(reason, code)
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
        with alone_in(Path(config.results) / "runs" / folder) if folder else nullcontext():
            if records_failure and is_finished(config):  # since it was looked at, by another process
                return 0
            return (yield from _alone_in_turns(config, records_failure=records_failure, stopping=stopping))
    except Busy as error:
        if not records_failure:
            return refuse(error, Busy.exit_code)
        print("locked by another process", file=sys.stderr)
        return Busy.exit_code
    except UserError as error:  # the folder cannot be written
        return refuse(error, error.exit_code)


def _alone_in_turns(config: Config, *, records_failure: bool, stopping: "Stopping | None") -> Turns[int | None]:
    """As cell_in_turns, while the run is locked; its failure is recorded before the lock is released."""
    began = time.monotonic()
    try:
        task = _task_module(config)
        if stopping is None:
            task.run(config)
        else:
            yield from task.in_turns(config, stopping)
    except Exception as error:
        exit_code, reason = judge(error)
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
        return refuse(reason, code)
    return 0


def _is_its_own(error: Exception, stopping: "Stopping") -> bool:
    """Whether an exception says something of its run, whatever else its process trains."""
    return isinstance(error, OutOfTime | Interrupted if stopping.has_failure else UserError | Stopped)


def _defer(config: Config, error: Exception, reason: str, stopping: "Stopping") -> None:
    """Print why a cell is to be run again in a new process, and have the others of this process stop."""
    if isinstance(error, Deferred):
        line = reason
    elif stopping.has_failure:
        line = f"fails after another run in this process, perhaps because of it, and goes on in a new one: {reason}"
    else:
        stopping.has_failure = True
        if judge(error)[0] is None:
            traceback.print_exception(error)
        line = f"fails beside other runs, and is tried once more in a process of its own: {reason}"
    print(f"{folder_name(config)}: {line}", file=sys.stderr)


def _task_module(config: Config) -> ModuleType:
    return importlib.import_module(f"runners.tasks.{config.task.name.replace('-', '_')}")


def _record_failure(config: Config, reason: str, seconds: float) -> None:
    try:
        provenance, task = importlib.import_module("runners.provenance"), _task_module(config)
        provenance.record_failure(config, reason, seconds, settings_of=getattr(task, "settings_of", None))
    except (OSError, RuntimeError) as error:  # a full disk, or a GPU that fails, which may be why the cell failed
        refuse(f"the failure could not be recorded: {judge(error)[1]}", 1)


def refuse(message: object, exit_code: int) -> int:
    """Print on one line of stderr why something was not done, and return the exit code."""
    print("blpa-run: error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code
