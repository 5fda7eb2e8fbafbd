"""The processes that train one network together: who starts them, and what becomes of the run when one of them fails.

    blpa-run gpu.processes=8 ...       torch elastic starts them, and again after a failure (gpu.restarts)
    torchrun ... -m runners ...        torchrun, or a job of Slurm, started this one: RANK and WORLD_SIZE are set

Process 0 alone reads and writes the files of the run, and prints. runners/training/world.py has what they tell each
other.

    stopped by a signal, out of time, diverged     all agree, and end alike: the command ends as with one process
    anything else                                  the others cannot go on, and are ended; one sentence names the reason
"""

import functools
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runners import fresh, printing
from runners.cells import folder_name
from runners.config import Config
from runners.errors import (
    CannotWrite,
    Diverged,
    Interrupted,
    LostProcess,
    OutOfTime,
    Stopped,
    Terminated,
    UserError,
    classify,
    first_line,
)
from runners.process_notes import Notes
from runners.training import budget, signals

Task = Callable[[Config], Any]

AGREED = (Interrupted, OutOfTime, Diverged)
"""How all processes end alike."""

FINAL = (UserError, CannotWrite, Interrupted)
"""Reasons of a failure that another start would not mend."""

SEEN_SECONDS = 0.5
"""Time that a process which lost another one leaves torch elastic to see that one's end first, and its exit code."""


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
    is_joined = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} <= os.environ.keys()  # and not in a shell with leftovers
    return is_joined and os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


@contextmanager
def silence() -> Iterator[None]:
    """Discard what Python prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def run(task: Task, config: Config) -> list[Any]:
    """Run the task of a cell, in gpu.processes processes that begin and end with it.

    Args:
        task: importable by name.
        config: its argument, checked.

    Returns:
        What the task returned in each process, by rank.

    Raises:
        UserError: this machine has fewer GPUs, or as the task.
        Interrupted: as the task; also where a signal came before there was anything to save.
        LostProcess: the processes lost each other, and none has a reason of its own.
        Stopped: the reason of the process that failed first; or as the task, if all ended alike.
    """
    if config.gpu.processes == 1:
        return [task(config)]
    _check_gpus(config)
    with TemporaryDirectory(prefix="blpa-run-") as folder:
        returned, error = _launched(task, config, Notes(Path(folder)))
    for text in getattr(error, "__notes__", ()):  # a bug's traceback
        print(text, file=sys.stderr)
    if type(error) is Stopped or isinstance(error, LostProcess):
        error = type(error)(f"{error}{goes_on(config)}")
    if error is not None:
        raise error
    return returned


def goes_on(config: Config) -> str:
    """Return what is left after a failure, as the end of a sentence; empty for tasks without checkpoints."""
    from runners.training.checkpoints import checkpoints

    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    found = checkpoints(run_dir) if run_dir.is_dir() else []
    if config.task.name != "train":
        return ""
    return f"; started again, the run goes on from {found[-1]}" if found else "; there is no checkpoint yet"


def _check_gpus(config: Config) -> None:
    """Check that each process has a GPU, without making a CUDA context; on a CPU there may be any number."""
    import torch

    count = torch.cuda.device_count()
    if config.gpu.device != "cpu" and 0 < count < config.gpu.processes:
        raise UserError(
            f"gpu.processes={config.gpu.processes}: this machine has {count} GPU{'s' if count > 1 else ''}; on several "
            "machines torchrun or Slurm start the processes (runners/README.md)"
        )


def _launched(task: Task, config: Config, notes: Notes) -> tuple[list[Any], Exception | None]:
    """Have torch elastic start the processes, and again after a failure.

    Returns:
        What the task returned in each process; and why it did not end well, if so.
    """
    api = importlib.import_module("torch.distributed.launcher.api")
    elastic = importlib.import_module("torch.distributed.elastic.multiprocessing")
    fresh.server()  # from which processes begin at once
    settings = api.LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=config.gpu.processes, start_method="forkserver",
        max_restarts=config.gpu.restarts, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1", logs_specs=elastic.DefaultLogsSpecs(log_dir=str(notes.folder / "logs")),
    )  # fmt: skip
    ended: dict[int, tuple[Any, Exception | None]] = {}
    failed: list[Exception] = []

    def launch() -> None:
        try:
            ended.update(api.elastic_launch(settings, _member)(task, config, notes, budget.BEGAN))
        except elastic.errors.ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            failed.append(_reason(config, notes, config.gpu.restarts, exit_codes))
        except Exception as error:
            failed.append(Stopped(f"torch elastic could not start the processes: {first_line(error)}"))

    # Outside of the main thread torch elastic handles no signals.
    thread = threading.Thread(target=launch)
    with _quiet(), signals.passed_on(notes.send) as received:
        thread.start()
        thread.join()
    error = failed[0] if failed else ended[0][1]
    is_of_beginning = bool(failed) and isinstance(error, LostProcess | Interrupted)
    if received and (error is None or is_of_beginning):  # there was nothing to stop yet
        error = Interrupted(f"stopped by {signal.Signals(received[0]).name}", received[0])
    return [returned for _, (returned, _) in sorted(ended.items())], error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch elastic from reporting a failure, of which one sentence is made."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _member(task: Task, config: Config, notes: Notes, began: float) -> tuple[Any, Exception | None]:
    """Run the task in one of the processes.

    Returns:
        What it returned, and the exception that all end with alike; any other one is noted.
    """
    rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    budget.BEGAN = began
    is_running = threading.Lock()
    is_running.acquire()
    signals.end_with_the_parent(functools.partial(_end_after, is_running))
    import torch
    from tqdm import tqdm

    from runners.training import world

    tqdm.set_lock(threading.RLock())  # its usual one is for several processes, and a killed one would leave it behind
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.gpu.processes))
    try:
        with printing.tolerant(), signals.raised(), silence() if is_silent() else nullcontext():
            signals.unblock()
            if number := notes.begin():
                raise Terminated(number)
            if restart:  # torch elastic starts all again, whatever the reason
                reason = _reason(config, notes, restart - 1, {})
                if isinstance(reason, FINAL):
                    return None, reason
                print(f"{reason}; all begin again (restart {restart} of {config.gpu.restarts})", file=sys.stderr)
            with world.joined(config.gpu):
                return task(config), None
    except AGREED as error:
        return None, error
    except UserError as error:
        if error.is_shared:
            return None, error
        notes.fail(rank, restart, error)
    except LostProcess as error:
        notes.fail(rank, restart, error)
        time.sleep(SEEN_SECONDS)
    except Stopped as error:
        notes.fail(rank, restart, error)
    except Terminated as end:
        notes.fail(rank, restart, Interrupted(f"rank {rank} of {config.gpu.processes} was {end}", end.exit_code - 128))
    except Exception as error:
        exit_code, text = classify(error)
        stopped = Stopped(f"rank {rank} of {config.gpu.processes}: {text.removesuffix(': ')}")
        if exit_code is None:
            stopped.add_note(traceback.format_exc())
        notes.fail(rank, restart, stopped)
    finally:
        is_running.release()
    sys.exit(1)


def _end_after(is_running: threading.Lock) -> None:
    """End the process when its task has ended: without its parent, torch elastic would have it wait for ever."""
    with is_running:
        os._exit(1)


def _reason(config: Config, notes: Notes, restart: int, exit_codes: dict[int, int]) -> Exception:
    """Return why processes failed: a reason of one's own, rather than the end of another one.

    Args:
        config: the run.
        notes: of the processes.
        restart: number of the start that failed.
        exit_codes: what torch elastic knows of them, by rank.
    """
    failures = notes.failures(restart)
    own = [error for error in failures.values() if not isinstance(error, LostProcess | Interrupted)]
    if own:
        return own[0]
    size, minutes = config.gpu.processes, f"{config.gpu.timeout_minutes:g}"
    waited = [error for error in failures.values() if isinstance(error, LostProcess) and error.has_waited]
    for rank in sorted(set(range(size)) - failures.keys(), key=lambda rank: (rank not in exit_codes, rank)):
        process, exit_code = f"rank {rank} of {size}", exit_codes.get(rank, 0)
        if exit_code == -signal.SIGABRT:  # so NCCL ends a process that waits too long
            why = f"an error of PyTorch's own, or no answer of another one for gpu.timeout_minutes={minutes}"
            return Stopped(f"{process} was ended by SIGABRT: {why}")
        if exit_code < 0:
            return Stopped(f"{process} was killed by {signal.Signals(-exit_code).name}{_perhaps(-exit_code)}")
        if waited:
            return LostProcess(f"{process} did not answer the others for gpu.timeout_minutes={minutes}")
        return Stopped(f"{process} ended without a word{_perhaps(signal.SIGKILL)}")
    interrupted = [error for error in failures.values() if isinstance(error, Interrupted)]
    return interrupted[0] if interrupted else failures[0]


def _perhaps(number: int) -> str:
    return ", perhaps for want of memory" if number == signal.SIGKILL else ""
