"""Whether the CUDA path is right, how fast it is and what fits, in four minutes on a GPU: make gpu-check.

    python -m runners.gpu_check [--seconds 240] [--out FOLDER] [--dry-run]

It is made for a machine that is there for minutes. Parts run in the order of their worth, each in a process of its own
under its own limit of time, so that one that breaks or hangs costs the others nothing. They need no data and no
network. OUT/results.jsonl has a line for each result, on the disk as soon as it is known; OUT/PART.log has what a part
printed; the records of timed steps are in OUT/runs. Last comes a table, predicted beside measured.

The exit code is 1 where a kernel is wrong or a captured step differs from one that is not, or where that could not be
found out. Without a GPU, --dry-run tries all of it in small on the CPU, but for torch.compile.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from blpa import kernels
from blpa.codec import Code
from blpa.kernels import Kernels
from blpa.kernels.reference import REFERENCE
from blpa.memory import GIB, MIB
from runners import CONF, compose, fresh, provenance
from runners.config import Config
from runners.reporting.pages import aligned
from runners.tasks import max_batch, runtime
from runners.timing import take_turns
from runners.training import network, segments, steps
from runners.training.network import EPS

MODEL_MS = {
    ("tf32", "exact"): 14.3, ("tf32", "compiled"): 12.2, ("tf32", "4bit"): 10.9,
    ("bf16", "exact"): 11.1, ("bf16", "compiled"): 8.1, ("bf16", "4bit"): 8.05,
    ("fp32", "exact"): 21.0, ("fp32", "compiled"): 19.0,
}  # fmt: skip
"""Milliseconds of a step at depth 164, batch 128, on an H100 by the model of results/LOG.md (2026-11-26), +-30 %."""

SHAPES = ((131072, 16), (131072, 64), (32768, 32), (8192, 256), (40001, 20))
"""Rows and channels of activations of the network at batch 128, and one of an odd size."""

PARTS_OF_PREDICTED = (1.0, 0.95, 0.9, 0.8)
"""Batches that are tried, largest first."""

RESULTS = CONF.parent / "results"
"""The committed records, which hold predictions; a checkout has them."""

IN_SMALL = (
    "dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "task.steps=1", "gpu.device=cpu",
    "gpu.kernels=torch",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What a part is given.

    Attributes:
        part: its name.
        out: the folder that results go to.
        is_dry: whether it is only tried, in small and on the CPU.
    """

    part: str
    out: Path
    is_dry: bool

    def write(self, **values: object) -> None:
        """Write a result to the disk, and print it."""
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.part, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(values, flush=True)

    def config(self, mode: str, depth: int, precision: str, task: str, *more: str) -> Config:
        """The configuration of a task at batch 128, with cuDNN free to choose its fastest convolutions."""
        given = [f"mode={mode}", f"depth={depth}", f"gpu.precision={precision}", f"task={task}",
                 "gpu.deterministic=false", f"results={self.out}", f"run={self.part}", *more]  # fmt: skip
        small = [text for text in IN_SMALL if task == "runtime" or text != "task.steps=1"] if self.is_dry else []
        with compose.session():
            (cell,) = compose.cells([*given, *small], multirun=False)
        return cell.config


# ---- parts: each returns whether what it looked at is right ----------------------------------------------------------


def machine(check: Check) -> bool:
    """The device, versions, and the bandwidth of a copy."""
    device = torch.device("cpu" if check.is_dry else "cuda")
    versions = {name: value for name, value in provenance.provenance(device).items() if name != "date"}
    check.write(**versions, cudnn=torch.backends.cudnn.version())
    source, target = torch.zeros(2, 2**20 if check.is_dry else 2**30, dtype=torch.uint8, device=device)
    seconds = take_turns([lambda: target.copy_(source)], 5, title="copies", device=device).median().item()
    check.write(copy_tb_per_s=round(2 * source.nbytes / seconds / 1e12, 3))
    return True


def kernels_are_right(check: Check) -> bool:
    """Every kernel function beside the reference, at the network's own shapes, in fp32 and bf16, for every code."""
    device = torch.device("cpu" if check.is_dry else "cuda")
    back_end = kernels.choose("auto", device, elements=0)
    shapes = ((333, 16), (40, 5)) if check.is_dry else SHAPES
    wrong, cases = [], 0
    for rows, channels in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for code in (Code(4), Code(8), Code(2), None):
                found = differences(back_end, rows, channels, dtype=dtype, code=code, device=device)
                wrong += [f"{name} at [{rows}, {channels}], {dtype}, {code}" for name in found]
                cases += 1
    check.write(kernels=back_end.name, cases=cases, wrong=wrong, correct=not wrong)
    return not wrong


def differences(
    back_end: Kernels, rows: int, channels: int, *, dtype: torch.dtype, code: Code | None, device: torch.device
) -> list[str]:
    """Compare a backend with the reference: codes and activations to the bit, sums and gradients closely.

    Args:
        back_end: which.
        rows: of the activation.
        channels: of it.
        dtype: of it.
        code: which code is kept; None is x itself.
        device: where.

    Returns:
        What differs; nothing where all is right.
    """
    x, grad, other = (3 * torch.randn(3, rows, channels, device=device) + 1).to(dtype)
    counter = torch.zeros(channels, dtype=torch.int32, device=device)  # as a layer has one
    gamma, beta = torch.randn(2, channels, device=device)
    vectors = back_end.channel_stats(x, gamma, beta, eps=EPS, code=code, counter=counter)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    # Outputs that are not written would be seen.
    a, a_there, decoded, decoded_there, dx_there = (torch.full_like(x, torch.nan) for _ in range(5))
    codes = back_end.normalise_rectify_encode(x, vectors, code=code, out=a)
    codes_there = REFERENCE.normalise_rectify_encode(x, vectors, code=code, out=a_there)
    kept = x if codes_there is None else codes_there
    back_end.decode(kept, vectors, code=code, out=decoded)
    REFERENCE.decode(kept, vectors, code=code, out=decoded_there)
    dx = grad.clone()  # written over, as in the network
    backward = partial(back_end.backward, kept=kept, vectors=vectors, code=code, constant_stats=False, counter=counter)
    sums = backward(dx, out=dx, add=other)
    sums_again = backward(grad, out=torch.empty_like(grad))
    sums_there = REFERENCE.backward(grad, kept, vectors, code=code, constant_stats=False, out=dx_there, add=other)
    # Its sum in another place, and the Norm of that; dW [C_out, C] of a 1x1 convolution to 16 channels.
    total = x.clone()
    of_total = back_end.channel_stats(total, gamma, beta, eps=EPS, code=code, add=other)
    of_total_there = back_end.channel_stats(x + other, gamma, beta, eps=EPS, code=code)
    grad_out = torch.randn(rows, 16, device=device).to(dtype)
    weight_grad = back_end.pointwise_weight_grad(grad_out, kept, vectors, code=code)
    products = grad_out.double().T @ decoded_there.double()
    sizes = grad_out.double().abs().T @ decoded_there.double().abs()
    # Factors are cut to tf32, by 2^-10 each at most; sums in float32 round by rows 2^-24 of their sizes at most.
    bound = (2.0**-9 + rows * 2.0**-24) * sizes
    # dX = gamma rstd (dY - ...) + other: rounding to the activation's dtype, and sums in another order before it.
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    are_right = {
        "mean": torch.allclose(vectors[0].double(), mean, rtol=1e-5, atol=1e-5),
        "variance": torch.allclose(vectors[1].double(), var, rtol=1e-4, atol=1e-5),
        "activation": torch.equal(a, a_there),
        "codes": codes is None or codes_there is None or torch.equal(codes, codes_there),
        "decoded activation": torch.equal(decoded, decoded_there),
        "sums": torch.allclose(sums, sums_there, rtol=1e-3, atol=rows * 1e-5),
        "input gradient": torch.allclose(dx.float(), dx_there.float(), rtol=near, atol=near),
        "sums once more": torch.equal(sums_again, sums) and not counter.any(),
        "sum": torch.equal(total, x + other),
        "statistics of the sum": torch.equal(of_total, of_total_there),
        "weight gradient": weight_grad is None or bool(((weight_grad - products).abs() <= bound).all()),
    }
    return [name for name, is_right in are_right.items() if not is_right]


def capture_keeps_bits(check: Check) -> bool:
    """Losses of steps that a CUDA graph replays, beside those of steps that are launched one by one, to the bit.

    Beside them stand those of plain PyTorch's kernels, which sum in another order.
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
    """Training steps of the configured network from the same weights and images each time it is asked for."""
    device = network.device(config)
    steps.configure_torch(network.used(config.gpu, device))
    torch.manual_seed(config.seed)
    chosen = kernels.choose(config.gpu.kernels, device, elements=0)
    return network.training_step(config, config.dataset.batch_size, chosen, device)


@dataclass(frozen=True)
class Times:
    """The part that times steps of exact and other modes in turn.

    Attributes:
        depth: of the network.
        precision: of all of them.
        modes: besides exact.
        turns: of each.
        deterministic: as cells of table 1 are trained, with convolutions that cuDNN does not choose by trying them.
    """

    depth: int
    precision: str
    modes: tuple[str, ...]
    turns: int
    deterministic: bool = False

    def __call__(self, check: Check) -> bool:
        """Time them."""
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


def largest_batch(check: Check, mode: str, depth: int) -> bool:
    """Whether the predicted batch fits the paper's card; else the first smaller one that does."""
    memory = "0.502" if check.is_dry else "11"
    config = check.config(mode, depth, "tf32", "max-batch", f"gpu.memory_gib={memory}")
    limit = int(float(memory) * GIB) - config.gpu.allowance_mib * MIB
    committed = check.config(mode, depth, "tf32", "max-batch", f"gpu.memory_gib={memory}", f"results={RESULTS}")
    known = max_batch.prediction_of_before(committed, committed)
    predicted = int((known or max_batch.predict(config, config, limit)).value)
    for part in PARTS_OF_PREDICTED:
        for kind in segments.KINDS:
            batch = int(part * predicted)
            taken = _probe(check, config, batch, limit, kind)
            gib = None if taken is None else round(taken / GIB, 3)
            check.write(mode=mode, depth=depth, predicted=predicted, batch=batch, segments=kind,
                       fits=taken is not None, reserved_gib=gib)  # fmt: skip
            if taken is not None:
                return True
    return True


def _probe(check: Check, config: Config, batch: int, limit: int, kind: str) -> int | None:
    """Bytes that the allocator takes for some steps, in a process that has not used the GPU; None where they fail."""
    if check.is_dry:
        _step(config)()
        return 0
    taken: int | None = fresh.call(max_batch.fits_in, config, batch, max_batch.STEPS, limit, kind)
    return taken


def together(check: Check) -> bool:
    """One to four networks side by side, each on a stream of its own: whether that fills the card."""
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
    """Fill the compiler's cache on the other cores while nothing is being timed; blocks of every depth share it."""
    if not check.is_dry:
        _step(check.config("compiled", 29, "tf32", "runtime"))()
    return True


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: its name.
        run: whether what it looks at is right.
        most: seconds after which it is ended.
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
    Part("kernels", kernels_are_right, 60, 20, decides=True),
    Part("captured", capture_keeps_bits, 50, 20, decides=True),
    Part("steps-164-tf32", Times(164, "tf32", ("4bit", "8bit", "2bit"), turns=15), 40, 20),
    Part("steps-164-bf16", Times(164, "bf16", ("4bit", "8bit", "2bit"), turns=15), 30, 20),
    Part("trained-164-tf32", Times(164, "tf32", ("4bit",), turns=7, deterministic=True), 25, 20),
    Part("batch-4bit-164", partial(largest_batch, mode="4bit", depth=164), 45, 25),
    Part("compiled-164-tf32", Times(164, "tf32", ("compiled", "4bit"), turns=7), 75, 30),
    Part("steps-1001-tf32", Times(1001, "tf32", ("4bit", "8bit"), turns=7), 75, 45),
    Part("together-164-bf16", together, 40, 25),
    Part("batch-exact-164", partial(largest_batch, mode="exact", depth=164), 40, 25),
    Part("steps-164-fp32", Times(164, "fp32", ("4bit", "8bit"), turns=7), 40, 25),
    Part("batch-4bit-1001", partial(largest_batch, mode="4bit", depth=1001), 60, 40),
    Part("compiled-1001-tf32", Times(1001, "tf32", ("compiled", "4bit"), turns=5), 60, 40),
)
"""In the order of their worth: what is cut off at the end costs least."""


# ---- running them ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that fit into the time, and print the table.

    Args:
        arguments: the command line after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 1 where something that decides is wrong or was not found out.
    """
    parser = argparse.ArgumentParser(prog="python -m runners.gpu_check", description=str(__doc__).split("\n")[0])
    parser.add_argument("--seconds", type=float, default=240, help="time for all parts (default 240)")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for results (default gpu-out)")
    parser.add_argument("--dry-run", action="store_true", help="try it in small on the CPU")
    given = parser.parse_args(arguments)
    if not (given.dry_run or torch.cuda.is_available()):
        print("gpu-check: torch finds no CUDA GPU here; --dry-run tries it in small on the CPU", file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.jsonl").unlink(missing_ok=True)
    is_right = run_all(given.out.absolute(), given.seconds, is_dry=given.dry_run)
    if given.dry_run:
        print("Tried in small on the CPU: what was measured says nothing of a GPU.\n")
    print(aligned(table(_results(given.out))), end="")
    return 0 if is_right else 1


def run_all(out: Path, seconds: float, *, is_dry: bool, parts: tuple[Part, ...] = PARTS) -> bool:
    """Run one part after the other.

    Args:
        out: the folder for results.
        seconds: for all of them.
        is_dry: as in Check.
        parts: in their order.

    Returns:
        Whether all those that decide ended well.
    """
    began = time.monotonic()
    end = began + seconds
    is_right = True
    ahead = None
    try:
        for part in parts:
            report = Check(part.name, out, is_dry)
            if end - time.monotonic() < part.least:
                report.write(skipped=True, seconds_left=round(end - time.monotonic()))
                is_right = is_right and not part.decides
                continue
            if part.name != "machine" and ahead is None:
                ahead = _begin(AHEAD, out, is_dry)
            if not part.decides and ahead and ahead.is_alive():  # from here on times count
                _finish(ahead, min(45, end - time.monotonic() - part.least))
            code = _finish(_begin(part, out, is_dry), min(part.most, end - time.monotonic()))
            report.write(ended=code, at=round(time.monotonic() - began))
            is_right = is_right and (code == 0 or not part.decides)
    finally:
        if ahead:
            _finish(ahead, 0)
    return is_right


def _begin(part: Part, out: Path, is_dry: bool) -> ForkServerProcess:
    context = get_context("forkserver")
    context.set_forkserver_preload([*fresh.IMPORTED_AHEAD, "runners.tasks.runtime", "runners.tasks.max_batch"])
    process = context.Process(target=_in_its_process, args=(part, Check(part.name, out, is_dry)), daemon=False)
    process.start()
    return process


def _in_its_process(part: Part, check: Check) -> None:
    """Run a part, its output in its log; the exit code tells what it returned."""
    os.setsid()  # what it starts ends with it, but for probes, which end by themselves when it is gone
    log = os.open(check.out / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        is_right = part.run(check)
    except Exception as error:
        traceback.print_exc()
        check.write(failed=f"{type(error).__name__}: {error}"[:500])
        is_right = False
    sys.exit(0 if is_right else 1)


def _finish(process: ForkServerProcess, seconds: float) -> int | str:
    """Wait for a part, and end it with all it started where it takes longer; its exit code, or a note."""
    process.join(max(0.0, seconds))
    if not process.is_alive():
        return process.exitcode or 0
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # a group of this script's own
    process.kill()  # where it has not come to make one
    process.join()
    return f"ended after {seconds:.0f} s"


# ---- the table -------------------------------------------------------------------------------------------------------


def _results(out: Path) -> Iterator[dict[str, Any]]:
    with (out / "results.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def table(results: Iterator[dict[str, Any]]) -> list[list[str]]:
    """What was found, predicted beside measured, for reading; the head first.

    Args:
        results: the lines of results.jsonl.
    """
    rows = [["", "predicted", "measured", "times exact"]]
    for found in results:
        part = found["part"]
        if "correct" in found:
            rows.append(["kernels", "right", "right" if found["correct"] else f"WRONG: {found['wrong'][0]}", ""])
        elif "same_bits" in found:
            name = f"captured steps, {found['mode']}, {found['precision']}"
            rows.append([name, "the same bits", "the same bits" if found["same_bits"] else "OTHER BITS", ""])
        elif "ms" in found:
            name = f"{found['precision']}, depth {found['depth']}, {found['mode']}"
            name += ", deterministic" if found["deterministic"] else ""
            has_model = found["depth"] == 164 and not found["deterministic"]
            model = MODEL_MS.get((found["precision"], found["mode"])) if has_model else None
            ratio = f"{found['times_exact']:.2f}" if found["times_exact"] else ""
            rows.append([name, f"{model} ms" if model else "", f"{found['ms']:.1f} ms", ratio])
        elif "ms_per_cell" in found:
            rows.append([f"bf16, 4bit, {found['cells']} side by side", "", f"{found['ms_per_cell']:.1f} ms each", ""])
        elif found.get("fits"):
            name = f"largest batch in 11 GiB, depth {found['depth']}, {found['mode']}, {found['segments']} segments"
            rows.append([name, str(found["predicted"]), f"{found['batch']} fits", ""])
        elif "copy_tb_per_s" in found:
            rows.append(["copy", "", f"{found['copy_tb_per_s']} TB/s", ""])
        elif "skipped" in found or found.get("ended") not in (0, None):
            rows.append([part, "", "no time left" if "skipped" in found else f"failed ({found['ended']})", ""])
    return rows


if __name__ == "__main__":
    sys.exit(main())
