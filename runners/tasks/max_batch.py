"""The largest batch whose training steps fit a card's memory: predicted on any machine, measured where there is a GPU.

    weights + optimiser + images + peak of a step <= budget - allowance

Predicted: the left side is counted on the meta device (blpa.memory). Measured: whole training steps run in a fresh
process whose allocator is limited to the right side, so a large card can measure what fits a smaller one. The search
starts at the prediction and needs a handful of processes. The allowance stands for memory that is not counted: the CUDA
context, and for the prediction also convolution workspaces and rounded-up blocks.

The allocator reserves more memory than is in use, by an amount that depends on the kind of its segments (segments.py).
Every mode is searched with both kinds, the second starting from the first one's result. The larger batch counts.

With several processes the batch is that of all of them, a multiple of their number: what fits beside the gradients that
they exchange is measured, never predicted.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from blpa import kernels, memory
from blpa.memory import GIB, MIB, TrainingBytes
from runners import fresh, processes, provenance, records
from runners.cells import PROCESSES, card_name, command, gpu_changes
from runners.config import PUBLISHED, Config
from runners.errors import Stopped, UserError, first_line, is_out_of_memory, may_be_out_of_memory, missing_memory
from runners.records import Record
from runners.training import network, segments, steps, world
from runners.training.network import META
from runners.training.offloading import host_bytes_left
from runners.training.steps import EAGER_STEPS

STEPS = EAGER_STEPS + 2
"""Training steps of a probe: the warm-up steps before a CUDA graph is captured, the captured one, and one more."""
STRIDE = 1 / 40
"""First stride of the search, as a fraction of the batch; each further stride is twice as long."""
VERIFYING_STEPS = 20
"""Training steps that must fit at the largest batch."""

LARGEST_INDEX = 2**31
"""Elements of a tensor from which on libraries with 32-bit indices fail."""

STARTS_PROCESSES = True
"""It has several processes for each probe, not around the search."""

Probe = Callable[[int, int], bool]
"""(batch, steps) -> whether that many training steps fit."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    resolution: float
    """Relative tolerance of the measured search: a batch larger by this fraction does not fit."""


def check(config: Config) -> None:
    """Check that the resolution is a fraction of a batch, and that this process starts others."""
    if processes.launched():
        raise UserError("task=max-batch starts processes of its own: give gpu.processes=N, without torchrun or srun")
    if not 0 < config.task.resolution < 1:
        raise UserError(f"task.resolution={config.task.resolution} is not allowed: it is above 0 and less than 1")


def folder(config: Config) -> str:
    """Name the folder by the run, the memory budget and the backend."""
    return f"{config.run}-max-batch-{card_name(config.gpu)}-{config.gpu.kernels}"


def run(config: Config) -> list[Record]:
    """Find the largest batch for the configured network and budget, record it and print it.

    Args:
        config: one run, checked; dataset.batch_size does not matter.

    Returns:
        The predicted batch, and the measured one on a GPU with enough memory; 0 where not even one sample fits. On a
        GPU, an earlier prediction in the results is not counted again: its record keeps its date and commit.

    Raises:
        UserError: there is neither a memory budget nor a GPU, or the results folder cannot be written; or the batch of
            several processes was asked for without GPUs.
        CardIsTaken: other processes use so much of the GPU's memory that the budget cannot be reached.
        NotMemory: a step failed for another reason than lack of memory.
    """
    run_dir = network.run_folder(config)
    device = network.device(config)
    chosen = kernels.choose(config.gpu.kernels, device, elements=0)  # nothing is computed but on a GPU
    is_cuda = device.type == "cuda"
    count = config.gpu.processes
    if count > 1 and not is_cuda:
        raise UserError(f"gpu.processes={count}: this machine has no GPU, and the batch of several is never predicted")
    free, card = fresh.call(torch.cuda.mem_get_info) if is_cuda else (0, 0)
    cell = network.on_card(config, card)
    assert cell.gpu.memory_gib is not None
    limit = int(cell.gpu.memory_gib * GIB) - config.gpu.allowance_mib * MIB

    if count > 1:
        found, lines, begin = [], [], _counted(cell, limit)
    else:
        prediction, line = _prediction(config, cell, limit, is_cuda=is_cuda)
        found, lines, begin = [prediction], [line], int(prediction.value)
    if is_cuda and limit > card:
        too_small = f"not measured: this card has {card / GIB:.4g} GiB"
        if count > 1:
            raise UserError(f"gpu.memory_gib={cell.gpu.memory_gib:g} is {too_small}")
        print(too_small, file=sys.stderr)
    elif is_cuda:
        _check_free(free, limit, cell)
        kind, fits, fails = segments.KINDS[0], 0, 1
        if limit > 0:
            probes = {kind: _probe_on(cell, limit, kind) for kind in segments.KINDS}
            kind, fits, fails = better(probes, min(begin, _host_batch(cell)), config.task.resolution)
        where = f"{cell.gpu.memory_gib:g} GiB{f' of each of {count} GPUs' if count > 1 else ''}"
        lines.append(
            f"{_network(cell)}: largest batch {count * fits} in {where} (measured, {kind} segments); "
            f"{count * fails} does not fit"
        )
        source = provenance.source(config, device, chosen.name)
        found.append(_record(cell, count * fits, count * fails - 1, source, segments=kind))
    records.write(found, run_dir)
    print(*lines, sep="\n")
    remark_on_data(config, int(found[-1].value))
    return found


def _prediction(config: Config, cell: Config, limit: int, *, is_cuda: bool) -> tuple[Record, str]:
    """Return the prediction, an earlier one where there is a GPU, and describe it."""
    earlier = earlier_prediction(config, cell) if is_cuda and config.resume else None
    if earlier is not None:
        budget = f"{cell.gpu.memory_gib:g} GiB"
        text = f"{_network(cell)}: largest batch {int(earlier.value)} in {budget} (predicted, {earlier.date})"
        return earlier, text
    found = predict(config, cell, limit)
    batch = int(found.value)
    return found, describe(cell, batch, limit, network.training_bytes(cell, max(batch, 1)))


def _record(config: Config, fits: int, high: int, source: dict[str, object], *, segments: str = "") -> Record:
    """Make the record of a largest batch; a measured one may be up to `high`."""
    is_predicted = source["device"] == "none"
    return provenance.record(
        config, source, metric="largest_batch", unit="samples", value=fits, low=fits, high=high, n=1, iterations=0,
        predicted=is_predicted, batch_size=0, seed=0, segments=segments,
        settings=settings_of(config) | ({} if is_predicted else gpu_changes(config, "deterministic")),
    )  # fmt: skip


def remark_on_data(config: Config, batch: int) -> None:
    """Say on stderr that a batch is larger than the training set, where it is: no training can use it."""
    images = config.dataset.train_images
    if config.dataset.version == PUBLISHED and images is not None and batch > images:
        print(f"batch {batch} is more than the {images} training images of {config.dataset.name}", file=sys.stderr)


def settings_of(config: Config) -> dict[str, Any]:
    """Return what decides the largest batch and has no column of a record: the memory budget, and CUDA graphs if set.

    Args:
        config: a run of any task, with its budget as a number where it is known.
    """
    gpu = config.gpu
    budget = {"memory_gib": gpu.memory_gib, "allowance_mib": gpu.allowance_mib}
    return budget | gpu_changes(config, "cuda_graph", *PROCESSES)


def predict(config: Config, cell: Config, limit: int) -> Record:
    """Count the prediction, and return its record.

    Args:
        config: the run.
        cell: the same run, with its budget as a number.
        limit: available bytes.
    """
    batch = _counted(cell, limit)
    used = kernels.choose(cell.gpu.kernels, META).name
    return _record(cell, batch, batch, provenance.source(config, META, used))


def _counted(cell: Config, limit: int) -> int:
    """Count the largest batch of one process whose training takes no more than `limit` bytes."""
    with tqdm(desc="counting a training step", unit=" counts") as progress:

        def total_bytes(batch: int) -> int:
            progress.set_postfix_str(f"batch {batch}")
            total = network.training_bytes(cell, batch).total_bytes
            progress.update()
            return total

        return memory.largest_batch(total_bytes, limit)


def _host_batch(cell: Config) -> int:
    """Return the largest batch whose offloaded activations fit host memory; no limit for other modes.

    PyTorch rounds pinned memory up to powers of two, so it takes up to twice the bytes moved.
    """
    if cell.mode.layers != "offload":
        return sys.maxsize
    batch = 64
    return batch * host_bytes_left() // (2 * network.training_bytes(cell, batch).host_bytes)


def earlier_prediction(config: Config, cell: Config) -> Record | None:
    """Return the newest prediction in the results for this network, budget, backend and settings, if any.

    Args:
        config: the run.
        cell: the same run, with its budget as a number.
    """
    used = provenance.kernels_used(cell, kernels.choose(cell.gpu.kernels, META).name)
    precision = network.precision(cell.gpu, META)
    columns = "dataset", "mode", "depth", "width", "precision", "kernels"
    wanted = cell.dataset.name, cell.mode.name, cell.depth, cell.width, precision, used
    settings = provenance.all_settings(cell, settings_of(cell))
    found = [
        record
        for record in records.merge(Path(cell.results))
        if record.metric == "largest_batch"
        and record.predicted
        and record.settings == settings
        and records.key(record, columns) == wanted
    ]
    if not found:
        return None
    newest = max(found, key=lambda record: record.date)
    return replace(newest, experiment=cell.experiment, command=command(config))


def better(probes: dict[str, Probe], predicted: int, resolution: float) -> tuple[str, int, int]:
    """Search with one kind of segments after the other, each starting from the result of the previous one.

    Args:
        probes: probe by kind of segments.
        predicted: where the first search begins.
        resolution: as for search.

    Returns:
        The kind with the largest batch, the first of equal ones; and the result of its search.
    """
    (first, probe), *others = probes.items()
    best = first, *search(probe, predicted, resolution)
    for kind, probe in others:
        remembering = functools.cache(probe)
        if remembering(best[2], STEPS):  # the smallest batch that does not fit with the best kind so far
            best = max(best, (kind, *search(remembering, best[2], resolution)), key=lambda found: found[1])
    return best


def search(probe: Probe, predicted: int, resolution: float = 0.01) -> tuple[int, int]:
    """Find the largest batch that fits, verify it over more steps, and check that 5 % more does not fit.

    Args:
        probe: the probe of one kind of segments.
        predicted: where to begin.
        resolution: relative tolerance; the search ends where the smallest failing batch is this close, or is the next.

    Returns:
        The largest batch that fits over VERIFYING_STEPS, or 0; and the smallest batch that does not fit.
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
        fits, fails, guess = beyond, sys.maxsize, beyond + stride  # the earlier failure was not for lack of memory


def _probe_on(config: Config, limit: int, kind: str) -> Probe:
    """Make the probe of one kind of segments: it runs in fresh processes and prints its result on stderr.

    Its batch is that of each process.
    """

    def run_steps(batch: int, steps: int) -> int | None:
        if config.gpu.processes == 1:
            reserved: int | None = fresh.call(fits_in, config, batch, steps, limit, kind)
            return reserved
        task = functools.partial(_fits_in_each, batch=batch, count=steps, limit=limit, kind=kind)
        try:
            once = replace(config, gpu=replace(config.gpu, restarts=0))
            reserved_in_each: list[int] = processes.run(task, once)
        except NoMemory:
            return None
        return max(reserved_in_each)

    def probe(batch: int, steps: int) -> bool:
        try:
            reserved = run_steps(batch, steps)
        except Unclear as error:
            _check_memory_failed(config, batch, error, lambda half: run_steps(half, STEPS))
            reserved = None
        outcome = "does not fit" if reserved is None else f"fits, {reserved / GIB:.2f} of {limit / GIB:.2f} GiB taken"
        print(f"batch {batch}, {steps} steps, {kind} segments: {outcome}", file=sys.stderr)
        return reserved is not None

    return probe


class NoMemory(Stopped):
    """A step of one of several processes ran out of memory."""


class Unclear(Stopped):
    """A step failed with an error that may or may not be lack of memory."""


class NotMemory(Stopped):
    """A step failed for another reason than lack of memory."""


def _check_memory_failed(config: Config, batch: int, error: Unclear, run_steps: Callable[[int], int | None]) -> None:
    """Raise NotMemory unless a batch failed for lack of memory: then half of it fits, or clearly lacks memory too.

    Args:
        config: the run.
        batch: the batch that failed.
        error: its error.
        run_steps: fits_in as a function of the batch.
    """
    elements = network.largest_activation(config, batch)
    if elements >= LARGEST_INDEX:
        raise NotMemory(
            f"batch {batch} fails by its size, whatever the memory: {error} (its largest activation has {elements} "
            "elements, 2**31 or more)"
        ) from error
    half = batch // 2
    try:
        if half:
            run_steps(half)
            return
    except Unclear:
        pass
    beside = f"batch {half} fails like it" if half else "it is the smallest"
    raise NotMemory(f"batch {batch} fails, and not for want of memory, for {beside}: {error}") from error


class CardIsTaken(Stopped):
    """Other processes use too much of the GPU's memory."""


def _check_free(free: int, limit: int, config: Config) -> None:
    """Raise CardIsTaken if a limit cannot be reached; the allowance covers the CUDA context of this process."""
    if free < limit - config.gpu.allowance_mib * MIB:
        raise CardIsTaken(f"{free / GIB:.4g} GiB of the GPU are free: too little to measure {limit / GIB:.4g}")


def _fits_in_each(config: Config, *, batch: int, count: int, limit: int, kind: str) -> int:
    """Call fits_in in one of several processes; what it lacks ends all."""
    reserved = fits_in(config, batch, count, limit, kind)
    if reserved is None:
        raise NoMemory(f"batch {batch} does not fit process {world.current().rank}")
    return reserved


def fits_in(config: Config, batch: int, count: int, limit: int, kind: str) -> int | None:
    """Run training steps on the GPU within a memory limit, in a process that has not used the GPU yet.

    Args:
        config: the run.
        batch: samples per step of each process.
        count: number of steps.
        limit: bytes that the allocator may reserve.
        kind: kind of its segments.

    Returns:
        The most bytes reserved; None where the limit was too small.

    Raises:
        CardIsTaken: other processes use so much memory that the limit cannot be reached.
        Unclear: a step failed, perhaps for lack of memory.
    """
    segments.use(kind)
    device = torch.device("cuda")
    _check_free(torch.cuda.mem_get_info()[0], limit, config)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    steps.configure_torch(network.used(config.gpu, device))
    try:
        whole = batch * world.current().size
        step = network.training_step(config, whole, kernels.choose(config.gpu.kernels, device), device)
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if is_out_of_memory(error):
            print(f"batch {batch}, {kind} segments: {missing_memory(error)}", file=sys.stderr)
            return None
        if may_be_out_of_memory(error):
            raise Unclear(first_line(error)) from error
        raise
    return torch.cuda.max_memory_reserved()


def describe(config: Config, batch: int, limit: int, counted: TrainingBytes) -> str:
    """Describe the prediction and its parts.

    Args:
        config: the run.
        batch: the largest batch, or 0.
        limit: available bytes, without the allowance.
        counted: the bytes of training at that batch, or at batch 1.
    """
    allowance = config.gpu.allowance_mib * MIB
    budget = f"{(limit + allowance) / GIB:.4g} GiB"
    parts = (
        f"weights {counted.weight_bytes / GIB:.2f}, optimiser {counted.optimiser_bytes / GIB:.2f}, "
        f"images {counted.input_bytes / GIB:.2f}, a step {counted.step.peak_bytes / GIB:.2f}, "
        f"allowance {allowance / GIB:.2f}"
    )
    if counted.host_bytes:
        parts += f"; and {counted.host_bytes / GIB:.2f} of the host's memory"
    if not batch:
        return (
            f"{_network(config)}: does not fit {budget} even at batch 1 (predicted), "
            f"which takes {(counted.total_bytes - limit) / MIB:.0f} MiB more than there is; GiB: {parts}"
        )
    return f"{_network(config)}: largest batch {batch} in {budget} (predicted); GiB: {parts}"


def _network(config: Config) -> str:
    return f"{config.mode.name}, depth {config.depth}, width {config.width:g}"
