"""Read a YAML file of options: text as it is written, and a mistake as one line that names its place.

YAML makes numbers, booleans and nulls of plain words: 2024_11_26 is 20241126, and 1.10 is 1.1. Here the type of its key
decides: where a key takes text, the text arrives as it is written.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from omegaconf._utils import get_yaml_loader
from yaml import MappingNode, Mark, MarkedYAMLError, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from runners.errors import NO_TEXT, UserError, allowed
from runners.files import at_home

MOST_VALUES = 10_000
"""More values than any file of options has; aliases of aliases can stand for billions."""
NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
EXPECTED = "expected lines of the form key: value"
OF_HYDRA = ("hydra", "hydra.launcher", "hydra.sweep", "hydra.sweeper", "hydra.sweeper.params")
"""Keys of Hydra's own that hold others."""

_Loader = get_yaml_loader()


def decoded(file: Path, content: bytes) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(file, content[: error.start].decode("utf-8-sig"))
        raise UserError(f"{place}: byte {content[error.start]:#04x} is not UTF-8: save the file as UTF-8") from None


def package(file: Path, text: str) -> str | None:
    """Return the package that the header of a file names, `# @package _global_` in the first lines."""
    found = None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*#\s*@(.*)", line)
        if not header and line.strip():
            break
        words = header[1].split() if header else []
        if header and (len(words) != 2 or words[0] != "package"):
            raise UserError(f"{file}, line {number}: cannot read {line.strip()!r}: expected # @package _global_")
        found = words[1] if header else found
    return found


def read(
    file: Path, text: str, *, prefix: str, types: Mapping[str, Any], paths: Collection[str], optional: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file of options.

    Args:
        file: its name, for messages.
        text: its text, with line ends of any system.
        prefix: what is before its keys on the command line: `mode.`, or nothing.
        types: type of each key of the command line.
        paths: the keys whose text may begin with ~, a home.
        optional: the keys whose text may be left out, which makes it empty.

    Returns:
        The values, and the place of each key: {"mode.bits": "mine/mode/mine.yaml, line 3, column 1"}.

    Raises:
        UserError: the first mistake found.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = _Values(file, loader, types, paths, optional)
        found = {} if node is None else values.of_file(node, prefix)
    except ReaderError as error:
        place = _place(file, text[: error.position])
        raise UserError(f"{place}: character {error.character:#04x} is not allowed in YAML") from None
    except MarkedYAMLError as error:
        raise UserError(_reason(file, error)) from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; {EXPECTED}") from None
    return found, values.places


class _Values:
    """The values of a file's nodes.

    Args:
        file: its name, for messages.
        loader: it makes numbers of what is no text.
        types: as in `read`.
        paths: as in `read`.
        optional: as in `read`.
    """

    def __init__(
        self, file: Path, loader: Any, types: Mapping[str, Any], paths: Collection[str], optional: Collection[str]
    ) -> None:
        self.file, self.loader, self.types, self.paths, self.optional = file, loader, types, paths, optional
        self.places: dict[str, str] = {}
        self.count = 0
        self.items: dict[Node, dict[str, tuple[ScalarNode, Node]]] = {}

    def of_file(self, node: Node, prefix: str) -> dict[str, Any]:
        """Return the values of a whole file."""
        found = {}
        for key, value in self._items(node):
            if key.value == "defaults":
                found["defaults"] = self._defaults(value, is_of_group=prefix not in ("", "hydra."))
            elif prefix == "hydra." or (key.value == "hydra" and not prefix):
                found[key.value] = self._of_hydra(value, str(key.value))
            else:
                found[key.value] = self._known(key, value, prefix)
        return found

    def _known(self, key: ScalarNode, node: Node, prefix: str) -> Any:
        """Return the value of a key, which the command line has too."""
        name = f"{prefix}{key.value}"
        self.places[name] = _at(self.file, key.start_mark)
        type_ = self.types.get(name)
        if type_ is None:
            if any(other.startswith(f"{name}.") for other in self.types):
                return {inner.value: self._known(inner, value, f"{name}.") for inner, value in self._items(node)}
            names = {other.removeprefix(prefix).partition(".")[0] for other in self.types if other.startswith(prefix)}
            self._refuse(key, f"unknown key {name!r}{allowed(name, names)}")
        if type_ == list[str] and not isinstance(node, SequenceNode):
            self._refuse(node, f"{name}: expected a list, such as [{getattr(node, 'value', '')}]")
        if name in self.optional and _is_empty(node):
            return ""
        value = self._value(node, is_text=type_ in (str, list[str]), is_text_or_null=type_ == str | None)
        return at_home(name, value) if name in self.paths and isinstance(value, str) else value

    def _of_hydra(self, node: Node, path: str) -> Any:
        """Return values of Hydra's own."""
        if path == "hydra.sweeper.params" and node.tag != NULL:
            return {key.value: self._swept(key, value) for key, value in self._items(node)}
        if isinstance(node, MappingNode) or (path in OF_HYDRA and not path.endswith(".params")):
            return {key.value: self._of_hydra(value, f"{path}.{key.value}") for key, value in self._items(node)}
        return self._value(node)

    def _swept(self, key: ScalarNode, node: Node) -> Any:
        """Return what an experiment sweeps a key over: values as the command line takes them, such as 4bit,8bit."""
        type_ = self.types.get(key.value.lstrip("+~"), str)  # a group takes names
        if isinstance(node, MappingNode):
            self._refuse(node, f"{key.value}: expected a value, or several with commas between them")
        return self._value(node, is_text=type_ in (str, str | None, list[str]) or node.tag == NULL)

    def _defaults(self, node: Node, *, is_of_group: bool) -> list[Any]:
        """Return a defaults list: names of options, in a group's file those of the same group."""
        items = node.value if isinstance(node, SequenceNode) else [node]
        for item in items:
            if not isinstance(node, SequenceNode) or isinstance(item, SequenceNode) or item.tag == NULL:
                self._refuse(item, "defaults: expected a list of options, such as [4bit]")
            if is_of_group and not isinstance(item, ScalarNode):
                self._refuse(item, "defaults: expected names of options of the same group, such as [4bit]")
        return [self._value(item, is_text_or_null=True) for item in items]

    def _value(self, node: Node, *, is_text: bool = False, is_text_or_null: bool = False) -> Any:
        """Return the value of a node, with text as it is written."""
        self.count += 1
        if self.count > MOST_VALUES:
            self._refuse(node, f"more than {MOST_VALUES} values; {EXPECTED}")
        if isinstance(node, MappingNode):
            return {
                key.value: self._value(value, is_text=is_text, is_text_or_null=is_text_or_null)
                for key, value in self._items(node)
            }
        if isinstance(node, SequenceNode):
            return [self._value(item, is_text=is_text, is_text_or_null=is_text_or_null) for item in node.value]
        self._check_unicode(node)
        if is_text and _is_empty(node):
            self._refuse(node, "expected a text; quote a value that begins with #, and an empty one")
        if is_text or (is_text_or_null and node.tag != NULL):
            return node.value
        try:
            return self.loader.construct_object(node)
        except ValueError:  # such as !!int four
            self._refuse(node, f"cannot read {node.value!r}")

    def _items(self, node: Node) -> Iterable[tuple[ScalarNode, Node]]:
        """Return keys and values of a mapping, those that it merges from others included."""
        if node not in self.items:
            own: dict[str, tuple[ScalarNode, Node]] = {}
            merged: dict[str, tuple[ScalarNode, Node]] = {}
            if not isinstance(node, MappingNode):
                wrong = "a list" if isinstance(node, SequenceNode) else repr(node.value) if node.value else "nothing"
                self._refuse(node, f"{EXPECTED}, not {wrong}")
            for key, value in node.value:
                if not isinstance(key, ScalarNode):
                    self._refuse(key, EXPECTED)
                self._check_unicode(key)
                if key.value in own:
                    first = own[key.value][0].start_mark.line + 1
                    self._refuse(key, f"the key {key.value!r} is already in line {first}")
                if key.tag == MERGE:
                    for source in value.value if isinstance(value, SequenceNode) else [value]:
                        merged = {inner.value: (inner, item) for inner, item in self._items(source)} | merged
                else:
                    own[key.value] = key, value
            self.items[node] = merged | own
        return self.items[node].values()

    def _check_unicode(self, node: Node) -> None:
        """Refuse what only an escape can put into a text, such as half of a surrogate pair."""
        if NO_TEXT.search(node.value):
            self._refuse(node, f"{node.value!r} is no Unicode text")

    def _refuse(self, node: Node, message: str) -> NoReturn:
        raise UserError(f"{_at(self.file, node.start_mark)}: {message}")


def _is_empty(node: Node) -> bool:
    """Return whether nothing is written for a value, or only a comment."""
    return node.tag == NULL and not node.value


def _at(file: Path, mark: Mark) -> str:
    return f"{file}, line {mark.line + 1}, column {mark.column + 1}"


def _place(file: Path, before: str) -> str:
    """Return the place in a file that comes after a text."""
    lines = f"{before}|".splitlines()
    return f"{file}, line {len(lines)}, column {len(lines[-1])}"


def _reason(file: Path, error: MarkedYAMLError) -> str:
    """Write what YAML itself found wrong: where, what, and where that began."""
    mark = error.problem_mark or error.context_mark
    began = f" that begins in line {error.context_mark.line + 1}" if error.context_mark else ""
    context = f" {error.context}{began}" if error.context and error.context.startswith("while") else ""
    problem = str(error.problem).removeprefix("but ")
    return f"{_at(file, mark) if mark else file}: {problem}{context}; {EXPECTED}, indented with spaces"
