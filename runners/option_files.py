"""Read the files of options: a mode, a data set, an experiment, of the package or of a user's own.

The keys of a file are those of the command line, so a file is checked where it is read, against the same schema
(config.py): an unknown key or a value of the wrong type is refused with its place in the file.
"""

import ast
import copy
import functools
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners import yaml_files
from runners.config import Config, DatasetConfig, GpuConfig, ModeConfig, folders
from runners.errors import UserError, first_line

PATHS = ("results", "dataset.root", "task.checkpoint")
"""Keys that name a file or folder: ~ and ~user at the beginning stand for a home, as in a shell."""
OPTIONAL = ("dataset.label", "mode.label")
"""Keys of a text that may be left out."""


def option(group: str, name: str, config_dir: str | None = None, *, inside: tuple[str, ...] = ()) -> Any:
    """Read the file of an option, merged over the options it starts from; an empty mapping where there is no file.

    Args:
        group: a folder of conf, such as mode.
        name: name of the option.
        config_dir: a folder with more options, whose files come first.
        inside: the options that start from this one.

    Raises:
        UserError: a mistake in the file.
    """
    files = (folder / group / f"{name}.yaml" for folder in folders(config_dir))
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return OmegaConf.create()
    if name in inside:
        raise UserError(f"{file}: its defaults lead back to it: {' -> '.join((*inside, name))}")
    own: Any = read(file, group)[0]
    others = [other for other in own.pop("defaults", []) if isinstance(other, str) and other != "_self_"]
    bases = (option(group, other, config_dir, inside=(*inside, name)) for other in others)
    return OmegaConf.merge(*bases, own)


def read(file: Path, group: str | None) -> tuple[DictConfig, str | None]:
    """Read a file of options: its keys, the types of its values, and text as it is written.

    Args:
        file: a YAML file.
        group: the folder of conf that it belongs to; None for conf/config.yaml.

    Returns:
        Its values, and the package that its header names.

    Raises:
        UserError: a mistake in the file, on one line with its place.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected a YAML file") from error
    values, package = _read(file, content, group)
    return copy.deepcopy(values), package


@functools.lru_cache(maxsize=1024)  # every cell of a sweep reads the same files
def _read(file: Path, content: bytes, group: str | None) -> tuple[DictConfig, str | None]:
    text = yaml_files.decoded(file, content)
    package = yaml_files.package(file, text)
    is_whole = group is None or package == "_global_"
    if not is_whole and group in ("experiment", "network"):
        raise UserError(f"{file}, line 1: expected # @package _global_, for its keys are those of the command line")
    if package not in (None, "_global_", group) and group != "hydra":
        raise UserError(f"{file}, line 1: @package {package} is not allowed: expected @package _global_, or none")
    prefix = "" if is_whole else f"{group}."
    values, places = yaml_files.read(file, text, prefix=prefix, types=types(), paths=PATHS, optional=OPTIONAL)
    if not values and not is_whole:
        raise UserError(f"{file} is empty: expected the values of a {group}, key: value")
    checked = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    try:
        found = OmegaConf.create(values)
        if group != "hydra":
            OmegaConf.merge(_schema(), checked if is_whole else {group: checked})
    except OmegaConfBaseException as error:
        key = f"{prefix}{str(error.full_key or '').removeprefix(prefix)}"
        place = places.get(key.partition("[")[0], file)
        raise UserError(f"{place}: {key}: {first_line(error)}") from error
    return found, package


@functools.cache
def types() -> dict[str, Any]:
    """Return the type of each key of the command line: {"depth": int, "mode.bits": int | None, "task.model": str, ...}.

    The settings of the tasks are all in it. They are read from the sources, since a task imports torch.
    """
    groups = {"dataset": DatasetConfig, "mode": ModeConfig, "gpu": GpuConfig}
    found = {key.name: key.type for key in fields(Config) if key.name not in (*groups, "task")}
    found |= {f"{group}.{key.name}": key.type for group, values in groups.items() for key in fields(values)}
    for file in sorted((Path(__file__).parent / "tasks").glob("*.py")):
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                keys = [key for key in node.body if isinstance(key, ast.AnnAssign)]
                found |= {f"task.{ast.unparse(key.target)}": eval(ast.unparse(key.annotation)) for key in keys}
    return found


@functools.cache
def _schema() -> DictConfig:
    """Return the schema of the whole command line, with the settings of all tasks."""
    settings = {key.removeprefix("task."): type_ for key, type_ in types().items() if key.startswith("task.")}
    task = make_dataclass("Settings", [(name, type_, field(default=MISSING)) for name, type_ in settings.items()])
    return cast(DictConfig, OmegaConf.structured(Config(task=OmegaConf.structured(task))))


def is_own_option(group: str, name: str, config_dir: str | None) -> bool:
    """Whether a folder of the user's own has a file of that option."""
    return config_dir is not None and (Path(config_dir) / group / f"{name}.yaml").is_file()


def mode(name: str, config_dir: str | None = None) -> ModeConfig:
    """Read a mode from its file."""
    values = OmegaConf.merge(OmegaConf.structured(ModeConfig), option("mode", name, config_dir))
    return cast(ModeConfig, OmegaConf.to_object(values))
