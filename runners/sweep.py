"""Run the cells of a sweep by one of Hydra's launchers: in this process, in several, or on a cluster.

    blpa-run experiment=table1 -m hydra/launcher=joblib hydra.launcher.n_jobs=4
    blpa-run experiment=table1 -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu

A job of submitit with several tasks trains one cell in as many processes.

The launcher gets the unfinished cells, composes each again and calls a `_Sweep` with it. If a cell fails, the failure
is recorded and the next cell runs. Several commands may work on the same sweep: each skips the cells that another one
has locked.
"""

import importlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.callbacks import Callbacks  # HydraContext needs one, and only hydra.main makes it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from runners import compose, printing, workers
from runners.cells import folder_name
from runners.compose import Cell
from runners.config import Config
from runners.errors import Busy, Diverged, OutOfTime, Terminated, UserError
from runners.run import has_time_for, is_failure, is_finished, is_on_cuda, report_error, run_cell_of_sweep
from runners.training import signals


def run_all(cells: list[Cell]) -> int:
    """Run the cells that are not finished.

    With Hydra's basic launcher they run one after the other, but consecutive training runs on a GPU run side by side,
    at most `jobs` at a time.

    Args:
        cells: the cells of one sweep, checked. At the end of `budget_minutes` a training run stops with a checkpoint;
            no cell starts that may not finish in time.

    Returns:
        The exit code of the last cell that failed, else that of OutOfTime if cells are left, else 0.

    Raises:
        UserError: jobs would have another number of tasks than their cells have processes.
    """
    hydra = compose.composed(cells[0].overrides, return_hydra_config=True)
    _check_tasks(cells, hydra.hydra.launcher)
    waiting = [cell for cell in cells if not _is_finished(cell.config)]
    sweep = _Sweep(waiting=len(waiting), launcher=hydra.hydra.runtime.choices["hydra/launcher"])
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", file=sys.stderr)
    codes: list[int] = []
    try:
        launcher = _launcher(hydra, sweep)
        for beside, group in itertools.groupby(waiting, lambda cell: sweep.is_local and _shares_a_gpu(cell.config)):
            some = list(group)
            if beside and len(some) > 1:
                streams = importlib.import_module("runners.streams")
                ended: dict[int, int] = streams.run([cell.config for cell in some], list(range(len(some))))
                codes += [ended.get(number, OutOfTime.exit_code) for number in range(len(some))]
                sweep.codes = codes[:]
            else:
                with sweep.signals_passed_on():
                    returned = launcher.launch([cell.overrides for cell in some], initial_job_idx=len(codes))
                codes += map(_exit_code, returned)
    except SystemExit as end:  # the cell under way stopped at a signal
        return end.code if isinstance(end.code, int) else 1
    except (HydraException, RuntimeError, ValueError) as error:  # there is no Slurm, or a job was killed
        return report_error(error, 1)
    return _summarise(cells, waiting, codes, time.monotonic() - sweep.began)


class _Sweep:
    """The function that a launcher calls with each composed cell; a launcher's own process gets a copy.

    Args:
        waiting: number of unfinished cells.
        launcher: Hydra's name of the launcher.
    """

    def __init__(self, waiting: int, *, launcher: str) -> None:
        self.waiting, self.launcher = waiting, launcher
        self.is_local = launcher == "basic"
        """Whether all cells run in this process."""
        self.began = time.monotonic()
        self.codes: list[int] = []
        """Exit codes of the cells that this process has run."""
        self.longest_seconds = 0.0

    @printing.tolerant()  # a launcher's own process too
    def __call__(self, composed: DictConfig) -> int:
        """Run one cell, unless no time is left for it, and return its exit code; a signal ends the sweep or the job."""
        if self.launcher.startswith("submitit"):
            _join_the_job()
        if self.launcher == "joblib" and workers.is_worker():
            return workers.run(lambda: self._run(composed))
        code = self._run(composed)
        if code > 128 and self.launcher.startswith("submitit"):
            signal.raise_signal(code - 128)  # submitit's own handler: it may put the job into the queue again
        elif code > 128:
            sys.exit(code)
        return code

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """Pass signals on to joblib's workers; after their end, raise Terminated."""
        if self.launcher != "joblib":
            yield
            return
        with signals.passed_on(workers.pass_on) as received:
            try:
                yield
            finally:  # also where a worker had only begun, and did not survive the signal
                if received:
                    raise Terminated(received[0])

    def _run(self, composed: DictConfig) -> int:
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


def _check_tasks(cells: list[Cell], launcher: DictConfig) -> None:
    """Check that a job has as many tasks as its cell has processes, unless one task starts them all."""
    nodes, tasks_per_node = launcher.get("nodes", 1), launcher.get("tasks_per_node", 1)
    tasks = nodes * tasks_per_node
    for cell in cells:
        if tasks > 1 and cell.config.gpu.processes != tasks:
            raise UserError(
                f"gpu.processes={cell.config.gpu.processes}: hydra.launcher.nodes={nodes} with hydra.launcher."
                f"tasks_per_node={tasks_per_node} starts {tasks} processes for each cell: give gpu.processes={tasks}"
            )


def _join_the_job() -> None:
    """Set RANK, WORLD_SIZE and the like in each task of a job that has several."""
    submitit = importlib.import_module("submitit")
    if submitit.JobEnvironment().num_tasks > 1:
        # CUDA_VISIBLE_DEVICES stays as Slurm sets it. What is set already is of the command that submitted the job.
        environment = importlib.import_module("submitit.helpers").TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        del os.environ["LOCAL_WORLD_SIZE"]  # Slurm has divided the cores among the tasks already


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


def _is_finished(config: Config) -> bool:
    """Return whether a cell is finished; one whose records cannot be read is refused when it is its turn."""
    try:
        return is_finished(config)
    except UserError:
        return False


def _shares_a_gpu(config: Config) -> bool:
    return config.jobs > 1 and config.task.name == "train" and is_on_cuda(config)


def minutes(seconds: float) -> str:
    """Write a duration for people."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
