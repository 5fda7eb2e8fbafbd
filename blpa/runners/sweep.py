"""One run after the other: those of a sweep that are finished are skipped, one that fails does not stop the rest.

torch is imported by the first task, after every cell of the sweep has been checked.
"""

import importlib
import sys
import time
import traceback
from pathlib import Path

from blpa import records
from blpa.cells import folder_name, overrides
from blpa.config import Config


def run_all(configs: list[Config]) -> int:
    """Run one cell after the other, in a sweep only those that are not finished yet.

    A cell that fails says so, leaves a record of it, and the next one runs, unless a signal ended it.

    Args:
        configs: checked; one on its own runs whether it is finished or not.

    Returns:
        The exit code: that of the last cell that failed.
    """
    if len(configs) == 1:
        return run_cell(configs[0])
    failure = failed = skipped = 0
    began = time.monotonic()
    for number, config in enumerate(configs):
        if is_finished(config):
            skipped += 1
            continue
        done, elapsed = number - skipped, time.monotonic() - began
        left = f", about {_minutes(elapsed / done * (len(configs) - number))} left" if done else ""
        counts = f"{skipped} finished before, {failed} failed" if skipped or failed else ""
        told = ", ".join(filter(None, [counts, f"{_minutes(elapsed)} done{left}"]))
        print(f"[{number + 1}/{len(configs)}] {folder_name(config) or config.task.name} ({told})", file=sys.stderr)
        exit_code = run_cell(config, records_failure=True)
        failure, failed = exit_code or failure, failed + (exit_code != 0)
        if exit_code > 128:
            return exit_code
    print(
        f"{len(configs)} cells: {len(configs) - skipped - failed} done, {skipped} finished before (resume=false does "
        f"them again), {failed} failed; {_minutes(time.monotonic() - began)}",
        file=sys.stderr,
    )
    return failure


def is_finished(config: Config) -> bool:
    """Whether a cell's own folder holds its records, and resume=false does not ask for new ones."""
    folder = folder_name(config)
    if folder is None or not config.resume:
        return False
    return records.is_finished(Path(config.results) / "runs" / folder, overrides(config))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def run_cell(config: Config, *, records_failure: bool = False) -> int:
    """Run one cell; a mistake or misfortune of the user's becomes one line, a bug keeps its traceback.

    Args:
        config: checked.
        records_failure: whether a failure leaves a record, and a bug is no more than that.

    Returns:
        The exit code.
    """
    began = time.monotonic()
    try:
        module = config.task.name.replace("-", "_")
        importlib.import_module(f"blpa.runners.{module}").run(config)
    except KeyboardInterrupt:
        return refuse("interrupted", 130)
    except Exception as error:
        exit_code, reason = _judge(error)
        if exit_code is None and not records_failure:
            raise
        if exit_code is None:
            traceback.print_exc()
        if records_failure and (exit_code or 1) < 128 and folder_name(config):
            importlib.import_module("blpa.runners.setup").record_failure(config, reason, time.monotonic() - began)
        return refuse(reason, exit_code or 1)
    return 0


def _judge(error: Exception) -> tuple[int | None, str]:
    """The exit code of what is a mistake or misfortune of the user's, None for a bug; and one line that says it."""
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    if isinstance(error, ValueError) and _is_ours(error):
        return 1, str(error)
    said = next(iter(str(error).strip().splitlines()), "")
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, known by name alone: torch need not be there
        return 1, f"does not fit: {said}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"does not compile: {said}"
    return None, f"{type(error).__name__}: {said}"


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it: then, by the rule of this house, its message is meant for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals["__name__"]).startswith("blpa.")


def refuse(message: object, exit_code: int) -> int:
    """Say on one line of stderr why something was not done, and return the exit code."""
    print("blpa-run: error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code
