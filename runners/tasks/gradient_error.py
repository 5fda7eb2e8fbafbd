"""Error of a mode's gradient relative to the baseline's, on the same weights and batches, per layer and in total.

    error  = |g - g_exact| / |g_exact|
    cosine = <g, g_exact> / (|g| |g_exact|)

For comparison, the spread of the exact gradient between batches, which training tolerates anyway:

    spread = |g_exact - mean g_exact| / |mean g_exact|

All are over augmented training batches. The task writes results/gradients/<run>.csv, a row per layer, and
results/figures/<run>.png, which task=plots draws again from the file.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from blpa import kernels
from runners import data, provenance, records
from runners.cells import batch_name, check_weights, gpu_changes, table_name, weights_name
from runners.checks import at_least
from runners.config import Config, GpuConfig
from runners.errors import UserError
from runners.files import write_csv
from runners.records import Record
from runners.reporting import figures
from runners.reporting.labels import read_labels
from runners.timing import low_median_high
from runners.training import network, steps, weights

Gradients = dict[str, Tensor]
"""Gradients of the weights with two dimensions or more, by layer name."""


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    steps: int
    """Number of batches to compare."""
    checkpoint: str | None
    """File of the weights, of any mode; null takes freshly initialised weights."""


def check(config: Config) -> None:
    """Check that there is at least one batch, and that a checkpoint has a name."""
    at_least("task.steps", config.task.steps, 1)
    if config.task.checkpoint == "":
        raise UserError("task.checkpoint= is empty: give a file of weights, or null for freshly initialised ones")


def folder(config: Config) -> str:
    """Name the folder by the run, the batch size and the weights."""
    weights = weights_name(config)
    return f"{config.run}-gradient-error-{batch_name(config)}{f'-{weights}' if weights else ''}"


def run(config: Config) -> list[Record]:
    """Compare the configured mode's gradients with the baseline's; record and print a summary.

    Args:
        config: one run, checked; task.steps is the number of batches.

    Returns:
        Error, cosine and spread of the total gradient: medians over batches with 20 and 80 % quantiles.

    Raises:
        UserError: the mode's width differs from the baseline's, the checkpoint is not of this network, was written to
            meanwhile or has no gradients to compare, or the machine or the data do not support the configuration.
    """
    if config.mode.width_factor != 1:
        raise UserError(f"mode={config.mode.name}: its layers and gradients have another width than exact")
    settings = settings_of(config)
    results, run_dir, name = Path(config.results), network.run_folder(config), table_name(config)
    device = network.device(config)
    elements = network.encoded_elements(config, steps=config.task.steps)
    chosen = kernels.choose(config.gpu.kernels, device, elements=elements)
    gpu = network.used(config.gpu, device)
    steps.configure_torch(gpu)
    exact, ours = (network.build(cell, chosen).to(device).train() for cell in (network.exact(config), config))
    if config.task.checkpoint:
        weights.load_weights(exact, Path(config.task.checkpoint))
        check_weights(config, settings["checkpoint"])
    ours.load_state_dict(exact.state_dict())
    recipe = replace(config.dataset, iterations=config.task.steps)
    train = data.load(config.dataset, device).train
    inputs = (steps.to_device(inputs, device) for _, inputs in train.inputs(recipe, seed=config.seed))
    batches = (train.batch(on_device, recipe) for on_device in inputs)
    pairs = [
        (gradients(exact, *batch, gpu), gradients(ours, *batch, gpu))
        for batch in tqdm(batches, "batches", total=config.task.steps)
    ]
    whole = compare([({"all": _joined(of_exact)}, {"all": _joined(of_ours)}) for of_exact, of_ours in pairs])
    if not all(math.isfinite(value) for value in whole[0].values() if isinstance(value, float)):
        raise UserError(
            f"task.checkpoint={config.task.checkpoint}: gradients at these weights are 0 or not finite, and have no "
            "relative error"
        )
    layers = [{"mode": config.mode.name, **row} for row in compare(pairs)]
    write_csv(results / "gradients" / f"{name}.csv", layers)
    source = provenance.source(config, device, chosen.name)
    measured, lines = [], []
    for metric in ("error", "cosine", "spread"):
        low, median, high = (whole[0][f"{metric}_{end}"] for end in ("low", "median", "high"))
        measured.append(
            provenance.record(
                config, source, metric=f"gradient_{metric}", unit="", value=median, low=low, high=high, n=len(pairs),
                iterations=len(pairs), settings=settings,
            )
        )  # fmt: skip
        whose = "exact, between batches" if metric == "spread" else config.mode.name
        lines.append(f"{whose}: {metric} {median:.4g} (20 to 80 %: {low:.4g} to {high:.4g})")
    records.write(measured, run_dir)
    print(*lines, sep="\n")
    print(figures.draw_gradients(results, name, read_labels(config.config_dir)))
    return measured


def settings_of(config: Config) -> dict[str, Any]:
    """Return what decides the result and has no column: the weights, None for freshly initialised ones; determinism."""
    return {"checkpoint": weights_name(config), **gpu_changes(config, "deterministic")}


def gradients(model: nn.Module, images: Tensor, labels: Tensor, gpu: GpuConfig) -> Gradients:
    """Compute the gradients of the mean loss for all convolutions and the classifier, as float64 on the CPU.

    Args:
        model: in training mode.
        images: [N, C, H, W].
        labels: class indices [N].
        gpu: its `precision`.
    """
    model.zero_grad()
    F.cross_entropy(steps.forward(model, images, gpu), labels).backward()
    return {
        name.removesuffix(".weight"): parameter.grad.flatten().double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.grad is not None
    }


def compare(pairs: list[tuple[Gradients, Gradients]]) -> list[dict[str, float | str]]:
    """Compute error, cosine and spread of each layer: medians over batches, with 20 and 80 % quantiles.

    Args:
        pairs: the baseline's gradients and the mode's, one pair per batch.
    """
    rows = []
    for layer in pairs[0][0]:
        exact, ours = (torch.stack([pair[which][layer] for pair in pairs]) for which in (0, 1))
        mean = exact.mean(0)
        row: dict[str, float | str] = {"layer": layer}
        for metric, values in (
            ("error", (ours - exact).norm(dim=1) / exact.norm(dim=1)),
            ("cosine", F.cosine_similarity(ours, exact, dim=1)),
            ("spread", (exact - mean).norm(dim=1) / mean.norm()),
        ):
            names = f"{metric}_low", f"{metric}_median", f"{metric}_high"
            row |= dict(zip(names, low_median_high(values), strict=True))
        rows.append(row)
    return rows


def _joined(layers: Gradients) -> Tensor:
    return torch.cat(list(layers.values()))
