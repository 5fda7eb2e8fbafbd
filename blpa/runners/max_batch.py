"""The largest batch whose training steps fit a card's memory: predicted on any machine, measured where there is a GPU.

    weights + optimiser + images + peak of a step <= budget - allowance

Predicted: the left side is counted on the meta device (blpa.memory). Measured: whole training steps run in a fresh
process whose allocator may take the right side and no more, so that a large card tells what fits a smaller one. The
prediction is where the search begins, and a handful of processes is enough. The allowance stands for what neither
sees: the CUDA context, and in the prediction the workspace of convolutions and blocks that are rounded up.
"""

import math
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from blpa import kernels, memory, records, steps
from blpa.config import Config
from blpa.errors import Stopped
from blpa.memory import GIB, MIB, TrainingBytes
from blpa.records import Record
from blpa.runners import paper, setup
from blpa.runners.failures import is_out_of_memory
from blpa.runners.setup import META
from blpa.steps import EAGER_STEPS

STEPS = EAGER_STEPS + 2
"""Training steps of a probe: those before a CUDA graph is recorded, the one that records it, and one more."""
STRIDE = 1 / 40
"""First stride of the search, as a part of the batch; each further one is twice as long."""
VERIFYING_STEPS = 20
"""Training steps that the answer must stand."""


def run(config: Config) -> list[Record]:
    """Find the largest batch for the configured network and budget, print it and record it.

    Args:
        config: one run, checked; dataset.batch_size does not matter.

    Returns:
        The predicted batch, and the measured one where there is a GPU with that much memory; 0 where not even one
        sample fits.

    Raises:
        UserError: no budget is given and there is no GPU whose memory it could be, or the results folder cannot be
            written.
        CardIsTaken: others hold so much of the GPU's memory that the budget cannot be reached.
    """
    run_dir = setup.run_folder(config)
    device = setup.device(config.gpu)
    chosen = kernels.choose(config.gpu.kernels, device)
    is_cuda = device.type == "cuda"
    free, card = _in_a_fresh_process(torch.cuda.mem_get_info) if is_cuda else (0, 0)
    cell = setup.on_card(config, card)
    assert cell.gpu.memory_gib is not None
    limit = int(cell.gpu.memory_gib * GIB) - config.gpu.allowance_mib * MIB

    predicted = _predict(cell, limit)
    print(describe(cell, predicted, limit, setup.training_bytes(cell, max(predicted, 1))))
    used = kernels.choose(config.gpu.kernels, META).name
    found = [_record(cell, predicted, predicted, setup.source(config, META, used))]
    if is_cuda and limit > card:
        print(f"not measured: this card has {card / GIB:.4g} GiB", file=sys.stderr)
    elif is_cuda:
        _refuse_taken(free, limit, cell)
        fits, fails = search(_probe_on(cell, limit), predicted, config.task.resolution) if limit > 0 else (0, 1)
        print(f"{_network(cell)}: largest batch {fits} in {cell.gpu.memory_gib:g} GiB (measured); {fails} does not fit")
        found.append(_record(cell, fits, fails - 1, setup.source(config, device, chosen.name)))
    records.write(found, run_dir)
    return found


def _record(config: Config, fits: int, high: int, source: dict[str, object]) -> Record:
    """The answer; where it is measured, it may be up to `high`."""
    return setup.record(
        config, source, metric="largest_batch", unit="samples", value=fits, low=fits, high=high, n=1, iterations=0,
        predicted=source["device"] == "none", batch_size=0, seed=0, paper_value=paper.largest_batch(config),
    )  # fmt: skip


def _predict(config: Config, limit: int) -> int:
    with tqdm(desc="counting a training step", unit=" counts") as progress:

        def total_bytes(batch: int) -> int:
            progress.set_postfix_str(f"batch {batch}")
            total = setup.training_bytes(config, batch).total_bytes
            progress.update()
            return total

        return memory.largest_batch(total_bytes, limit)


def search(probe: Callable[[int, int], bool], predicted: int, resolution: float = 0.01) -> tuple[int, int]:
    """Find the largest batch that fits, beginning at the prediction, and see that it stands and that 5 % more fail.

    Args:
        probe: (batch, steps) -> whether so many training steps fit.
        predicted: where to begin.
        resolution: how near, as a part of the answer, the smallest batch seen to fail must be; or they are neighbours.

    Returns:
        The largest batch seen to fit, over VERIFYING_STEPS, or 0; and the smallest seen not to.
    """
    fits, fails = 0, sys.maxsize
    guess = max(1, predicted)
    stride = max(1, int(guess * max(STRIDE, resolution)))
    while True:
        while fails - fits > max(1, int(fits * resolution)):
            if probe(guess, STEPS):
                fits = guess
            else:
                fails = guess
            if fails == sys.maxsize:
                guess, stride = fits + stride, 2 * stride
            elif not fits:
                guess, stride = max(1, fails - stride), 2 * stride
            else:
                guess = (fits + fails) // 2
        if fits and not probe(fits, VERIFYING_STEPS):
            fits, fails = 0, fits
            guess, stride = max(1, fails - int(fails * resolution) - 1), max(1, int(fails * STRIDE))
            continue
        beyond = max(fails, math.ceil(1.05 * fits))
        if not fits or beyond == fails or not probe(beyond, STEPS):
            return fits, fails
        fits, fails, guess = beyond, sys.maxsize, beyond + stride  # memory was not what failed before


def _probe_on(config: Config, limit: int) -> Callable[[int, int], bool]:
    """A probe in a fresh process each, which says on stderr what it found."""

    def probe(batch: int, steps: int) -> bool:
        reserved = _in_a_fresh_process(fits_in, config, batch, steps, limit)
        outcome = "does not fit" if reserved is None else f"fits, {reserved / GIB:.2f} of {limit / GIB:.2f} GiB taken"
        print(f"batch {batch}, {steps} steps: {outcome}", file=sys.stderr)
        return reserved is not None

    return probe


class CardIsTaken(Stopped):
    """Somebody else's processes fill the GPU."""


def _refuse_taken(free: int, limit: int, config: Config) -> None:
    """Raise if a limit cannot be reached; a process has its context there before it can ask, hence the allowance."""
    if free < limit - config.gpu.allowance_mib * MIB:
        raise CardIsTaken(f"{free / GIB:.4g} GiB of the GPU are free: too little to measure {limit / GIB:.4g}")


def _in_a_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function where nothing is on the GPU yet; this process leaves it alone, for a context takes memory.

    The other process ends when it has answered, or finds nobody to answer to.
    """
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        process.join()
        raise Stopped(f"a process ended without an answer, by exit code {process.exitcode}") from None
    process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(sending: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        answer = function(*arguments)
    except Exception as error:
        traceback.print_exc()  # the pipe carries the exception without it
        answer = error
    sending.send(answer)


def fits_in(config: Config, batch: int, count: int, limit: int) -> int | None:
    """Run training steps on the GPU under a limit of memory.

    Args:
        config: the run.
        batch: samples a step.
        count: how many.
        limit: bytes that the allocator may take.

    Returns:
        The most bytes it took; None where they were not enough.

    Raises:
        CardIsTaken: others hold so much memory that the limit cannot be reached.
    """
    device = torch.device("cuda")
    _refuse_taken(torch.cuda.mem_get_info()[0], limit, config)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    steps.configure_torch(setup.used(config.gpu, device))
    try:
        step = setup.training_step(config, batch, kernels.choose(config.gpu.kernels, device), device)
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    return torch.cuda.max_memory_reserved()


def describe(config: Config, batch: int, limit: int, counted: TrainingBytes) -> str:
    """The prediction, and what it is made of.

    Args:
        config: the run.
        batch: the largest batch, or 0.
        limit: bytes there are, the allowance taken off.
        counted: at that batch, or at 1.
    """
    allowance = config.gpu.allowance_mib * MIB
    budget = f"{(limit + allowance) / GIB:.4g} GiB"
    parts = (
        f"weights {counted.weight_bytes / GIB:.2f}, optimiser {counted.optimiser_bytes / GIB:.2f}, "
        f"images {counted.input_bytes / GIB:.2f}, a step {counted.step.peak_bytes / GIB:.2f}, "
        f"allowance {allowance / GIB:.2f}"
    )
    if not batch:
        return (
            f"{_network(config)}: does not fit {budget} even at batch 1 (predicted), "
            f"which takes {(counted.total_bytes - limit) / MIB:.0f} MiB more than there is; GiB: {parts}"
        )
    return f"{_network(config)}: largest batch {batch} in {budget} (predicted); GiB: {parts}"


def _network(config: Config) -> str:
    return f"{config.mode.name}, depth {config.depth}, width {config.width:g}"
