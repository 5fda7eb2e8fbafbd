"""The processes that train one network together: who starts them, and what becomes of the run when one of them fails.

    blpa-run gpu.processes=8 ...       this process starts them, and again after a failure (gpu.restarts)
    torchrun ... -m runners ...        torchrun, or a job of Slurm, started this one: RANK and WORLD_SIZE are set

Process 0 alone reads and writes the files of the run, and prints. runners/training/world.py has what they tell each
other.

    stopped by a signal, out of time, diverged     all agree, and end alike: the command ends as with one process
    anything else                                  the others cannot go on, and are ended; one sentence names the reason
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from runners import fresh
from runners.cells import folder_name
from runners.config import Config, GpuConfig
from runners.errors import Diverged, Interrupted, LostProcess, OutOfTime, Stopped, UserError, classify
from runners.fresh import Ending
from runners.training import signals

AGREED = Interrupted | OutOfTime | Diverged
"""How all processes end alike."""


def launched() -> tuple[int, int] | None:
    """Return this process's rank and the number of processes, where torchrun or the like started several; else None.

    Raises:
        UserError: RANK or WORLD_SIZE is no such number.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None or size == "1":  # a single one has nobody to join
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={size}: a launcher sets WORLD_SIZE=N and RANK from 0 to N - 1")
    return int(rank), int(size)


def number(given: int) -> int:
    """Return how many processes train together: as many as were launched, else as many as gpu.processes gives.

    Raises:
        UserError: another number was given than launched.
    """
    here = launched()
    if here is None:
        return given
    if given not in (1, here[1]):
        raise UserError(
            f"gpu.processes={given}, but WORLD_SIZE={here[1]} processes were launched: leave gpu.processes out"
        )
    return here[1]


def is_silent() -> bool:
    """Return whether process 0 prints what this one would say too."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


@contextmanager
def silence() -> Iterator[None]:
    """Discard what Python prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def run(task: Callable[[Config], object], config: Config) -> None:
    """Run the task of a cell, in gpu.processes processes that begin and end with it.

    Args:
        task: importable by name.
        config: its argument, checked.

    Raises:
        UserError: this machine has fewer GPUs, or as the task.
        Interrupted: as the task; also where a signal came before there was anything to save.
        LostProcess: the processes lost each other, and none has a reason of its own.
        Stopped: the reason of the process that failed first; or as the task, if all ended alike.
    """
    if config.gpu.processes == 1:
        task(config)
        return
    _check_gpus(config)
    restart = 0
    while (reason := _attempt(task, config, restart)) is not None:
        if isinstance(reason, UserError | AGREED):
            raise reason
        if restart == config.gpu.restarts:
            raise type(reason)(f"{reason}{goes_on(config)}") if type(reason) in (Stopped, LostProcess) else reason
        restart += 1
        print(f"{reason}; all begin again (restart {restart} of {config.gpu.restarts})", file=sys.stderr)


def goes_on(config: Config) -> str:
    """Return what to do after a failure, as the end of a sentence; empty where there is no checkpoint."""
    from runners.training.checkpoints import checkpoints

    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    found = checkpoints(run_dir) if run_dir.is_dir() else []
    return f"; started again, the run goes on from {found[-1]}" if found else ""


def of_attempt(config: Config, restart: int) -> Config:
    """Return the configuration of a restart: it goes on, also where the run began anew by resume=false."""
    return replace(config, resume=True) if restart else config


def _check_gpus(config: Config) -> None:
    """Check that each process has a GPU, without making a CUDA context; on a CPU there may be any number."""
    import torch

    count = torch.cuda.device_count()
    if config.gpu.device != "cpu" and 0 < count < config.gpu.processes:
        raise UserError(
            f"gpu.processes={config.gpu.processes}: this machine has {count} GPU{'s' if count > 1 else ''}; on several "
            "machines torchrun or Slurm start the processes (runners/README.md)"
        )


def _attempt(task: Callable[[Config], object], config: Config, restart: int) -> Exception | None:
    """Start all processes once, and return why the task did not come to its end; None if it did."""
    size = config.gpu.processes
    store = importlib.import_module("torch.distributed").TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    common = {  # what torchrun sets
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # this process has the store, and not process 0
        "TORCHELASTIC_RESTART_COUNT": restart,
    }
    environments = [
        {name: str(value) for name, value in common.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(size)
    ]
    endings, received = fresh.call_together(
        _member, [(task, of_attempt(config, restart), one) for one in environments], is_failure=_is_failure
    )
    reason = _reason(endings, config.gpu)
    if received and (reason is None or any(map(_is_failure, endings))):  # it came when there was nothing to save
        signal.raise_signal(received[0])
        return Interrupted(f"stopped by {signal.Signals(received[0]).name}", received[0])
    for traceback_text in getattr(reason, "__notes__", ()):
        print(traceback_text, file=sys.stderr)
    return reason


def _member(task: Callable[[Config], object], config: Config, environment: dict[str, str]) -> None:
    """Run the task in one of the processes; it sends its exception, a bug's traceback with it."""
    os.environ.update(environment)
    import torch

    from runners.training import world

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.gpu.processes))
    try:
        with silence() if is_silent() else nullcontext(), world.joined(config.gpu):
            task(config)
    except (UserError, Stopped):
        raise
    except Exception as error:
        exit_code, reason = classify(error)
        stopped = Stopped(f"process {environment['RANK']} of {config.gpu.processes}: {reason}")
        if exit_code is None:
            stopped.add_note(traceback.format_exc())
        raise stopped from None


def _is_failure(ending: Ending) -> bool:
    """Return whether a process ended other than all would."""
    return not ending.has_answered or not isinstance(ending.error, AGREED | None)


def _reason(endings: list[Ending], gpu: GpuConfig) -> Exception | None:
    """Return why the processes ended: the first reason that is one's own, and not the end of another one."""
    failed = [ending for ending in endings if _is_failure(ending)]
    if not failed:
        return next(ending.error for ending in endings if ending.number == 0)
    for ending in failed:
        if ending.has_answered and not isinstance(ending.error, LostProcess):
            return ending.error
        if not ending.has_answered and not ending.was_killed:
            return _death(f"process {ending.number} of {gpu.processes}", ending.exit_code or 0)
    for ending in failed:
        if not ending.has_answered:
            return LostProcess(
                f"process {ending.number} of {gpu.processes} did not answer the others for "
                f"gpu.timeout_minutes={gpu.timeout_minutes:g}"
            )
    return failed[0].error


def _death(process: str, exit_code: int) -> Stopped:
    """Return what to say of a process that died without an answer."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in signals.NUMBERS:  # somebody wants it to end
        return Interrupted(f"{process} was stopped by {signal.Signals(number).name}", number)
    if exit_code == -signal.SIGKILL:
        return Stopped(f"{process} was killed by SIGKILL, perhaps for want of memory")
    if exit_code < 0:
        return Stopped(f"{process} was killed by {signal.Signals(number).name}")
    return Stopped(f"{process} ended without an answer, by exit code {exit_code}")
