"""Run the cells of a sweep by one of Hydra's launchers: in this process, in several, or on a cluster.

    blpa-run experiment=table1 -m hydra/launcher=joblib hydra.launcher.n_jobs=4
    blpa-run experiment=table1 -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu

The launcher gets the unfinished cells, composes each again and calls a `_Sweep` with it. If a cell fails, the failure
is recorded and the next cell runs. Several commands may work on the same sweep: each skips the cells that another one
has locked.
"""

import importlib
import itertools
import signal
import sys
import time
from types import FrameType

from hydra._internal.callbacks import Callbacks  # HydraContext needs one, and only hydra.main makes it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from runners import compose, printing
from runners.cells import folder_name
from runners.compose import Cell
from runners.config import Config
from runners.errors import Busy, Diverged, OutOfTime
from runners.run import has_time_for, is_failure, is_finished, is_on_cuda, report_error, run_cell_of_sweep


def run_all(cells: list[Cell]) -> int:
    """Run the cells that are not finished.

    With Hydra's basic launcher they run one after the other, but consecutive training runs on a GPU run side by side,
    at most `jobs` at a time.

    Args:
        cells: the cells of one sweep, checked. At the end of `budget_minutes` a training run stops with a checkpoint;
            no cell starts that may not finish in time.

    Returns:
        The exit code of the last cell that failed, else that of OutOfTime if cells are left, else 0.
    """
    hydra = compose.composed(cells[0].overrides, return_hydra_config=True)
    is_local = hydra.hydra.runtime.choices["hydra/launcher"] == "basic"
    waiting = [cell for cell in cells if not is_finished(cell.config)]
    sweep = _Sweep(waiting=len(waiting), is_local=is_local)
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", file=sys.stderr)
    before = signal.signal(signal.SIGTERM, _terminated)  # else joblib's workers outlive this process
    codes: list[int] = []
    try:
        launcher = _launcher(hydra, sweep)
        for beside, group in itertools.groupby(waiting, lambda cell: is_local and _shares_a_gpu(cell.config)):
            some = list(group)
            if beside and len(some) > 1:
                streams = importlib.import_module("runners.streams")
                ended: dict[int, int] = streams.run([cell.config for cell in some], list(range(len(some))))
                codes += [ended.get(number, OutOfTime.exit_code) for number in range(len(some))]
                sweep.codes = codes[:]
            else:
                returned = launcher.launch([cell.overrides for cell in some], initial_job_idx=len(codes))
                codes += map(_exit_code, returned)
    except KeyboardInterrupt as error:
        return report_error(str(error) or "interrupted", 143 if str(error) else 130)
    except SystemExit as end:  # the cell under way stopped at a signal
        return end.code if isinstance(end.code, int) else 1
    except (HydraException, RuntimeError, ValueError) as error:  # there is no Slurm, or a job was killed
        return report_error(error, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    return _summarise(cells, waiting, codes, time.monotonic() - sweep.began)


class _Sweep:
    """The function that a launcher calls with each composed cell; a launcher's own process gets a copy.

    Args:
        waiting: number of unfinished cells.
        is_local: whether all cells run in this process.
    """

    def __init__(self, waiting: int, *, is_local: bool) -> None:
        self.waiting, self.is_local = waiting, is_local
        self.began = time.monotonic()
        self.codes: list[int] = []
        """Exit codes of the cells that this process has run."""
        self.longest_seconds = 0.0

    @printing.tolerant()  # a launcher's own process too
    def __call__(self, composed: DictConfig) -> int:
        """Run one cell, unless no time is left for it, and return its exit code."""
        config = compose.checked(composed)
        has_begun = bool(self.codes) or not self.is_local
        if OutOfTime.exit_code in self.codes or (has_begun and not has_time_for(config, self.longest_seconds)):
            code = OutOfTime.exit_code
        else:
            print(f"{self._place(config)}\n", end="", file=sys.stderr)  # in one write, as others write there too
            began = time.monotonic()
            code = run_cell_of_sweep(config)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        self.codes.append(code)
        if code > 128 and self.is_local:
            sys.exit(code)
        return code

    def _place(self, config: Config) -> str:
        """Write which cell begins, how many failed, and the estimated time left."""
        name = folder_name(config) or config.task.name
        if not self.is_local:
            return f"[{HydraConfig.get().job.num + 1}/{self.waiting}] {name}"
        done, elapsed = len(self.codes), time.monotonic() - self.began
        counts = [f"{minutes(elapsed)} done"]
        if failed := sum(map(is_failure, self.codes)):
            counts.append(f"{failed} failed")
        if done:
            counts.append(f"about {minutes(elapsed / done * (self.waiting - done))} left")
        return f"[{done + 1}/{self.waiting}] {name} ({', '.join(counts)})"


def _exit_code(job: JobReturn) -> int:
    """Return a cell's exit code; an exception that left it is printed, and a failure."""
    if job.status == JobStatus.COMPLETED:
        return int(job.return_value)
    return report_error(f"{type(job._return_value).__name__}: {job._return_value}", 1)


def _launcher(hydra: DictConfig, sweep: _Sweep) -> Launcher:
    HydraConfig.instance().set_config(hydra)
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    return Plugins.instance().instantiate_launcher(context, sweep, hydra)


def _summarise(cells: list[Cell], waiting: list[Cell], codes: list[int], seconds: float) -> int:
    """Print how many cells finished, failed or are left, and return the exit code of the sweep."""
    failed = [(cell, code) for cell, code in zip(waiting, codes, strict=True) if is_failure(code)]
    left, busy, diverged = (codes.count(error.exit_code) for error in (OutOfTime, Busy, Diverged))
    parts = [
        f"{codes.count(0) + diverged} done" + (f" ({diverged} diverged)" if diverged else ""),
        f"{len(cells) - len(waiting)} finished before (resume=false does them again)",
        f"{len(failed)} failed",
    ]
    if busy:
        parts[-1] += f", {busy} under way in other processes"
    if left:
        parts[-1] += f", {left} left when budget_minutes={cells[0].config.budget_minutes} were over"
    print(f"{len(cells)} cells: {', '.join(parts)}; {minutes(seconds)}", file=sys.stderr)
    for cell, code in failed:
        report_error(f"failed: {folder_name(cell.config) or cell.config.run}", code)
    return failed[-1][1] if failed else OutOfTime.exit_code if left else 0


def _shares_a_gpu(config: Config) -> bool:
    return config.jobs > 1 and config.task.name == "train" and is_on_cuda(config)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


def minutes(seconds: float) -> str:
    """Write a duration for people."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
