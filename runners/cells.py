"""A cell of a table: the name of its run, and the command line that repeats it."""

import importlib
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.config import MODE_LABELS, Config, GpuConfig, options
from runners.option_files import is_own_option, option
from runners.texts import hydra_text

IGNORED = {
    "dataset.root", "dataset.download", "dataset.label", "task.checkpoint_every", "task.keep_every",
    *(f"mode.{name}" for name in MODE_LABELS),
}  # fmt: skip
"""Settings that do not affect the result: folders, checkpoints, and labels in tables."""


def run_name(config: Config) -> str:
    """Name the folder of a run by the values that distinguish runs: table1-cifar10-4bit-depth164-width1-tf32-seed0.

    Args:
        config: the run; its experiment leads the name unless it is `single`, and its precision is in it unless it is
            `auto`.
    """
    prefix = "" if config.experiment == "single" else f"{config.experiment}-"
    network = f"depth{config.depth}-width{config.width:g}"
    precision = "" if config.gpu.precision == "auto" else f"-{config.gpu.precision}"
    return f"{prefix}{config.dataset.name}-{config.mode.name}-{network}{precision}-seed{config.seed}"


def folder_name(config: Config) -> str | None:
    """Return the folder in results/runs that the task writes; no two cells of a sweep may share it.

    Args:
        config: the run, named.

    Returns:
        The run's name, extended for tasks other than train by what else decides the number; None where the task has no
        folder.
    """
    folder = getattr(task_module(config.task.name), "folder", None)
    return None if folder is None else str(folder(config))


def task_module(name: str) -> Any:
    """Import the module of a task (runners/tasks)."""
    return importlib.import_module(f"runners.tasks.{name.replace('-', '_')}")


def task_settings(name: str, values: Any = None) -> Any:
    """Return the settings of a task, typed.

    Args:
        name: name of the task.
        values: the values of its YAML file, with overrides; None takes the file's own.

    Raises:
        OmegaConfBaseException: a value is of another type, or is missing.
    """
    typed = OmegaConf.create({"task": OmegaConf.structured(task_module(name).Settings)})
    typed.merge_with({"task": option("task", name) if values is None else values})
    return OmegaConf.to_object(typed.task)


def card_name(gpu: GpuConfig) -> str:
    """Name a card by its memory, as a part of a folder's name."""
    return f"{gpu.memory_gib:g}gib" if gpu.memory_gib else "whole-card"


def batch_name(config: Config) -> str:
    """Name the batch size, as a part of a folder's name."""
    return f"batch{config.dataset.batch_size}"


def checkpoint_name(config: Config) -> str:
    """Name the file of weights, as the last part of a folder's name; empty for freshly initialised weights."""
    return f"-{Path(config.task.checkpoint).stem}" if config.task.checkpoint else ""


def recipe_changes(config: Config) -> dict[str, Any]:
    """Return the recipe and mode settings that differ from their YAML file and have no column of a record.

    Args:
        config: the run. A mode without a file is compared with the schema's defaults.

    Returns:
        By key on the command line: {"dataset.schedule": [[1.0, 0.1]], "mode.clip": 2.0}.
    """
    have_columns = {"dataset.name", "dataset.iterations", "dataset.batch_size", "mode.name"}
    if config.dataset.eval_statistics == "running":
        have_columns.add("dataset.eval_batch_size")  # with running statistics it affects nothing
    return {
        key: value
        for group in ("dataset", "mode")
        for key, value in _changed(config, group, getattr(config, group).name)
        if key not in have_columns
    }


def overrides(config: Config) -> list[str]:
    """Return the arguments of blpa-run that compose this run again, without the folders of data and results.

    Args:
        config: the run, composed.

    Returns:
        experiment=table2 task=max-batch mode=4bit ..., not quoted for a shell.
    """
    own = config.config_dir
    given = [f"--config-dir={own}"] if own else []
    given.append(f"experiment={hydra_text(config.experiment)}")
    for group in ("task", "dataset", "mode", "gpu"):
        name, names = getattr(config, group).name, options(group, own)
        base = name if name in names else names[0]  # a mode that has no file is named by mode.name
        given.append(f"{group}={hydra_text(base)}")
        given += [f"{key}={hydra_text(value)}" for key, value in _changed(config, group, base, config.experiment)]
    given += [f"{key}={hydra_text(getattr(config, key))}" for key in ("depth", "width", "seed")]
    return given if config.run == run_name(config) else [*given, f"run={hydra_text(config.run)}"]


def command(config: Config) -> str:
    """Return `overrides` as one line for a shell, as a record holds it."""
    return shlex.join(overrides(config))


def _changed(config: Config, group: str, name: str, experiment: str = "single") -> Iterator[tuple[str, Any]]:
    """List the values of a group that differ from the option's file, or from the schema where there is no file."""
    values = getattr(config, group)
    # An option of the user's own may change: it is spelled out.
    of_option = {} if is_own_option(group, name, config.config_dir) else option(group, name)
    of_experiment = option("experiment", experiment, config.config_dir).get(group, {})
    names = {value.name for value in fields(values)}  # an experiment's values may be for another task
    of_experiment = {name: value for name, value in of_experiment.items() if name in names}
    base: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(type(values)), of_option, of_experiment))
    for value in fields(values):
        key, given = f"{group}.{value.name}", getattr(values, value.name)
        if key not in IGNORED and given != base[value.name]:
            yield key, given
