"""The parts of the check: each is a function that returns whether what it checks is right."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from blpa import kernels
from blpa.codec import Codec
from blpa.memory import GIB, MIB
from runners import CONF, compose, fresh, provenance
from runners.config import Config
from runners.gpu_check.comparison import CODECS, wrong_cases, wrong_cases_of_any_layout
from runners.tasks import converted_runtime, max_batch, runtime
from runners.texts import hydra_text
from runners.timing import take_turns
from runners.training import network, segments, steps

FRACTIONS = (1.0, 0.9, 0.8, 0.7)
"""Fractions of the predicted batch to try, largest first."""

RESULTS = CONF.parent / "results"
"""Folder of the committed records, with predictions; only a checkout has it."""

IN_SMALL = (
    "dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "gpu.device=cpu", "gpu.kernels=torch",
)  # fmt: skip
OF_TASK_IN_SMALL = {
    "runtime": ("task.steps=1",),
    "converted-runtime": ("task.steps=1", "task.model=resnet18", "task.image_size=64", "gpu.kernels=auto", "width=1.0"),
}


@dataclass(frozen=True)
class Check:
    """The argument of a part.

    Attributes:
        part: the part's name.
        out: folder for results.
        is_dry: whether the part runs at small size on the CPU.
    """

    part: str
    out: Path
    is_dry: bool

    def write(self, **values: object) -> None:
        """Append a result to results.jsonl, sync it to disk, and print it."""
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.part, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{self.part}:", ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)

    def config(self, mode: str, depth: int, precision: str, task: str, *more: str) -> Config:
        """Compose the configuration of a task at batch 128; cuDNN may pick its fastest convolutions."""
        results = hydra_text(str(self.out))
        given = [f"mode={mode}", f"depth={depth}", f"gpu.precision={precision}", f"task={task}",
                 "gpu.deterministic=false", f"results={results}", f"run={self.part}", *more]  # fmt: skip
        small = [*IN_SMALL, *OF_TASK_IN_SMALL.get(task, ())] if self.is_dry else []
        with compose.session():
            (cell,) = compose.cells([*given, *small], multirun=False)
        return cell.config


def machine(check: Check) -> bool:
    """Report the device, versions, and the bandwidth of a copy."""
    device = torch.device("cpu" if check.is_dry else "cuda")
    versions = {name: value for name, value in provenance.provenance(device).items() if name != "date"}
    check.write(**versions, cudnn=torch.backends.cudnn.version())
    source, target = torch.zeros(2, 2**20 if check.is_dry else 2**30, dtype=torch.uint8, device=device)
    seconds = take_turns([lambda: target.copy_(source)], 5, title="copies", device=device).median().item()
    check.write(copy_tb_per_s=round(2 * source.nbytes / seconds / 1e12, 3))
    return True


Compare = Callable[[bool, Codec | None], tuple[int, list[str]]]


def kernels_are_right(check: Check, *, compare: Compare) -> bool:
    """Compare every kernel function with the reference, at networks' shapes, in fp32 and bf16, for every codec.

    Each codec has its own process, since compiling takes most of the time, and reports when it ends.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(fresh.IMPORTED_AHEAD)
    all_right = True
    with ProcessPoolExecutor(len(CODECS), mp_context=context) as pool:
        running = {pool.submit(compare, check.is_dry, codec): codec for codec in CODECS}
        for done in as_completed(running):
            name = "full precision" if (codec := running[done]) is None else f"{codec.bits} bits"
            if (error := done.exception()) is None:
                cases, wrong = done.result()
            else:
                cases, wrong = 0, [f"not compared: {type(error).__name__}: {error}"[:500]]
            check.write(codec=name, cases=cases, wrong=wrong, correct=not wrong)
            all_right = all_right and not wrong
    return all_right


def capture_keeps_bits(check: Check) -> bool:
    """Compare the losses of captured steps with those of steps launched kernel by kernel: the bits must be the same.

    The losses of the reference kernels, which sum in another order, are reported beside them.
    """
    all_same = True
    for mode in ("4bit", "exact"):
        for precision in ("tf32", "bf16"):
            losses = {}
            for name, options in (("captured", []), ("launched", ["gpu.cuda_graph=false"]),
                                  ("reference", ["gpu.cuda_graph=false", "gpu.kernels=torch"])):  # fmt: skip
                config = check.config(mode, 29, precision, "runtime", "gpu.deterministic=true", *options)
                step = _step(config)
                losses[name] = [float(step()[0]) for _ in range(2 if check.is_dry else steps.EAGER_STEPS + 4)]
            is_same = losses["captured"] == losses["launched"]
            all_same = all_same and is_same
            check.write(mode=mode, precision=precision, same_bits=is_same, losses=losses)
    return all_same


def _step(config: Config) -> Callable[[], Any]:
    """Make training steps of the configured network, from the same weights and images in every call."""
    device = network.device(config)
    steps.configure_torch(network.used(config.gpu, device))
    torch.manual_seed(config.seed)
    chosen = kernels.choose(config.gpu.kernels, device, elements=0)
    return network.training_step(config, config.dataset.batch_size, chosen, device)


@dataclass(frozen=True)
class Times:
    """A part that times steps of exact and other modes in turn.

    Attributes:
        depth: depth of the network.
        precision: precision of all modes.
        modes: modes besides exact.
        turns: number of turns.
        deterministic: as in the cells of table 1, cuDNN does not pick convolutions by timing them.
    """

    depth: int
    precision: str
    modes: tuple[str, ...]
    turns: int
    deterministic: bool = False

    def __call__(self, check: Check) -> bool:
        """Time the modes."""
        modes = ("exact-one-copy" if check.is_dry and mode == "compiled" else mode for mode in self.modes)
        config = check.config(
            "exact", self.depth, self.precision, "runtime", f"task.steps={self.turns}",
            f"task.modes=[{','.join(modes)}]", f"gpu.deterministic={self.deterministic}",
        )  # fmt: skip
        found = runtime.run(config)
        ratios = {record.mode: record.value for record in found if record.metric == "ratio_to_exact"}
        for record in found:
            if record.metric == "seconds_per_sample":
                low, ms, high = (1e3 * record.batch_size * value for value in (record.low, record.value, record.high))
                check.write(mode=record.mode, depth=self.depth, precision=self.precision,
                           deterministic=self.deterministic, ms=round(ms, 3), low=round(low, 3), high=round(high, 3),
                           times_exact=ratios.get(record.mode), minutes_of_64000=round(ms * 64 / 60, 2))  # fmt: skip
        return True


def converted(check: Check, precision: str) -> bool:
    """Time steps of a ResNet-50, channels-last, as PyTorch runs it and converted, and tell where their time goes.

    Captured steps come last: a capture that fails ends the process.
    """
    given = "4bit", 164, precision, "converted-runtime", "task.channels_last=true", "dataset.batch_size=128"
    launched = check.config(*given, "task.steps=3", "gpu.cuda_graph=false")
    _time_converted(check, launched, "launched")
    for cell in (network.exact(launched), launched):
        step = converted_runtime.launched_step(cell)
        for _ in range(converted_runtime.WARM_UP):
            step()
        check.write(mode=cell.mode.name, precision=precision, **busy(step, is_dry=check.is_dry))
    _time_converted(check, check.config(*given, "task.steps=7", "task.modes=[8bit]"), "captured")
    return True


def _time_converted(check: Check, config: Config, launch: str) -> None:
    found = converted_runtime.run(config)
    for mode in dict.fromkeys(record.mode for record in found):  # what does not fit has no record
        values = {record.metric: record.value for record in found if record.mode == mode}
        ms = 1e3 * config.dataset.batch_size * values["seconds_per_sample"]
        check.write(model=config.task.model, mode=mode, precision=config.gpu.precision, launch=launch, ms=round(ms, 3),
                   times_exact=values.get("ratio_to_exact"), reserved_mib=values.get("reserved_mib"))  # fmt: skip


def busy(call: Callable[[], object], *, is_dry: bool) -> dict[str, Any]:
    """Measure what a call launches on the GPU: its kernels, copies and fills, and how long the GPU works on them.

    Where `busy_ms` is far less than the time of a step, the host limits it. In a dry run operations on the CPU stand
    for kernels.
    """
    kind = "CPU" if is_dry else "CUDA"
    with profile(activities=[ProfilerActivity.CPU if is_dry else ProfilerActivity.CUDA]) as profiled:
        call()
        if not is_dry:
            torch.cuda.synchronize()
    launched = [one for one in profiled.key_averages() if one.device_type.name == kind and not one.is_user_annotation]
    found = [
        (one.self_cpu_time_total if is_dry else one.self_device_time_total, one.count, one.key) for one in launched
    ]
    longest = {f"{name[:80]}, {count} times": round(us / 1e3, 3) for us, count, name in sorted(found, reverse=True)[:5]}
    return {"busy_ms": round(sum(us for us, *_ in found) / 1e3, 3), "launches": sum(count for _, count, _ in found),
            "longest_ms": longest}  # fmt: skip


def largest_batch(check: Check, mode: str, depth: int) -> bool:
    """Try half of the predicted batch, then find the largest of a few fractions that fits the paper's card."""
    memory = "0.502" if check.is_dry else "11"
    # Deterministic: cuDNN's search for fast convolutions takes memory that is not counted.
    given = f"gpu.memory_gib={memory}", "gpu.deterministic=true"
    config = check.config(mode, depth, "tf32", "max-batch", *given)
    limit = int(float(memory) * GIB) - config.gpu.allowance_mib * MIB
    committed = check.config(mode, depth, "tf32", "max-batch", *given, f"results={hydra_text(str(RESULTS))}")
    known = max_batch.earlier_prediction(committed, committed)
    predicted = int((known or max_batch.predict(config, config, limit)).value)

    def fits(fraction: float) -> bool:
        for kind in segments.KINDS:
            batch = int(fraction * predicted)
            taken = _probe(check, config, batch, limit, kind)
            gib = None if taken is None else round(taken / GIB, 3)
            check.write(mode=mode, depth=depth, predicted=predicted, batch=batch, segments=kind,
                       fits=taken is not None, reserved_gib=gib)  # fmt: skip
            if taken is not None:
                return True
        return False

    if fits(0.5):  # shows what is reserved beyond the count
        any(fits(fraction) for fraction in FRACTIONS)
    return True


def _probe(check: Check, config: Config, batch: int, limit: int, kind: str) -> int | None:
    """Measure the bytes reserved for a few steps, in a process that has not used the GPU; None if they do not fit."""
    if check.is_dry:
        _step(config)()
        return 0
    taken: int | None = fresh.call(max_batch.fits_in, config, batch, max_batch.STEPS, limit, kind)
    return taken


def side_by_side(check: Check) -> bool:
    """Time one to four networks side by side, each on its own stream."""
    config = check.config("4bit", 164, "bf16", "runtime")
    cells = 2 if check.is_dry else 4
    streams = [nullcontext() if check.is_dry else torch.cuda.stream(torch.cuda.Stream()) for _ in range(cells)]
    networks = []
    for stream in streams:
        with stream:
            networks.append(_step(config))
            for _ in range(steps.EAGER_STEPS + 2):
                networks[-1]()
    rounds = 1 if check.is_dry else 20
    for count in range(1, cells + 1):
        for _ in range(2):  # once untimed
            _wait(check)
            began = time.perf_counter()
            for _ in range(rounds):
                for step, stream in zip(networks[:count], streams[:count], strict=True):
                    with stream:
                        step()
            _wait(check)
            ms = 1e3 * (time.perf_counter() - began) / rounds / count
        check.write(cells=count, precision="bf16", mode="4bit", ms_per_cell=round(ms, 3),
                   minutes_of_64000=round(ms * 64 / 60, 2))  # fmt: skip
    return True


def _wait(check: Check) -> None:
    if not check.is_dry:
        torch.cuda.synchronize()


def compile_ahead(check: Check) -> bool:
    """Fill the compiler's cache while nothing is timed; blocks of every depth share it."""
    if not check.is_dry:
        _step(check.config("compiled", 29, "tf32", "runtime"))()
    return True


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: its name.
        run: the function; it returns whether the result is right.
        most: time limit in seconds.
        least: seconds that must be left for it to begin.
        decides: whether the exit code depends on it.
    """

    name: str
    run: Callable[[Check], bool]
    most: int
    least: int
    decides: bool = False


AHEAD = Part("compile-ahead", compile_ahead, 60, 0)
PARTS = (
    Part("machine", machine, 25, 10),
    Part("kernels", partial(kernels_are_right, compare=wrong_cases), 90, 20, decides=True),
    Part("captured", capture_keeps_bits, 50, 20, decides=True),
    Part("converted-kernels", partial(kernels_are_right, compare=wrong_cases_of_any_layout), 90, 20, decides=True),
    Part("steps-164-tf32", Times(164, "tf32", ("4bit", "8bit", "2bit"), turns=15), 45, 20),
    Part("steps-164-bf16", Times(164, "bf16", ("4bit", "8bit", "2bit"), turns=15), 45, 20),
    Part("converted-bf16", partial(converted, precision="bf16"), 75, 30),
    Part("converted-tf32", partial(converted, precision="tf32"), 75, 30),
    Part("together-164-bf16", side_by_side, 40, 20),
    Part("batch-4bit-164", partial(largest_batch, mode="4bit", depth=164), 60, 25),
    Part("compiled-164-tf32", Times(164, "tf32", ("compiled", "4bit"), turns=7), 75, 30),
    Part("steps-1001-tf32", Times(1001, "tf32", ("4bit", "8bit"), turns=7), 75, 45),
    Part("trained-164-tf32", Times(164, "tf32", ("4bit",), turns=7, deterministic=True), 25, 20),
    Part("batch-exact-164", partial(largest_batch, mode="exact", depth=164), 40, 25),
    Part("steps-164-fp32", Times(164, "fp32", ("4bit", "8bit"), turns=7), 40, 25),
    Part("batch-4bit-1001", partial(largest_batch, mode="4bit", depth=1001), 60, 40),
    Part("compiled-1001-tf32", Times(1001, "tf32", ("compiled", "4bit"), turns=5), 60, 40),
)
"""In the order of their value: the last ones are cut off first."""
