"""Make the records of a run: the number, its configuration, its machine and its commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from runners import records
from runners.cells import command, folder_name, recipe_changes, task_module
from runners.config import Config
from runners.records import Record, Settings
from runners.training import network


def provenance(device: torch.device) -> dict[str, Any]:
    """Describe this machine, its versions and the time, as fields of a record.

    Args:
        device: the device that the run computed on.

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
    """Combine the provenance of a run trained in several processes, perhaps on several machines.

    Args:
        parts: the fields that `provenance` returned in each process; dates do not matter.

    Returns:
        The same fields without the date: each value once, in the order of first appearance, separated by "; ".
    """
    texts = ("device", "torch", "triton", "cuda", "commit")
    values = {name: [part[name] for part in parts if part[name] is not None] for name in texts}
    joined = {name: "; ".join(dict.fromkeys(found)) or None for name, found in values.items()}
    return {**joined, "is_dirty": any(part["is_dirty"] for part in parts) or parts[-1]["is_dirty"]}


def kernels_used(config: Config, backend: str) -> str:
    """Return the backend as a record names it: stock where the mode's layers are not ours."""
    return backend if config.mode.layers == "coded" else "stock"


def source(config: Config, device: torch.device, backend: str) -> dict[str, Any]:
    """Describe how a run was made, as fields of a record: `provenance`, kernels, precision and command.

    Args:
        config: the run, as it was composed.
        device: the device that it computed on.
        backend: name of the backend that it used.
    """
    return provenance(device) | {
        "kernels": kernels_used(config, backend),
        "precision": network.precision(config.gpu, device),
        "command": command(config),
    }


def all_settings(config: Config, of_task: Settings) -> dict[str, Any]:
    """Return the settings of a record: those of its task, and what differs from the YAML files of recipe and mode."""
    return {**of_task, **recipe_changes(config)}


def record(config: Config, source: dict[str, Any], *, settings: Settings | None = None, **measured: Any) -> Record:
    """Make the record of one measured number.

    Args:
        config: the run.
        source: the fields that `source` returns.
        settings: the task's own settings that decide the number and have no column, if any.
        measured: the other fields (metric, unit, value, low, high, n, iterations), and those that differ from `config`
            and `source`.
    """
    configured = {
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
        "settings": all_settings(config, settings or {}),
    }
    return Record(**(configured | source | measured))


def record_failure(config: Config, reason: str, seconds: float) -> None:
    """Write the record of a cell that failed.

    Args:
        config: the run.
        reason: for people; what a file of text cannot hold is left out.
        seconds: how long it ran.
    """
    iterations = config.dataset.iterations if config.task.name == "train" else 0
    device = torch.device("cuda" if config.gpu.device != "cpu" and torch.cuda.is_available() else "cpu")
    run_dir = Path(config.results) / "runs" / str(folder_name(config))
    made_by = source(config, device, config.gpu.kernels)
    if device.type == "cuda":
        config = network.on_card(config, torch.cuda.get_device_properties(device).total_memory)
    settings_of = getattr(task_module(config.task.name), "settings_of", None)
    printable = "".join(letter if letter.isprintable() else " " for letter in reason)
    failure = " ".join(printable.split()) or "unknown"
    failed = record(
        config, made_by, settings=settings_of(config) if settings_of else None, metric="failed", unit="s",
        value=seconds, low=seconds, high=seconds, n=1, iterations=iterations, failure=failure,
    )  # fmt: skip
    records.write_failure(failed, run_dir)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Return the processor's name: from /proc/cpuinfo on Linux, elsewhere from the platform module."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


SOURCES = ("blpa", "runners", "conf")
"""Folders of a checkout whose content affects results."""


def _commit(checkout: Path) -> tuple[str | None, bool | None]:
    """Return the commit of SOURCES and whether they differ from it; None, None where no checkout tracks them.

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
    """Return git's output, or None where git is absent or fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
