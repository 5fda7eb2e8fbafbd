"""Check the CUDA path, and measure times and largest batches, in four minutes on a GPU: make gpu-check.

    python -m runners.gpu_check [--seconds 240] [--out FOLDER] [--dry-run]

The check is made for a time-limited machine and needs no data and no network. Its parts (parts.py) run in the order of
their value, each in its own process under its own time limit, so a part that fails or hangs does not affect the others.
OUT/results.jsonl has a line per result, on disk at once. OUT/PART.log has the output of a part, and OUT/runs the
records of timed steps. At the end a table shows predicted beside measured values.

The exit code is 1 if a kernel is wrong, if a captured step differs from one that is launched kernel by kernel, or if
either could not be checked. Without a GPU, --dry-run runs all of it at small size on the CPU, without torch.compile.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from runners import fresh, printing
from runners.gpu_check.parts import AHEAD, PARTS, Check, Part
from runners.reporting.pages import aligned
from runners.training import signals

MODEL_MS = {
    ("tf32", "exact"): 14.3, ("tf32", "compiled"): 12.2, ("tf32", "4bit"): 10.9,
    ("bf16", "exact"): 11.1, ("bf16", "compiled"): 8.1, ("bf16", "4bit"): 8.05,
    ("fp32", "exact"): 21.0, ("fp32", "compiled"): 19.0,
}  # fmt: skip
"""Milliseconds of a step at depth 164, batch 128, on an H100 by the model of results/LOG.md (2026-11-26), +-30 %."""


@printing.tolerant()
def main(arguments: list[str] | None = None) -> int:
    """Run the parts that fit into the time, and print the table.

    Args:
        arguments: the command line after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 1 where a part that decides is wrong or was not run.
    """
    parser = argparse.ArgumentParser(prog="python -m runners.gpu_check", description=str(__doc__).split("\n")[0])
    parser.add_argument("--seconds", type=float, default=240, help="time for all parts (default 240)")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for results (default gpu-out)")
    parser.add_argument("--dry-run", action="store_true", help="run it at small size on the CPU")
    given = parser.parse_args(arguments)
    if not (given.dry_run or torch.cuda.is_available()):
        print("gpu-check: torch finds no CUDA GPU here; --dry-run tries it in small on the CPU", file=sys.stderr)
        return 1
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "results.jsonl").unlink(missing_ok=True)
    except OSError as error:
        print(f"gpu-check: --out {given.out}: {error.strerror}", file=sys.stderr)
        return 1
    is_right = run_all(given.out.absolute(), given.seconds, is_dry=given.dry_run)
    if given.dry_run:
        print("Dry run at small size on the CPU: the numbers are not those of a GPU.\n")
    print(aligned(table(_results(given.out))), end="")
    return 0 if is_right else 1


def run_all(out: Path, seconds: float, *, is_dry: bool, parts: tuple[Part, ...] = PARTS) -> bool:
    """Run one part after the other.

    Args:
        out: folder for results.
        seconds: time for all parts.
        is_dry: as in Check.
        parts: the parts, in order.

    Returns:
        Whether all parts that decide succeeded.
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
            if not part.decides and ahead and ahead.is_alive():  # nothing else may run beside timed parts
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


@printing.tolerant()
def _in_its_process(part: Part, check: Check) -> None:
    """Run a part with its output in its log; the exit code is 0 if it returns true."""
    os.setsid()  # its child processes end with it; probes end by themselves after it
    signals.end_with_the_parent()
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
    """Wait for a part, kill it and its children at its time limit, and return its exit code, or a note."""
    process.join(max(0.0, seconds))
    if not process.is_alive():
        return process.exitcode or 0
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # the part's own process group
    process.kill()  # if it has not made one yet
    process.join()
    return f"ended after {seconds:.0f} s"


def _results(out: Path) -> Iterator[dict[str, Any]]:
    with (out / "results.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def table(results: Iterator[dict[str, Any]]) -> list[list[str]]:
    """Lay out the results, predicted beside measured; the head first.

    Args:
        results: the lines of results.jsonl.
    """
    rows = [["", "predicted", "measured", "times exact"]]
    for found in results:
        part = found["part"]
        if "correct" in found:
            outcome = "right" if found["correct"] else f"WRONG: {found['wrong'][0]}"
            of = "" if part == "kernels" else " of converted networks"
            rows.append([f"kernels{of}, {found['codec']}", "right", outcome, ""])
        elif "same_bits" in found:
            name = f"captured steps, {found['mode']}, {found['precision']}"
            rows.append([name, "the same bits", "the same bits" if found["same_bits"] else "OTHER BITS", ""])
        elif "model" in found:
            name = f"{found['precision']}, {found['model']}, {found['mode']}, {found['launch']}"
            ratio = f"{found['times_exact']:.2f}" if found["times_exact"] else ""
            rows.append([name, "", f"{found['ms']:.1f} ms", ratio])
        elif "busy_ms" in found:
            name = f"{found['precision']}, {found['mode']}: GPU busy"
            rows.append([name, "", f"{found['busy_ms']:.1f} ms, {found['launches']} launches", ""])
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
            name = f"batch in 11 GiB, depth {found['depth']}, {found['mode']}, {found['segments']} segments"
            rows.append([name, str(found["predicted"]), f"{found['batch']} fits", ""])
        elif "copy_tb_per_s" in found:
            rows.append(["copy", "", f"{found['copy_tb_per_s']} TB/s", ""])
        elif "skipped" in found or found.get("ended") not in (0, None):
            rows.append([part, "", "no time left" if "skipped" in found else f"failed ({found['ended']})", ""])
    return rows
