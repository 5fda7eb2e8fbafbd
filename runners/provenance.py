"""The records that a run makes: what was measured, in which configuration, on which machine, by which commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from runners import records
from runners.cells import departures, folder_name, overrides
from runners.config import Config
from runners.records import Record
from runners.training import network


def provenance(device: "torch.device") -> dict[str, Any]:
    """The fields of a record that tell where, by what and when it was made.

    Args:
        device: what the run computed on.

    Returns:
        device, torch, triton, cuda, commit, is_dirty and date, by name.
    """
    on_cuda = device.type == "cuda"
    threads = torch.get_num_threads()  # on a CPU the order of summation, and so the last bits, depend on them
    cpu = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    commit, is_dirty = _commit(Path(__file__).parent.parent)
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "none" if device.type == "meta" else cpu,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda if on_cuda else None,
        "commit": commit,
        "is_dirty": is_dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def merge_provenance(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By what a number was made that took several processes, on several machines perhaps.

    Args:
        parts: what `provenance` returned in each of them; dates do not matter.

    Returns:
        Its fields but the date: every value once, in the order of the first time, separated by "; ".
    """
    texts = ("device", "torch", "triton", "cuda", "commit")
    values = {name: [part[name] for part in parts if part[name] is not None] for name in texts}
    joined = {name: "; ".join(dict.fromkeys(found)) or None for name, found in values.items()}
    return {**joined, "is_dirty": any(part["is_dirty"] for part in parts) or parts[-1]["is_dirty"]}


def kernels_used(config: Config, back_end: str) -> str:
    """The back end as a record names it: layers that are not ours have none."""
    return back_end if config.mode.layers == "coded" else "stock"


def source(config: Config, device: torch.device, back_end: str) -> dict[str, Any]:
    """The fields of a record that tell by what it was made.

    Args:
        config: the run, as it was composed.
        device: what it really computed on.
        back_end: name of the one that was really used.
    """
    return provenance(device) | {
        "kernels": kernels_used(config, back_end),
        "precision": network.precision(config.gpu, device),
        "command": command(config),
    }


def command(config: Config) -> str:
    """What a record names as the command that made it."""
    return records.as_text(overrides(config))


def record(config: Config, source: dict[str, Any], **measured: Any) -> Record:
    """One measured number.

    Args:
        config: the run.
        source: what `source` returns.
        measured: the fields that neither of them tells (metric, unit, value, low, high, n, iterations), and those that
            are otherwise than they tell.
    """
    told = {
        "experiment": config.experiment,
        "task": config.task.name,
        "dataset": config.dataset.name,
        "mode": config.mode.name,
        "bits": config.mode.bits,
        "depth": config.depth,
        "width": config.width,
        "seed": config.seed,
        "batch_size": config.dataset.batch_size,
        "predicted": False,
        "paper_value": None,
        "note": note(config),
    }
    return Record(**(told | source | measured))


def note(config: Config, *, task: str | None = None) -> str:
    """What a reader of a record must know that no other column tells.

    Args:
        config: the run.
        task: what measures; None is the configured one.
    """
    largest = getattr(config.task, "largest_batch", False)
    gpu, at = config.gpu, getattr(config.task, "checkpoint", None)
    card = f"{gpu.memory_gib:g} GiB less {gpu.allowance_mib} MiB" if gpu.memory_gib else "the whole card"
    kernels = f"gpu.kernels={gpu.kernels}" if gpu.kernels != "auto" and config.mode.layers == "coded" else ""
    graph = "" if gpu.cuda_graph is None else f"gpu.cuda_graph={gpu.cuda_graph}".lower()
    convolutions = "" if gpu.deterministic else "gpu.deterministic=false"
    seed = f"seed={config.seed}" if config.seed else ""
    particular = {
        "max-batch": [card, graph],
        "runtime": [f"largest batch in {card}" if largest else "", kernels, graph, convolutions],
        "gradient-error": [f"at {Path(at).stem}" if at else "at initialisation", seed],
        "thresholds": [f"at {Path(at).stem}" if at else ""],
    }
    return " ".join(filter(None, [*particular.get(task or config.task.name, []), departures(config)]))


def record_failure(config: Config, reason: str, seconds: float) -> None:
    """Leave a record of a cell that failed.

    Args:
        config: the run.
        reason: one line.
        seconds: how long it ran.
    """
    iterations = config.dataset.iterations if config.task.name == "train" else 0
    on = torch.device("cuda" if config.gpu.device != "cpu" and torch.cuda.is_available() else "cpu")
    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    told = source(config, on, config.gpu.kernels)
    if on.type == "cuda":
        config = network.on_card(config, torch.cuda.get_device_properties(on).total_memory)
    failed = record(
        config, told, metric="failed", unit="s", value=seconds, low=seconds,
        high=seconds, n=1, iterations=iterations, failure=reason,
    )  # fmt: skip
    records.write_failure(failed, run_dir)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's own name: Linux keeps it in a file, elsewhere the platform may know it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


SOURCES = ("blpa", "runners", "conf")
"""The folders of a checkout that decide a number."""


def _commit(checkout: Path) -> tuple[str | None, bool | None]:
    """The commit that holds SOURCES and whether they differ from it; None, None where no checkout tracks them.

    An installed package inside somebody else's checkout is not tracked there: their commit says nothing about it.
    """
    tracked = _git(checkout, "ls-files", "--", *(f"{folder}/*" for folder in SOURCES)) or ""
    if {path.partition("/")[0] for path in tracked.splitlines()} != set(SOURCES):
        return None, None
    commit = _git(checkout, "rev-parse", "HEAD")
    if not commit:
        return None, None
    return commit, bool(_git(checkout, "status", "--porcelain", "--", *SOURCES))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where git is absent or refuses."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
