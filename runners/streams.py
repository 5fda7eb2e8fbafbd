"""A sweep of training runs side by side on one GPU, each on a CUDA stream of its own: jobs=2.

Processes take turns on a GPU, and a small run leaves most of it idle. Several streams of one process can use it better:
on an H100 six cells of depth 164 in bf16 took 9.0 ms per step and cell, three took 10.3; one alone has not been timed.
The runs take turns at launching a step, and the device executes the steps of all of them.

With gpu.deterministic=true a run ends with the same bits as alone. With false cuDNN picks its convolutions by timing
them, and work on other streams can change its choice.

A run that fails can make CUDA unusable for the other runs of its process, or can fail only because they use the memory.
So the first failure stops them all and is not recorded:

    one run of several fails -> the others continue side by side, in a new process
                                the failed run continues last, in its own process, where a failure is recorded
    the process dies         -> all runs continue one by one, each in its own process
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runners import fresh
from runners.cells import folder_name
from runners.config import Config
from runners.errors import OutOfTime
from runners.run import cell_in_turns, has_time_for, is_failure, is_on_cuda, run_cell_of_sweep
from runners.training import signals
from runners.training.turns import Turns

if TYPE_CHECKING:
    import torch


def run(configs: list[Config], waiting: list[int]) -> dict[int, int]:
    """Train cells of a sweep, at most `jobs` at a time.

    Args:
        configs: the cells of the sweep, checked. All running cells write checkpoints before `budget_minutes` are over.
        waiting: numbers of the unfinished cells to train on a GPU. Locked cells are skipped.

    Returns:
        Exit codes of the cells that were started, by number.

    Raises:
        SystemExit: a signal stopped them.
    """
    codes: dict[int, int] = {}
    to_run_alone: list[int] = []
    has_begun = False
    while len(waiting) > 1 and (not has_begun or has_time_for(configs[waiting[0]], 0)):
        has_begun = True
        with signals.deferred() as stop:  # fresh.call passes them on
            try:
                ended, failed = fresh.call(train, configs, waiting)
            except RuntimeError as error:  # the process died, or CUDA failed outside of a run
                if stop.received is None:
                    print(f"{error}; its runs go on one by one", file=sys.stderr)
                ended, failed = {}, None
        codes |= ended
        if stop.received is not None:
            sys.exit(128 + stop.received)
        waiting = [number for number in waiting if number not in codes and number != failed]
        if failed is None:
            break
        to_run_alone.append(failed)
    for number in [*waiting, *to_run_alone]:
        if OutOfTime.exit_code in codes.values() or (has_begun and not has_time_for(configs[number], 0)):
            break
        has_begun = True
        print(f"[{number + 1}/{len(configs)}] {folder_name(configs[number])} (by itself)", file=sys.stderr)
        codes[number] = run_cell_of_sweep(configs[number])
        if codes[number] > 128:
            sys.exit(codes[number])
    return codes


@dataclass(frozen=True)
class _Run:
    """A cell that is being trained."""

    number: int
    turns: Turns[int | None]
    stream: "torch.cuda.Stream | None"


def train(configs: list[Config], waiting: list[int]) -> tuple[dict[int, int], int | None]:
    """Train cells side by side in this process, until all have ended, one fails, a signal arrives or the budget ends.

    Args:
        configs: the cells of the whole sweep.
        waiting: numbers of the cells to train, the most valuable first.

    Returns:
        Exit codes of the cells that ended, by number; and the number of the first cell that failed. Cells that stopped
        because of it have no exit code.
    """
    import torch

    from runners.training.stopping import Stopping

    first = configs[waiting[0]]
    on_cuda = is_on_cuda(first)
    # One stream per place, reused by its cells: PyTorch has only 32 streams and repeats them.
    free = [torch.cuda.Stream() if on_cuda else None for _ in range(first.jobs)]
    waiting, running = list(waiting), list[_Run]()
    codes: dict[int, int] = {}
    failed: int | None = None
    printed: set[str] = set()
    with signals.deferred() as stop:
        stopping = Stopping(stop, first.budget_minutes)
        while True:
            while free and not stopping.is_due():
                number = _next(configs, waiting, [configs[run.number] for run in running], printed)
                if number is None or ((codes or running) and not has_time_for(configs[number], 0)):
                    break
                waiting.remove(number)
                counts = f"{len(codes)} ended, {sum(map(is_failure, codes.values()))} failed"
                print(f"[{number + 1}/{len(configs)}] {folder_name(configs[number])} ({counts})", file=sys.stderr)
                turns = cell_in_turns(configs[number], records_failure=True, stopping=stopping)
                running.append(_Run(number, turns, free.pop()))
            if not running:
                return codes, failed
            for run in list(running):
                # A turn launches all its work, captures included, before it ends: no other cell launches in between.
                with torch.cuda.stream(run.stream):
                    try:
                        next(run.turns)
                    except StopIteration as end:
                        running.remove(run)
                        free.append(run.stream)
                        if end.value is not None:
                            codes[run.number] = end.value
                        elif failed is None:
                            failed = run.number
                        if run.stream and failed is None:
                            run.stream.synchronize()  # reason_to_wait assumes that its steps have ended


def _next(configs: list[Config], waiting: list[int], running: list[Config], printed: set[str]) -> int | None:
    """Return the first waiting cell that may run beside those running; print why earlier ones may not, once each."""
    for number in waiting:
        reasons = {reason for other in running if (reason := reason_to_wait(configs[number], other))}
        if not reasons:
            return number
        for reason in reasons - printed:
            print(f"{folder_name(configs[number])} waits: {reason}", file=sys.stderr)
        printed |= reasons
    return None


def reason_to_wait(config: Config, other: Config) -> str:
    """Return why a cell may not run beside another; empty where it may."""
    gpu, others = config.gpu, other.gpu
    if (gpu.precision, gpu.deterministic) != (others.precision, others.deterministic):
        return "precision and determinism are settings of the whole process, and another cell has others"
    if _waits_for_its_blocks(config) and _waits_for_its_blocks(other):
        return "two cells with cuDNN's batch norm cannot share the GPU"
    if _compiles(config) and _compiles(other):
        return "it would discard what another cell has compiled"
    return ""


def _waits_for_its_blocks(config: Config) -> bool:
    """Return whether a cell's batch norm is cuDNN's persistent kernel, whose blocks wait for each other.

    Two such kernels could deadlock: each occupies multiprocessors that the other's last blocks need. Kernels without
    such waits may run beside one. In bf16 PyTorch uses its own kernel.
    """
    return config.mode.layers != "coded" and config.gpu.precision != "bf16"


def _compiles(config: Config) -> bool:
    """Return whether a cell uses torch.compile; a cell of compiled layers drops everything compiled before it."""
    return config.mode.layers == "compiled" or config.gpu.kernels == "inductor"
