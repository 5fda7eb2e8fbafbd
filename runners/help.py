"""The text of `blpa-run --help`: the groups with their options, and every value with its default and its docstring."""

import ast
import textwrap
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from runners import CONF
from runners.config import Config, options
from runners.option_files import option

SOURCES = Path(__file__).parent


def text(opening: str, defaults: DictConfig) -> str:
    """Write the whole text.

    Args:
        opening: description and usage of the command.
        defaults: the configuration of a command line without overrides.
    """
    lines = [opening, "Groups, group=option (the default in brackets):"]
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()):
        chosen = defaults.experiment if group == "experiment" else defaults.get(group, {}).get("name")
        names = options(group, defaults.config_dir)
        lines.append(f"  {group:12}" + " ".join(f"[{name}]" if name == chosen else name for name in names))
    lines += ["", "Values, key=value (the default is shown):"]
    classes = _docstrings(SOURCES / "config.py")
    lines += _entries("", classes["Config"], defaults)
    for field in fields(Config):
        if (values := classes.get(f"{field.name.capitalize()}Config")) is not None:
            lines += _entries(f"{field.name}.", values, defaults[field.name])
    for task in options("task"):
        values = _docstrings(SOURCES / "tasks" / f"{task.replace('-', '_')}.py")["Settings"]
        if values:
            lines += ["", f"Values of task={task}:", *_entries("task.", values, option("task", task))]
    return "\n".join(lines)


def _entries(prefix: str, meanings: dict[str, str], values: DictConfig) -> list[str]:
    """Write a line or two per value: the key, its default, and the meaning in a second column."""
    lines = []
    for name, meaning in meanings.items():
        if name in ("task", "config_dir"):  # task is listed by its values, and config_dir is a flag
            continue
        key = f"{prefix}{name}={_shown('???' if OmegaConf.is_missing(values, name) else values[name])}"
        indent = " " * 36
        wrapped = textwrap.wrap(" ".join(meaning.split()), width=120, initial_indent=indent, subsequent_indent=indent)
        if len(key) <= 32:
            lines += [f"  {key:34}{wrapped[0].lstrip()}", *wrapped[1:]]
        else:
            lines += [f"  {key}", *wrapped]
    return lines


def _shown(value: object) -> str:
    """Write a value as on the command line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _docstrings(source: Path) -> dict[str, dict[str, str]]:
    """Read the string below each field of a source's classes: class -> field -> text."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                ast.unparse(field.target): text.value.value
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
            }  # fmt: skip
    return found
