"""Text on the command line arrives as it was typed.

Hydra's grammar makes numbers, booleans and nulls of plain words: run=1.10 is 1.1. Here the type of the key decides: the
values of a key that takes text, and the names of options, are quoted before Hydra reads them. A comma still separates
the values of a sweep, choice(...), range(...) and the like are Hydra's, ${key} is the value of another key, and a
backslash before a special character is dropped.
"""

import re
from contextlib import suppress
from typing import Any

from runners import CONF
from runners.errors import NO_TEXT, UserError
from runners.files import at_home
from runners.option_files import PATHS, types

GROUPS = frozenset(folder.name for folder in CONF.iterdir() if folder.is_dir())
OF_TEXTS = re.compile(r"(choice|shuffle|sort)\s*\((.*)\)", re.DOTALL)
"""A function of Hydra that takes values of any type."""
LISTS = re.compile(r"\[.*\]|'?\$\{.*\}'?|(choice|shuffle)\s*\(.*\)", re.DOTALL)
"""One list, or what stands for lists."""
OTHER = re.compile(r"(range|interval|glob|tag|int|float|str|bool)\s*\(.*\)", re.DOTALL)
QUOTED = re.compile(r"""'(?:\\.|[^\\'])*'|"(?:\\.|[^\\"])*\"""", re.DOTALL)
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def quoted(override: str) -> str:
    """Quote the values of an override that are text and that Hydra would change.

    Args:
        override: key=value, as it was typed.

    Returns:
        The override in Hydra's grammar; unchanged if its key takes no text.

    Raises:
        UserError: the key takes a list of texts, and the value is no list; or it is no Unicode text.
    """
    typed, _, value = override.partition("=")
    key = typed.lstrip("+~")
    type_ = str | None if key in GROUPS else types().get(key)
    if not value or type_ not in (str, str | None, list[str]):
        return override
    if NO_TEXT.search(override):
        raise UserError(f"cannot read {override!r}: it is no Unicode text")
    elements = _split(value)
    if type_ == list[str] and not all(LISTS.fullmatch(text.strip()) for text in elements):
        raise UserError(f"{override} is not allowed: it is a list, {key}=[{value.strip(' []')}]")
    is_list = type_ == list[str] or key in GROUPS
    is_sweep = len(elements) > 1
    texts = [_element(text.strip() if is_sweep else text, key, is_list, type_ == str | None) for text in elements]
    return f"{typed}={','.join(texts)}"


def hydra_text(value: Any, *, in_list: bool = False) -> str:
    """Write a value in Hydra's grammar, such that it is composed again.

    Args:
        value: a value of a configuration.
        in_list: whether it stands in a list, where text always has quotes.
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        # Before ${, OmegaConf takes a backslash for an escape.
        literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        return _quote(literal) if in_list else _plain_or_quoted(literal)
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_text(item, in_list=True) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _element(element: str, key: str, is_list: bool, is_optional: bool) -> str:
    """Quote one value of a sweep, or the items of a list."""
    stripped = element.strip()
    if not element:
        return element
    if is_list and stripped.startswith("[") and stripped.endswith("]"):
        items = [item.strip() for item in _split(stripped[1:-1]) if stripped[1:-1].strip()]
        return f"[{','.join(_element(item, key, False, False) for item in items)}]"
    if call := OF_TEXTS.fullmatch(stripped):
        arguments = [
            argument if re.match(r"\s*\w+\s*=", argument) else _element(argument.strip(), key, is_list, is_optional)
            for argument in _split(call[2])
        ]
        return f"{call[1]}({','.join(arguments)})"
    if OTHER.fullmatch(stripped) or (is_optional and stripped.lower() == "null"):
        return stripped
    if stripped[:1] in ("'", '"'):
        if not QUOTED.fullmatch(stripped):
            return element  # which the grammar refuses
        return _quote(_at_home(key, _unquoted(stripped)))
    return _plain_or_quoted(_at_home(key, ESCAPED.sub(r"\1", element)))


def _at_home(key: str, text: str) -> str:
    if text == "???":
        raise UserError(f"{key}={text} is not allowed: in a configuration ??? is a value that is missing")
    return at_home(key, text) if key in PATHS else text


def _plain_or_quoted(text: str) -> str:
    """Quote a text unless Hydra's grammar reads it as it is."""
    is_word = re.fullmatch(r"[A-Za-z0-9_./+-]+", text) and text.lower() not in ("true", "false", "null")
    return text if is_word and text == _as_number(text) else _quote(text)


def _as_number(text: str) -> str:
    """Return what becomes of a text that is read as a number, and any other text as it is."""
    for kind in (int, float):
        with suppress(ValueError):  # it is no such number
            return str(kind(text))
    return text


def _quote(text: str) -> str:
    """Put quotes around a text: backslashes before a quote, or at the end, are doubled, and a quote gets its own."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def _unquoted(text: str) -> str:
    """Return the text inside quotes; the reverse of `_quote`, for either kind of quotes."""
    return re.sub(rf"(\\+)({text[0]}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])


def _split(value: str) -> list[str]:
    """Split at commas outside quotes and brackets."""
    parts, depth, begins, position = [""], 0, True, 0
    while position < len(value):
        quotation = QUOTED.match(value, position) if begins else None
        token = quotation[0] if quotation else value[position : position + 1 + (value[position] == "\\")]
        position += len(token)
        if token == "," and not depth:
            parts.append("")
        else:
            parts[-1] += token
        depth = max(0, depth + (token in "([{") - (token in ")]}"))
        begins = token in ",[({=:" or (begins and token.isspace())
    return parts
