"""From the words of a command line to checked runs: what Hydra composes, and what it is not let through with.

Hydra composes, and only composes: the compose API, not `hydra.main`, which would also write multirun.yaml into the
folder it is called from, start the first cell of a sweep before the last is checked, and answer a mistake in several
lines. Every mistake here is one line.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners import CONF
from runners.cells import folder_name, run_name
from runners.config import USED_BY, Config, check, options
from runners.errors import UserError

LAUNCHER = "hydra/launcher"
"""The group of Hydra's launchers; the keys below hydra.launcher are the chosen one's own."""

ConfigStore.instance().store(name="schema", node=Config)


class Cell(NamedTuple):
    """One run of a sweep."""

    overrides: list[str]
    """What it was composed from."""
    config: Config


def session() -> AbstractContextManager[None]:
    """What everything else here must be called in."""
    return cast(AbstractContextManager[None], initialize_config_dir(str(CONF), version_base="1.3"))


def cells(overrides: list[str], *, multirun: bool) -> list[Cell]:
    """Every run the overrides ask for, composed and checked.

    With `multirun`, what an experiment lists under hydra.sweeper.params is swept too, in its order; values that the
    command line gives take the place of those listed.

    Args:
        overrides: key=value and group=option texts.
        multirun: whether a key may have several values.

    Raises:
        UserError: the first mistake found, in one line.
    """
    given = _parse(overrides)
    found = list(_cells(given, multirun=multirun))
    configs = [cell.config for cell in found]
    _refuse_unused(given, configs)
    _refuse_shared_folders(configs)
    return found


def composed(overrides: Iterable[str] = (), *, return_hydra_config: bool = False) -> DictConfig:
    """Compose one run; what Hydra and OmegaConf have against it becomes one line of a UserError."""
    try:
        return compose("config", list(overrides), return_hydra_config=return_hydra_config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_reason(error)) from error


def checked(run: DictConfig) -> Config:
    """A composed run, typed, named and checked; a UserError tells the first mistake."""
    try:
        if OmegaConf.is_missing(run, "run"):
            run.run = run_name(cast(Config, run))
        config = cast(Config, OmegaConf.to_object(run))
    except OmegaConfBaseException as error:
        raise UserError(_reason(error)) from error
    check(config)
    return config


def _cells(given: dict[str, Override], *, multirun: bool) -> Iterator[Cell]:
    given = dict(given)
    experiment = given.pop("experiment", None)
    for chosen in _values(experiment, multirun) if experiment else [""]:
        named = [chosen] if chosen else []
        listed = composed(named, return_hydra_config=True).hydra.sweeper.params if multirun else None
        swept = _parse([f"{key}={value}" for key, value in (listed or {}).items()])
        # The values are the command line's where it has any; their order is the experiment's, which may be of value.
        swept = {key: override for key, override in given.items() if key not in swept} | {
            key: given.get(key, override) for key, override in swept.items()
        }
        for cell in itertools.product(*(_values(override, multirun) for override in swept.values())):
            yield Cell([*named, *cell], checked(composed((*named, *cell))))


def _parse(overrides: list[str]) -> dict[str, Override]:
    """Parse overrides and refuse the keys that no run has; the last one of a key stands."""
    groups, plain = _keys()
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = {}
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException as error:
            raise UserError(f"cannot read {text!r}: write key=value, with quotes around special characters") from error
        key = override.get_key_element()
        if key not in groups and key not in plain and not is_launchers(key):
            raise UserError(f"unknown key {key!r}{hint(key, [*groups, *plain])}; {_allowed(key, groups, plain)}")
        parsed[key] = override
    return parsed


def _keys() -> tuple[list[str], list[str]]:
    """The groups, and the plain values as dotted keys."""
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    schema = OmegaConf.structured(Config)
    plain = [key for key in schema if key not in groups]
    for group in groups:
        if group in schema and OmegaConf.is_dict(schema[group]):
            plain += [f"{group}.{key}" for key in schema[group]]
    return groups, plain


def _values(override: Override, multirun: bool) -> list[str]:
    """The key=value texts an override stands for: one, or in a sweep one for each value."""
    key, text = override.get_key_element(), override.input_line
    if is_launchers(key) and (not multirun or override.is_sweep_override()):
        raise UserError(f"{text} is not allowed: one launcher runs the whole of a sweep, which -m makes")
    if not override.is_sweep_override():
        values = [override.get_value_element_as_str()]
    elif not multirun:
        raise UserError(f"{text} names several values: add -m to run each of them")
    elif not override.is_discrete_sweep():
        raise UserError(f"{text} has no list of values: separate them by commas")
    else:
        try:
            values = list(override.sweep_string_iterator())
        except ValueError as error:
            raise UserError(f"{text}: {error}") from error
        if not values:
            raise UserError(f"{text} names no value at all")
    groups, _ = _keys()
    for value in values if key in groups else ():
        _refuse_unless_option(key, value, options(key))
    if key == LAUNCHER:
        installed = GlobalHydra.instance().config_loader().get_group_options(LAUNCHER)
        _refuse_unless_option(key, values[0], installed, "; joblib and submitit come with the extra blpa[launchers]")
    return [f"{key}={value}" for value in values]


def _refuse_unless_option(group: str, value: str, allowed: list[str], more: str = "") -> None:
    if value not in allowed:
        raise UserError(
            f"{group}={value} is not allowed{hint(value, allowed)}; choose one of {', '.join(allowed)}{more}"
        )


def is_launchers(key: str) -> bool:
    """Whether a key chooses a launcher of Hydra's or sets a value of the chosen one."""
    return key == LAUNCHER or key.startswith("hydra.launcher.")


def _refuse_unused(given: Iterable[str], configs: list[Config]) -> None:
    """Refuse a value that no task of the sweep would look at; an experiment's own may be for others of its tasks."""
    tasks = {config.task.name for config in configs}
    for key in given:
        group, _, value = key.partition(".")
        used_by = USED_BY.get(value) if group == "task" else None
        if used_by and not tasks & set(used_by):
            raise UserError(f"{key} is not for task={', '.join(sorted(tasks))}: it is for {', '.join(used_by)}")


def _refuse_shared_folders(configs: list[Config]) -> None:
    seen: set[str] = set()
    for config in configs:
        folder = folder_name(config)
        if folder in seen:
            raise UserError(
                f"two cells of this sweep would share the folder {folder}: "
                "run them in two sweeps, each with a run= of its own"
            )
        if folder is not None:
            seen.add(folder)


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of a chain of exceptions, led by the key it is about."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if str(key).startswith("dataset.schedule["):
        reason += "; every number in it has a point: [[0.5,0.1],[1.0,0.01]]"
    return f"{key}: {reason}" if key else reason


def hint(wrong: str, right: Iterable[str]) -> str:
    """A few words that name what may have been meant, if anything."""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _allowed(key: str, groups: list[str], plain: list[str]) -> str:
    """What may stand in place of an unknown key: the values of the group it names, or all that stands at the top."""
    group = key.partition(".")[0]
    inside = [name.partition(".")[2] for name in plain if name.startswith(f"{group}.")]
    if inside:
        return f"allowed in {group}: " + ", ".join(inside)
    return "allowed: " + ", ".join([*groups, *(name for name in plain if "." not in name)])
