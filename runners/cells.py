"""A cell of a table: what its run is called, and the command line that repeats it."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners import CONF
from runners.config import MODE_LABELS, USED_BY, Config, options

NOT_DECIDING = {
    "dataset.root", "dataset.download", "dataset.label", "task.checkpoint_every", "task.keep_every",
    *(f"mode.{name}" for name in MODE_LABELS),
}  # fmt: skip
"""Settings that do not affect the result: where a run reads, what it writes on its way, and how tables call it."""


def run_name(config: Config) -> str:
    """The folder of a run, from the values that tell runs apart: table1-cifar10-4bit-depth164-width1-tf32-seed0.

    Args:
        config: the run; its experiment leads the name unless it is `single`, and its precision is in it unless it is
            `auto`.
    """
    prefix = "" if config.experiment == "single" else f"{config.experiment}-"
    network = f"depth{config.depth}-width{config.width:g}"
    precision = "" if config.gpu.precision == "auto" else f"-{config.gpu.precision}"
    return f"{prefix}{config.dataset.name}-{config.mode.name}-{network}{precision}-seed{config.seed}"


def folder_name(config: Config) -> str | None:
    """The folder under results/runs that the task writes, which no two cells of a sweep may share.

    Args:
        config: the run, named.

    Returns:
        The run's name, with what else decides the figure of another task than train; nothing where the task has no
        folder.
    """
    task, gpu = config.task, config.gpu
    card = f"{gpu.memory_gib:g}gib" if gpu.memory_gib else "whole-card"
    batch = f"batch{config.dataset.batch_size}"
    if task.name == "train":
        return config.run
    if task.name == "runtime":
        batch = f"largest-batch-{card}" if task.largest_batch else batch
        return f"{config.run}-runtime-{batch}-{gpu.kernels}"
    if task.name == "kernels":
        return f"{config.run}-kernels-{gpu.kernels}"
    at = f"-{Path(task.checkpoint).stem}" if task.checkpoint else ""
    if task.name == "gradient-error":
        return f"{config.run}-gradient-error-{batch}{at}"
    if task.name == "thresholds":
        return f"{config.run}-thresholds{at}"
    if task.name == "memory":
        return f"{config.run}-memory-{batch}-{gpu.kernels}"
    return f"{config.run}-max-batch-{card}-{gpu.kernels}" if task.name == "max-batch" else None


def recipe_changes(config: Config) -> dict[str, Any]:
    """Recipe and mode settings that differ from their YAML file and have no column of their own in a record.

    Args:
        config: the run. A mode of the user's own name has no file: what differs from the schema's defaults is named.

    Returns:
        By key on the command line: {"dataset.schedule": [[1.0, 0.1]], "mode.clip": 2.0}.
    """
    have_columns = {"dataset.name", "dataset.iterations", "dataset.batch_size", "mode.name"}
    if config.dataset.eval_statistics == "running":
        have_columns.add("dataset.eval_batch_size")  # it decides nothing where statistics are not those of the batch
    return {
        key: value
        for group in ("dataset", "mode")
        for key, value in _changed(config, group, getattr(config, group).name)
        if key not in have_columns
    }


def overrides(config: Config) -> list[str]:
    """The arguments of blpa-run that compose this run again, wherever its data and its results lie.

    Args:
        config: the run, composed.

    Returns:
        experiment=table2 task=max-batch mode=4bit ..., each of which a shell may need quoted.
    """
    given = [f"experiment={config.experiment}"]
    for group in ("task", "dataset", "mode", "gpu"):
        name = getattr(config, group).name
        option = name if name in options(group) else options(group)[0]  # a mode of the user's own is named by mode.name
        given.append(f"{group}={option}")
        given += [f"{key}={_text(value)}" for key, value in _changed(config, group, option, config.experiment)]
    given += [f"{key}={_text(getattr(config, key))}" for key in ("depth", "width", "seed")]
    return given if config.run == run_name(config) else [*given, f"run={_text(config.run)}"]


def _changed(config: Config, group: str, option: str, experiment: str = "single") -> Iterator[tuple[str, Any]]:
    """The values of a group that are not those of the option's file, or of the schema where it has none."""
    values = getattr(config, group)
    schema = OmegaConf.structured(type(values))
    of_option: Any = OmegaConf.load(CONF / group / f"{option}.yaml") if option in options(group) else {}
    of_experiment: Any = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    base: Any = OmegaConf.to_container(OmegaConf.merge(schema, of_option, of_experiment.get(group, {})))
    for value in fields(values):
        key, given = f"{group}.{value.name}", getattr(values, value.name)
        is_used = group != "task" or config.task.name in USED_BY.get(value.name, ())
        if is_used and key not in NOT_DECIDING and given != base[value.name]:
            yield key, given


def _text(value: object) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if re.fullmatch(r"[A-Za-z0-9_./+-]+", value) else f"'{escaped}'"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
