"""A cell of a table: the name of its run, what decides its numbers, and the command line that repeats it."""

import hashlib
import importlib
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.config import MODE_LABELS, PUBLISHED, Config, GpuConfig, options
from runners.errors import UserError
from runners.option_files import is_own_option, option
from runners.records import canonical
from runners.texts import hydra_text
from runners.training import signals

IGNORED = {
    "dataset.root", "dataset.download", "dataset.label", "dataset.train_images", "dataset.workers",
    "task.checkpoint_every", "task.keep_every", "gpu.restarts", "gpu.timeout_minutes",
    *(f"mode.{name}" for name in MODE_LABELS),
}  # fmt: skip
"""Settings that do not affect the result: folders, worker processes, checkpoints, restarts, and labels in tables."""

PROCESSES = ("processes", "sync_batch_norm", "from_other_processes")
"""Settings of the GPU group for several processes that train together."""


def run_name(config: Config) -> str:
    """Name the folder of a run by the values that distinguish runs: table1-cifar10-4bit-depth164-width1-tf32-seed0.

    Args:
        config: the run; its experiment leads the name unless it is `single`; the data's version, the precision and
            the number of processes are in it unless they are `published`, `auto` and 1.
    """
    prefix = "" if config.experiment == "single" else f"{config.experiment}-"
    network = f"depth{config.depth}-width{config.width:g}"
    precision = "" if config.gpu.precision == "auto" else f"-{config.gpu.precision}"
    version = "" if config.dataset.version == PUBLISHED else f"-{config.dataset.version}"
    processes = "" if config.gpu.processes == 1 else f"-processes{config.gpu.processes}"
    processes += "-sync" if config.gpu.sync_batch_norm else ""
    where = f"{precision}{processes}"
    return f"{prefix}{config.dataset.name}{version}-{config.mode.name}-{network}{where}-seed{config.seed}"


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


def table_name(config: Config) -> str:
    """Name the table and the figure of a measurement in results: its folder, and digits of a recipe of its own."""
    changes = recipe_changes(config)
    digits = hashlib.sha256(canonical(changes).encode()).hexdigest()[:8]
    return f"{folder_name(config)}-recipe-{digits}" if changes else str(folder_name(config))


def task_module(name: str) -> Any:
    """Import the module of a task (runners/tasks), torch with it; a signal waits for the end of the import."""
    module = f"runners.tasks.{name.replace('-', '_')}"
    if module in sys.modules:
        return sys.modules[module]
    with signals.deferred() as stop:  # C extensions turn a KeyboardInterrupt into errors of their own
        imported = importlib.import_module(module)
    if stop.received is not None:
        signal.raise_signal(stop.received)
    return imported


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


def weights_name(config: Config) -> str | None:
    """Name the weights of task.checkpoint by the file's name and content: last-1a2b3c4d.

    A run's own checkpoint has digits of its content in its name already, and gets no more. A file that cannot be read
    has the name alone: the task says what is wrong with it.

    Returns:
        The name; None for freshly initialised weights.
    """
    if not config.task.checkpoint:
        return None
    file = Path(config.task.checkpoint)
    if not file.is_file():  # opening a pipe would wait for a writer
        return file.stem
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:  # as above
        return file.stem
    return file.stem if file.stem.endswith(digest[:16]) else f"{file.stem}-{digest[:8]}"


def check_weights(config: Config, name: str | None) -> None:
    """Check, after the weights were read, that they are those that were named.

    Raises:
        UserError: the file was written to in the meantime.
    """
    if weights_name(config) != name:
        raise UserError(f"task.checkpoint={config.task.checkpoint} was written to while it was read: run it again")


def gpu_changes(config: Config, *names: str) -> dict[str, Any]:
    """Return the values of the GPU group, of those named, that differ from the default, by key on the command line."""
    values = {name: getattr(config.gpu, name) for name in names}
    return {f"gpu.{name}": value for name, value in values.items() if value != getattr(GpuConfig, name)}


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
    own = config.config_dir
    of_option = {} if is_own_option(group, name, own) else option(group, name)
    whole = {} if is_own_option("experiment", experiment, own) else option("experiment", experiment, own)
    names = {value.name for value in fields(values)}  # an experiment's values may be for another task
    of_experiment = {name: value for name, value in whole.get(group, {}).items() if name in names}
    base: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(type(values)), of_option, of_experiment))
    for value in fields(values):
        key, given = f"{group}.{value.name}", getattr(values, value.name)
        if key not in IGNORED and given != base[value.name]:
            yield key, given
