"""A cell of a table: what its run is called, and the command line that repeats it."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.config import MODE_LABELS, Config, GpuConfig, option, options

IGNORED = {
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
    folder = getattr(task_module(config.task.name), "folder", None)
    return None if folder is None else str(folder(config))


def task_module(name: str) -> Any:
    """The module of a task (runners/tasks)."""
    return importlib.import_module(f"runners.tasks.{name.replace('-', '_')}")


def task_settings(name: str, values: Any = None) -> Any:
    """The settings of a task, typed.

    Args:
        name: of the task.
        values: of its YAML file, with what was changed; None takes the file's own.

    Raises:
        OmegaConfBaseException: a value is of another type, or is missing.
    """
    typed = OmegaConf.create({"task": OmegaConf.structured(task_module(name).Settings)})
    typed.merge_with({"task": option("task", name) if values is None else values})
    return OmegaConf.to_object(typed.task)


def card_name(gpu: GpuConfig) -> str:
    """A card by its memory, as a part of a folder's name."""
    return f"{gpu.memory_gib:g}gib" if gpu.memory_gib else "whole-card"


def batch_name(config: Config) -> str:
    """The batch size as a part of a folder's name."""
    return f"batch{config.dataset.batch_size}"


def checkpoint_name(config: Config) -> str:
    """The file of weights as the last part of a folder's name; nothing for freshly initialised ones."""
    return f"-{Path(config.task.checkpoint).stem}" if config.task.checkpoint else ""


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
    own = config.config_dir
    given = [f"--config-dir={own}"] if own else []
    given.append(f"experiment={config.experiment}")
    for group in ("task", "dataset", "mode", "gpu"):
        name, names = getattr(config, group).name, options(group, own)
        base = name if name in names else names[0]  # a mode that has no file is named by mode.name
        given.append(f"{group}={base}")
        given += [f"{key}={_text(value)}" for key, value in _changed(config, group, base, config.experiment)]
    given += [f"{key}={_text(getattr(config, key))}" for key in ("depth", "width", "seed")]
    return given if config.run == run_name(config) else [*given, f"run={_text(config.run)}"]


def _changed(config: Config, group: str, name: str, experiment: str = "single") -> Iterator[tuple[str, Any]]:
    """The values of a group that are not those of the option's file, or of the schema where it has none."""
    values = getattr(config, group)
    of_option = option(group, name, config.config_dir)
    of_experiment = option("experiment", experiment, config.config_dir).get(group, {})
    names = {value.name for value in fields(values)}  # an experiment's values may be for another task
    of_experiment = {name: value for name, value in of_experiment.items() if name in names}
    base: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(type(values)), of_option, of_experiment))
    for value in fields(values):
        key, given = f"{group}.{value.name}", getattr(values, value.name)
        if key not in IGNORED and given != base[value.name]:
            yield key, given


def _text(value: object) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if re.fullmatch(r"[A-Za-z0-9_./+-]+", value) else f"'{escaped}'"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
