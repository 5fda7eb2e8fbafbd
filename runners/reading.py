"""Read tables (CSV) and lists of records (JSON) whole or not at all: what is written from them is then whole too.

Reading is kind where there is no doubt: blank lines, Windows' line ends, a byte order mark, TRUE for True. Whatever
else a column's kind does not allow is refused in one line: file, line or record, column, and what was expected.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from runners.errors import UserError

Made = TypeVar("Made")
Row = dict[str, Any]
"""The values of a row, or of a record, by column."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""No text has these characters; a block of a file that was never written has nothing else."""
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|-?inf")
"""Not 1_000 nor digits of other scripts, which float() reads too."""
TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True)
class Kind:
    """What a column holds."""

    expected: str
    """In words."""
    of_text: Callable[[str], Any]
    """Read the text of a cell, as JSON would hold it; a ValueError where that cannot be."""
    checked: Callable[[Any], Any]
    """Return a value of JSON in its canonical form; a ValueError where it is of another kind."""

    def or_none(self) -> "Kind":
        """Return the kind of a column that may be empty, which is null in JSON and None here."""
        return Kind(
            f"{self.expected}, or nothing",
            lambda text: self.of_text(text) if text else None,
            lambda value: None if value is None else self.checked(value),
        )


def read_csv(
    file: Path, kinds: Mapping[str, Kind], make: Callable[[Row], Made], *, of: str, newer: Collection[str] = ()
) -> dict[int, Made]:
    """Read a table.

    Args:
        file: text in UTF-8; its first line names the columns, in any order.
        kinds: kind by column; all of them must be there, and no others.
        make: makes of a row's values what is returned; a ValueError refuses the row.
        of: what the rows are, for messages.
        newer: columns that older files do not have, or some rows only; their value is then None.

    Returns:
        What was made of each row, by the number of its line.

    Raises:
        UserError: the file does not read back whole.
    """
    text = _text(file)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    found: dict[int, Made] = {}
    line = 1
    try:
        for cells in rows:
            if not header and any(cells):
                header = cells
                _check_columns(header, kinds, of, newer)
            elif any(map(str.strip, cells)):  # a spreadsheet may leave rows of empty cells
                if len(cells) != len(header):
                    raise ValueError(f"{_shown(','.join(cells))} is {len(cells)} cells, expected {len(header)}")
                given = dict(zip(header, cells, strict=True))
                found[line] = make(
                    {name: _value(name, given.get(name, ""), kind.of_text, kind) for name, kind in kinds.items()}
                )
            line = rows.line_num + 1
        _check_columns(header, kinds, of, newer)
        if not text.endswith(("\n", "\r")):
            line -= 1
            raise ValueError("expected a line break at the end: the line may be cut short")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}, line {line}: {error}") from error
    return found


def read_json(file: Path, kinds: Mapping[str, Kind], make: Callable[[Row], Made], *, of: str) -> list[Made]:
    """Read a list of records; arguments and exceptions are those of `read_csv`."""
    text = _text(file)
    found: list[Made] = []
    where = ""
    try:
        records = _json_of(text)
        if not isinstance(records, list):
            raise ValueError(f"{_shown(records)}, expected a list")
        for number, record in enumerate(records, start=1):
            where = f"record {number}: "
            if not isinstance(record, tuple):
                raise ValueError(f"{_shown(record)}, expected an object")
            _check_columns([name for name, _ in record], kinds, of)
            given = dict(record)
            found.append(make({name: _value(name, given[name], lambda value: value, kinds[name]) for name in kinds}))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a run's {of}: {where}{error}; mend or remove the file") from error
    return found


def _text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: the byte 0x{error.object[error.start]:02x}, expected UTF-8") from error
    if control := CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise UserError(f"{file}, line {line}: the character {control[0]!r}, expected text")
    return text


def _check_columns(columns: Sequence[str], kinds: Mapping[str, Kind], of: str, newer: Collection[str] = ()) -> None:
    unknown = [name for name in columns if name not in kinds]
    needed = [name for name in kinds if name not in newer]
    missing = [name for name in needed if name not in columns]
    twice = [name for name in kinds if columns.count(name) > 1]
    if unknown or missing or twice:
        raise ValueError(
            f"its columns are not those of {of}: unknown {_shortened(', '.join(unknown)) or 'none'}; "
            f"missing {'all' if missing == needed else ', '.join(missing) or 'none'}; "
            f"{f'twice {twice[0]}; ' if twice else ''}expected {', '.join(kinds)}"
        )


def _value(name: str, given: Any, of_text: Callable[[Any], Any], kind: Kind) -> Any:
    try:
        return kind.checked(of_text(given))
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} is {_shown(given)}, expected {kind.expected}") from error


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, tuple) else _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- kinds of columns


def _number_of(text: str) -> int | float:
    text = text.strip()
    if not NUMBER.fullmatch(text):
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _flag_of(text: str) -> bool:
    return bool(("false", "true").index(text.strip().lower()))


def _json_of(text: str) -> Any:
    """Read JSON; an object becomes a tuple of pairs, as a dict would hide a key that is there twice."""
    return json.loads(text, object_pairs_hook=tuple)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    return float(value)


def _finite(value: Any) -> float:
    if not math.isfinite(number := _number(value)):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str) or CONTROL.search(value):
        raise ValueError
    value.encode()  # JSON can spell characters that UTF-8 cannot
    return value


def _name(value: Any) -> str:
    if not _string(value).strip():
        raise ValueError
    return str(value)


def _time(value: Any) -> str:
    if not TIME.fullmatch(_string(value)):
        raise ValueError
    return datetime.fromisoformat(value).astimezone(UTC).isoformat()


def _object(value: Any) -> Row:
    made = _plain(value)
    if not isinstance(made, dict):
        raise ValueError
    json.dumps(made, allow_nan=False, ensure_ascii=False).encode()
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, tuple):
        return value
    made = {name: _plain(item) for name, item in value}
    if len(made) < len(value):
        raise ValueError
    return made


FINITE = Kind("a finite number", _number_of, _finite)
ANY_NUMBER = Kind("a number, nan or inf", _number_of, _number)
WHOLE = Kind("a whole number from 0 to 2**63 - 1", _number_of, _whole)
FLAG = Kind("True or False", _flag_of, _flag)
TEXT = Kind("a text", str, _string)
NAME = Kind("a text that is not empty", str, _name)
TIME_UTC = Kind("a time in ISO 8601 with its offset, as 2026-01-31T12:00:00+00:00", str, _time)
OBJECT = Kind("a JSON object of finite numbers and texts, no key twice", _json_of, _object)
