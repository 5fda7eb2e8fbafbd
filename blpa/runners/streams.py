"""A sweep of training runs side by side on one GPU, each on a CUDA stream of its own: jobs=2.

Processes take turns on a GPU, and one small run leaves most of it idle; the streams of one process share it. Its runs
take turns at each being given the launches of a step, and the device is at the steps of all of them. The bits of each
are those that it has alone.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blpa import signals
from blpa.cells import folder_name
from blpa.config import Config
from blpa.errors import Stopped
from blpa.runners import fresh, sweep
from blpa.turns import Turns

if TYPE_CHECKING:
    import torch


def run(configs: list[Config], waiting: list[int]) -> list[int]:
    """Train cells of a sweep that are not finished yet and that nobody else is at, so many at a time as jobs says.

    A cell that fails leaves a record, and those beside it go on; those not begun then begin in a process of their own.

    Args:
        configs: of the whole sweep, checked. Before `budget_minutes` are over all cells under way write checkpoints.
        waiting: numbers of those to be trained, all on a GPU.

    Returns:
        The exit codes of those that were begun; after a signal its own is the last.

    Raises:
        Stopped: the process died, and nobody knows of which cell.
    """
    codes: dict[int, int] = {}
    is_spoilt = True
    while is_spoilt:
        with signals.noted() as stop:  # fresh.call hands them on
            try:
                ended, is_spoilt = fresh.call(train, configs, waiting)
                codes |= ended
            except Stopped:
                if stop.received is None:
                    raise
        if stop.received is not None:
            return [*codes.values(), 128 + stop.received]
        waiting = [number for number in waiting if number not in codes]
        if not waiting or not sweep.has_time_for(configs[waiting[0]], 0):
            break
    return list(codes.values())


@dataclass(frozen=True)
class _Run:
    """A cell under way."""

    number: int
    turns: Turns[tuple[int, bool]]
    stream: "torch.cuda.Stream | None"


def train(configs: list[Config], waiting: list[int]) -> tuple[dict[int, int], bool]:
    """Train cells side by side in this process.

    Args:
        configs: of the whole sweep.
        waiting: numbers of those to be trained, in the order of their value.

    Returns:
        The exit codes of those that were begun, by number; and whether one failed so that no more were begun, since a
        broken capture or kernel spoils what comes after it in its process.
    """
    import torch

    from blpa.training import Stopping

    first = configs[waiting[0]]
    on_cuda = sweep.is_on_cuda(first)
    # One for each place, for as long as there are cells: PyTorch has 32 in all, which it hands out again and again.
    free = [torch.cuda.Stream() if on_cuda else None for _ in range(first.jobs)]
    waiting, running = list(waiting), list[_Run]()
    codes: dict[int, int] = {}
    is_spoilt = False
    told: set[str] = set()
    with signals.noted() as stop:
        stopping = Stopping(stop, first.budget_minutes)
        while True:
            while free and not (is_spoilt or stopping.is_out_of_time or stop.received):
                number = _next(configs, waiting, [configs[run.number] for run in running], told)
                if number is None or ((codes or running) and not sweep.has_time_for(configs[number], 0)):
                    break
                waiting.remove(number)
                told_of = f"{len(codes)} ended, {sum(map(sweep.is_failure, codes.values()))} failed"
                print(f"[{number + 1}/{len(configs)}] {folder_name(configs[number])} ({told_of})", file=sys.stderr)
                turns = sweep.cell_in_turns(configs[number], records_failure=True, stopping=stopping)
                running.append(_Run(number, turns, free.pop()))
            if not running:
                return codes, is_spoilt
            for run in list(running):
                # All that a turn launches, a capture too, ends within it: no other cell launches anything meanwhile.
                with torch.cuda.stream(run.stream):
                    try:
                        next(run.turns)
                    except StopIteration as end:
                        codes[run.number], has_spoilt = end.value
                        is_spoilt = is_spoilt or has_spoilt
                        running.remove(run)
                        free.append(run.stream)
                        if run.stream and not is_spoilt:
                            run.stream.synchronize()  # reason_to_wait takes its steps to have ended with it


def _next(configs: list[Config], waiting: list[int], running: list[Config], told: set[str]) -> int | None:
    """The first that may run beside those under way; why one before it may not is said, once a reason."""
    for number in waiting:
        reasons = {reason for other in running if (reason := reason_to_wait(configs[number], other))}
        if not reasons:
            return number
        for reason in reasons - told:
            print(f"{folder_name(configs[number])} waits: {reason}", file=sys.stderr)
        told |= reasons
    return None


def reason_to_wait(config: Config, other: Config) -> str:
    """Why a cell may not run beside another; empty where it may."""
    gpu, others = config.gpu, other.gpu
    if (gpu.precision, gpu.deterministic) != (others.precision, others.deterministic):
        return "precision and determinism are those of the whole process, and another cell has others"
    if _waits_for_its_blocks(config) and _waits_for_its_blocks(other):
        return "cuDNN's batch norm must have the GPU's cores beside no other such"
    if _compiles(config) and _compiles(other):
        return "it would forget what another cell has compiled"
    return ""


def _waits_for_its_blocks(config: Config) -> bool:
    """Whether its batch norm is cuDNN's persistent kernel, whose blocks wait for each other.

    Of two at once each could hold cores that the other's last blocks need, and both would wait forever; what waits for
    nothing may run beside one. In bf16 PyTorch takes a kernel of its own.
    """
    return config.mode.layers != "coded" and config.gpu.precision != "bf16"


def _compiles(config: Config) -> bool:
    """Whether torch.compile is used: what it has made is forgotten when a cell of compiled layers begins."""
    return config.mode.layers == "compiled" or config.gpu.kernels == "inductor"
