"""The text of `blpa-run --help`: the groups with their options, and every value with its default and its docstring."""

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass

from runners import CONF, config
from runners.config import Config, options


def text(opening: str, defaults: Config) -> str:
    """The whole text.

    Args:
        opening: what the command is and how it is called.
        defaults: the configuration of a command line without overrides.
    """
    meanings = _docstrings()
    lines = [opening, "Groups, group=option (the default in brackets):"]
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()):
        chosen = getattr(getattr(defaults, group), "name", defaults.experiment)
        lines.append(f"  {group:12}" + " ".join(f"[{name}]" if name == chosen else name for name in options(group)))
    lines += ["", "Values, key=value (the default is shown):"]
    sections = {"": defaults} | {f"{part.name}.": getattr(defaults, part.name) for part in fields(defaults)}
    for section, values in sections.items():
        if is_dataclass(values):
            for value in fields(values):
                meaning = meanings[type(values).__name__].get(value.name)
                if meaning:
                    lines += _entry(f"{section}{value.name}={_shown(getattr(values, value.name))}", meaning)
    return "\n".join(lines)


def _entry(key: str, meaning: str) -> list[str]:
    """A key and its meaning, the meaning in a column of its own."""
    wrapped = textwrap.wrap(" ".join(meaning.split()), width=84, initial_indent=" " * 36, subsequent_indent=" " * 36)
    if len(key) <= 32:
        return [f"  {key:34}{wrapped[0].lstrip()}", *wrapped[1:]]
    return [f"  {key}", *wrapped]


def _shown(value: object) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _docstrings() -> dict[str, dict[str, str]]:
    """The string below each field of config.py's dataclasses, which only the source has: class -> field -> text."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                ast.unparse(field.target): text.value.value
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
            }  # fmt: skip
    return found
