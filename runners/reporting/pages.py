"""A page of tables, and its Markdown; report.html.j2 is its HTML."""

from collections.abc import Iterable
from dataclasses import dataclass

from runners.records import Record


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: its heading.
        rows: its cells, the head first.
        notes: recipe, machine, versions and n, one text per line.
    """

    title: str
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Page:
    """The tables of one kind.

    Attributes:
        title: its heading.
        opening: what the numbers are.
        sections: the tables.
        empty: the command that measures them, shown where there is no table.
    """

    title: str
    opening: str
    sections: list[Section]
    empty: str = ""


def markdown(page: Page) -> str:
    """Write a page as Markdown."""
    parts = [f"# {page.title}\n", page.opening]
    if not page.sections:
        parts.append(f"Nothing has been measured yet: `{page.empty}`.\n")
    for section in page.sections:
        parts += [f"## {section.title}\n", aligned(section.rows), *(f"- {text}" for text in section.notes), ""]
    return "\n".join(parts)


def aligned(rows: list[list[str]]) -> str:
    """Write a Markdown table whose columns line up, so that it reads as text too.

    Args:
        rows: the first is the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:], ""])


def listed(values: Iterable[str]) -> str:
    """Join the values, each once, sorted."""
    return ", ".join(sorted(set(values)))


def commits(made: Iterable[Record]) -> str:
    """Name the commits that made some records, in short; a run trained in parts has one per part."""
    found = {commit[:9] for record in made if record.commit for commit in record.commit.split("; ")}
    return listed(found) or "unknown"


def number(record: Record | None, form: str) -> str:
    """Write a record's value in a form of Python's, such as .2f; - where there is no record."""
    return "-" if record is None else f"{record.value:{form}}"


def failure(failed: Record) -> str:
    """Return the text of a cell that failed."""
    reason = failed.failure.partition(":")[0]
    return reason if reason in ("does not fit", "does not compile", "diverged") else "failed"
