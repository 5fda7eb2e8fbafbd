"""What another network saves and needs, as PyTorch runs it and converted to the mode's bits: blpa.explain as a task.

It is counted on the meta device, so any network and batch takes seconds on any machine.
"""

from dataclasses import dataclass
from typing import Any

import torch

import blpa
from blpa.memory import MIB
from runners import provenance, records
from runners.cells import batch_name
from runners.config import Config
from runners.errors import UserError
from runners.records import Record
from runners.training import models, network
from runners.training.network import META


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    model: str
    """One of torchvision's classifiers, or unet."""
    image_size: int
    """Height and width of the images in pixels."""


NEEDS_NO_GPU = True


def check(config: Config) -> None:
    """Check the network and the precision."""
    models.check(config)
    if config.gpu.precision not in ("auto", "fp32", "tf32"):
        raise UserError(f"gpu.precision={config.gpu.precision}: task=explain counts fp32; set gpu.precision=fp32")


def folder(config: Config) -> str:
    """Name the folder by the run, the network, the images and the batch size."""
    return f"{config.run}-explain-{config.task.model}-{config.task.image_size}-{batch_name(config)}"


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the numbers and have no column."""
    return {"model": config.task.model, "image_size": config.task.image_size}


def run(config: Config) -> list[Record]:
    """Explain the network, record what is saved and the peak of a step, and print the table.

    Args:
        config: one run, checked; dataset.batch_size is the batch.

    Returns:
        Saved bytes and peak of each, in MiB per sample, marked as predicted.

    Raises:
        UserError: there is no such network, or its images must be larger.
    """
    batch, size = config.dataset.batch_size, config.task.image_size
    shape = torch.Size((batch, 3, size, size))
    model = models.build(config.task.model, shape)
    explanation = blpa.explain(model, torch.empty(shape, device=META), bits=models.codec(config.mode))
    source = provenance.source(config, META, "torch")
    measured = [
        provenance.record(
            config, source | {"kernels": kernels}, mode=mode, bits=bits, metric=metric, unit="MiB/sample", value=value,
            low=value, high=value, n=1, iterations=1, predicted=True, seed=0, depth=0, settings=settings_of(config),
        )
        for mode, bits, kernels, counted in (
            ("exact", None, "stock", explanation.stock),
            (config.mode.name, config.mode.bits, "torch", explanation.coded),
        )
        for metric, nbytes in (("saved_mib", counted.saved), ("step_peak_mib", counted.peak))
        for value in [nbytes / batch / MIB]
    ]  # fmt: skip
    records.write(measured, network.run_folder(config))
    print(explanation)
    return measured
