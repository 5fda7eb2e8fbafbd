"""Sweeps by Hydra's own launchers, whose plugins are the extra `launchers`: joblib for one machine, submitit for Slurm.

    blpa-run experiment=table1 -m hydra/launcher=joblib hydra.launcher.n_jobs=4
    blpa-run experiment=table1 -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu

Cells are checked, and the finished ones left out, before the launcher is given the rest. It composes each again in a
process or a job of its own; what it writes itself is under results/launched.
"""

import signal
import sys
from types import FrameType

from hydra._internal.callbacks import Callbacks  # HydraContext asks for one, and only hydra.main makes it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig

from runners import compose, sweep
from runners.compose import Cell
from runners.errors import Busy, OutOfTime


def is_asked_for(cells: list[Cell]) -> bool:
    """Whether the command line names a launcher."""
    return any(compose.is_launchers(override.partition("=")[0]) for override in cells[0].overrides)


def run_all(cells: list[Cell]) -> int:
    """Hand the cells that are not finished to the launcher that they name, and wait for them.

    Args:
        cells: of one sweep.

    Returns:
        The exit code: that of the last cell that failed, or else OutOfTime's where cells are left.

    Raises:
        UserError: the launcher has no such option.
    """
    composed = compose.composed(cells[0].overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    waiting = [cell.overrides for cell in cells if not sweep.is_finished(cell.config)]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", file=sys.stderr)
    if not waiting:
        return 0
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    before = signal.signal(signal.SIGTERM, _terminated)  # else joblib's workers would outlive this process
    try:
        launcher = Plugins.instance().instantiate_launcher(context, run_cell, composed)
        returned = launcher.launch(waiting, initial_job_idx=0)
    except KeyboardInterrupt as error:
        return sweep.refuse(str(error) or "interrupted", 143 if str(error) else 130)
    except (HydraException, RuntimeError, ValueError) as error:  # no Slurm here, or a job that was killed
        return sweep.refuse(error, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    exit_codes = [job.return_value for job in returned]
    left, busy = exit_codes.count(OutOfTime.exit_code), exit_codes.count(Busy.exit_code)
    failed = [(cell, code) for cell, code in zip(waiting, exit_codes, strict=True) if sweep.is_failure(code)]
    done = len(exit_codes) - left - busy - len(failed)
    told = f", {busy} under way in other processes" if busy else ""
    told += f", {left} left when budget_minutes were over" if left else ""
    print(f"{len(cells)} cells: {done} done, {len(failed)} failed{told}", file=sys.stderr)
    for overrides, exit_code in failed:
        sweep.refuse(f"failed: {' '.join(overrides)}", exit_code)
    return failed[-1][1] if failed else OutOfTime.exit_code if left else 0


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


def run_cell(composed: DictConfig) -> int:
    """Run one cell in a launcher's process, unless it has no time left, and return the exit code."""
    config = compose.checked(composed)
    if not sweep.has_time_for(config, 0):
        return OutOfTime.exit_code
    print(f"{config.run}\n", end="", file=sys.stderr)  # in one piece, for others write there too
    return sweep.run_cell_of_sweep(config)
