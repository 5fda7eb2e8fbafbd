"""Compose and check the runs that a command line asks for.

Hydra's classes parse, compose and split sweeps, without hydra.main: so all cells are checked before the first one runs,
a mistake becomes one line, and a launcher gets only unfinished cells.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, cast

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from runners import CONF, processes
from runners.cells import folder_name, run_name, task_module, task_settings
from runners.checks import check, one_of
from runners.config import Config, options
from runners.errors import UserError, allowed, hint
from runners.option_files import read
from runners.texts import GROUPS, quoted

HYDRA_KEYS = ("hydra.launcher.", "hydra.sweep.")
"""Prefixes of Hydra's own keys that have an effect here, besides the group hydra/launcher."""

ConfigStore.instance().store(name="schema", node=Config)


class OptionFiles(FileConfigSource):
    """A folder of options, whose files are read by option_files.read in place of Hydra's own reader."""

    @staticmethod
    def scheme() -> str:
        """Return how paths of such folders begin."""
        return "options"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file."""
        folder, _, _ = config_path.rpartition("/")
        values, package = read(self._file(config_path), folder.partition("/")[0] or None)
        return ConfigResult(config=values, path=self.full_path(), provider=self.provider, header={"package": package})

    def is_config(self, config_path: str) -> bool:
        """Return whether there is such a file, or what should be one."""
        return self._file(config_path).exists()

    def _file(self, config_path: str) -> Path:
        return Path(self.path) / self._normalize_file_name(config_path)


SourcesRegistry.instance().register(OptionFiles)


class Cell(NamedTuple):
    """One run of a sweep."""

    overrides: list[str]
    """The overrides that it was composed from."""
    config: Config


@contextmanager
def session(config_dir: str | None = None) -> Iterator[Hydra]:
    """Make the context in which the other functions of this file must be called.

    Args:
        config_dir: folder of the user's own options, which take precedence over those of conf. It may also hold the
            modules that its data sets name as readers.

    Raises:
        UserError: there is no such folder.
    """
    path = create_config_search_path(f"options://{CONF}")
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not (config_dir and folder.is_dir()):
            raise UserError(f"--config-dir={config_dir}: there is no such folder")
        for place in (folder, *(folder / group for group in GROUPS)):
            if place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
                raise UserError(f"--config-dir={config_dir}: {place} cannot be read")
        path.prepend("command-line", f"options://{folder}", anchor=SearchPathQuery(provider="main"))
    try:
        yield Hydra.create_main_hydra2("blpa-run", path)
    finally:
        GlobalHydra.instance().clear()


def runs(overrides: list[str], *, multirun: bool) -> list[tuple[list[str], DictConfig]]:
    """Compose runs as `cells` does, without the checks of a task's settings, which import torch."""
    found = [(texts, composed(texts)) for texts in _split(overrides, multirun=multirun)]
    for _, run in found:
        _check(run)
    return found


def cells(overrides: list[str], *, multirun: bool) -> list[Cell]:
    """Compose and check every run that the overrides describe.

    With `multirun`, the values in an experiment's hydra.sweeper.params are swept too, in its order. Values on the
    command line replace those of the experiment.

    Args:
        overrides: texts key=value and group=option.
        multirun: whether a key may have several values.

    Raises:
        UserError: the first mistake found, in one line.
    """
    found = [Cell(texts, _typed(run)) for texts, run in runs(overrides, multirun=multirun)]
    folders = [folder for cell in found if (folder := folder_name(cell.config)) is not None]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(
                f"two cells of this sweep would share the folder {folder}: "
                "run them in two sweeps, each with a run= of its own"
            )
    return found


def composed(overrides: Iterable[str] = (), *, return_hydra_config: bool = False) -> DictConfig:
    """Compose one run; an error of Hydra or OmegaConf becomes a UserError of one line."""
    with one_line():
        return compose("config", [quoted(text) for text in overrides], return_hydra_config=return_hydra_config)


@contextmanager
def one_line() -> Iterator[None]:
    """Make a UserError of one line of an error of Hydra or OmegaConf."""
    try:
        yield
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("the defaults of an option lead back to it") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_reason(error)) from error


def checked(run: DictConfig) -> Config:
    """Name, type and check a composed run; raise a UserError for the first mistake."""
    _check(run)
    return _typed(run)


def _check(run: DictConfig) -> None:
    """Name a run, and check all but the settings of its task, which import torch."""
    names = {field.name for field in fields(Config)}
    if extra := sorted(str(key) for key in run if key not in names):
        raise UserError(f"unknown key {extra[0]!r}{allowed(extra[0], names)}")
    try:
        one_of("task.name", run.task.get("name", "???"), options("task"))
        run.gpu.processes = processes.number(run.gpu.processes)
        if OmegaConf.is_missing(run, "run"):
            run.run = run_name(cast(Config, run))
        check(cast(Config, OmegaConf.to_object(run)))
    except OmegaConfBaseException as error:
        raise UserError(_reason(error)) from error


def _typed(run: DictConfig) -> Config:
    if run.config_dir and run.config_dir not in sys.path:  # readers of data sets lie there
        sys.path.append(run.config_dir)
    config = cast(Config, OmegaConf.to_object(run))
    try:
        config.task = task_settings(run.task.name, run.task)
    except OmegaConfBaseException as error:
        raise UserError(_reason(error)) from error
    if task_check := getattr(task_module(config.task.name), "check", None):
        task_check(config)
    return config


def _split(overrides: list[str], *, multirun: bool) -> Iterator[list[str]]:
    """Split overrides into those of each cell."""
    parsed = _parse(overrides)
    given = {override.get_key_element(): override for override in parsed}
    if not multirun:
        if launcher := next((text for key, text in given.items() if is_launchers(key)), None):
            raise UserError(f"{launcher.input_line} is not allowed: a launcher runs a sweep, which -m makes")
        for text, override in zip(overrides, parsed, strict=True):
            if override.is_sweep_override():
                raise UserError(f"{text} names several values: add -m to run each of them")
        yield [str(override.input_line) for override in given.values()]
        return
    for (experiment,) in _product([given.pop("experiment")]) if "experiment" in given else [("",)]:
        named = [experiment] if experiment else []
        listed = composed(named, return_hydra_config=True).hydra.sweeper.params or {}
        swept = {override.get_key_element(): override for override in _parse([f"{k}={v}" for k, v in listed.items()])}
        if given.keys() & {"depth", "width"} and "network" not in given:
            swept.pop("network", None)  # a network sets depth and width
        # Values of the command line replace the experiment's; the order of the keys stays the experiment's.
        others = [override for key, override in given.items() if key not in swept]
        for texts in _product([*others, *(given.get(key, override) for key, override in swept.items())]):
            yield [*named, *texts]


def is_launchers(key: str) -> bool:
    """Return whether a key chooses one of Hydra's launchers or sets a value of it."""
    return key.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher."))


def _parse(overrides: list[str]) -> list[Override]:
    """Parse overrides one by one, so that an error names the override at fault."""
    loader = GlobalHydra.instance().config_loader()
    parser, groups = OverridesParser.create(loader), loader.list_groups("")
    parsed = []
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([quoted(text)])
            if not (key := override.get_key_element()):
                raise OverrideParseException(text, "no key")
        except OverrideParseException as error:
            raise UserError(f"cannot read {text!r}: write key=value, with quotes around special characters") from error
        if key in groups and not override.is_sweep_override() and not isinstance(override.value(), str | list):
            name, names = override.get_value_element_as_str(), loader.get_group_options(key)
            raise UserError(f"{key}={name} is not allowed{hint(name, names)}; choose one of {', '.join(names)}")
        plain = key.lstrip("+~")
        if plain.startswith("hydra.") and not plain.startswith(HYDRA_KEYS):
            raise UserError(f"{text} is not allowed: of Hydra's own keys blpa-run heeds {', '.join(HYDRA_KEYS)}")
        parsed.append(override)
    return parsed


def _product(overrides: list[Override]) -> list[list[str]]:
    """List every combination of the values of the overrides."""
    for override in filter(Override.is_sweep_override, overrides):
        if is_launchers(override.get_key_element()):
            raise UserError(f"{override.input_line} is not allowed: one launcher runs the whole of a sweep")
        try:
            (values,) = BasicSweeper.split_arguments([override], None)
        except (HydraException, ValueError) as error:
            raise UserError(f"{override.input_line}: {_reason(error)}") from error
        if not values:
            raise UserError(f"{override.input_line} names no value at all")
    (combinations,) = BasicSweeper.split_arguments(overrides, None)
    return [[quoted(text) for text in texts] for texts in combinations]


def _reason(error: BaseException) -> str:
    """Write the root cause in one line: its key, the message, and a suggestion."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    key = str(getattr(error, "full_key", None) or "")
    if composing := re.match(r"In '(.*)': \w+ raised while composing config:$", lines[0]):
        key = next((line.split()[1] for line in lines[2:] if re.match(r"\s*full_key: \S", line)), "")
        return f"{composing[1]}.yaml: {f'{key}: ' if key else ''}{' '.join(lines[1:2])}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = GlobalHydra.instance().config_loader().get_group_options(group)
        inside = re.match("In '(.*)': ", lines[0])
        if inside and inside[1] not in ("config", "hydra/config"):  # whose choices the command line made
            missing = f"{error.missing_cfg_file}.yaml, which is not there{hint(name, options)}"
            return f"the defaults of {inside[1]}.yaml name {missing}"
        more = "; joblib and submitit come with the extra blpa[launchers]" if group == "hydra/launcher" else ""
        return f"{group}={name} is not allowed{hint(name, options)}; choose one of {', '.join(options)}{more}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: Missing mandatory value, which neither an option's file nor the command line gives"
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(error.parent_node, DictConfig):
        return f"unknown key {key!r}{allowed(key, map(str, error.parent_node))}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, with quotes around special characters"
    if lines[0].startswith("Ambiguous value for argument"):
        return f"{lines[0].partition(chr(39))[2][:-1]} names several values: add -m to run each of them"
    if lines[0].startswith("Sweep parameters"):
        return f"{lines[0]}: add -m"
    if key.startswith("dataset.schedule["):
        lines[0] += "; every number in it has a point: [[0.5,0.1],[1.0,0.01]]"
    if lines[0].endswith(":"):
        return " ".join(line.strip() for line in lines)
    return f"{key}: {lines[0]}" if key else lines[0]
