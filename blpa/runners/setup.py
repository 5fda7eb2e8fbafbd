"""What the tasks that run a network share: the folder, the device, the model, the record."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from blpa import modes
from blpa.config import Config, departures
from blpa.kernels import Kernels
from blpa.models.preact_resnet import PreActResNet
from blpa.records import Record


def refuse_unwritable(run_dir: Path) -> None:
    """Make the run's folder, and raise a ValueError if nothing can be written there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {run_dir} ({error.strerror}): name another folder, results=") from error


def device(name: str) -> torch.device:
    """The device that gpu.device names; a ValueError if it is cuda and there is none."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("gpu.device=cuda: torch finds no CUDA device on this machine; choose auto or cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def model(config: Config, kernels: Kernels) -> PreActResNet:
    """The configured network, its weights drawn from the seed, on the CPU."""
    torch.manual_seed(config.seed)
    return PreActResNet(
        config.depth,
        mode=modes.from_config(config.mode, kernels),
        classes=config.dataset.classes,
        image_channels=config.dataset.image_channels,
        width=config.width,
    )


def record(config: Config, source: dict[str, Any], **measured: Any) -> Record:
    """One measured number.

    Args:
        config: the run, with the back end that was really used in `gpu.kernels`.
        source: what records.provenance returns.
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
        "precision": config.gpu.precision,
        "kernels": config.gpu.kernels if config.mode.layers == "coded" else "stock",
        "predicted": False,
        "paper_value": None,
        "note": departures(config),
    }
    return Record(**(told | source | measured))


def budget_note(config: Config) -> str:
    """The memory budget, for a record's note, with what else a reader must know."""
    budget = f"{config.gpu.memory_gib:g} GiB less {config.gpu.allowance_mib} MiB"
    return " ".join(filter(None, [budget, departures(config)]))
