"""A page of tables, and how it reads as Markdown; report.html.j2 is how it reads in a browser."""

from collections.abc import Iterable
from dataclasses import dataclass

from runners.records import Record
from runners.reporting.paper import ROWS

IMAGES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet top-5", "digits": "digits"}


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: its heading.
        rows: its cells, the head first.
        said: what the table does not say: recipe, machine, versions, n; one text a line.
    """

    title: str
    rows: list[list[str]]
    said: list[str]


@dataclass(frozen=True)
class Page:
    """The tables of one kind.

    Attributes:
        title: its heading.
        opening: what a reader must know.
        sections: the tables.
        empty: what to run where there is none.
    """

    title: str
    opening: str
    sections: list[Section]
    empty: str = ""


def markdown(page: Page) -> str:
    """A page as a text file."""
    parts = [f"# {page.title}\n", page.opening]
    if not page.sections:
        parts.append(f"Nothing has been measured yet: `{page.empty}`.\n")
    for section in page.sections:
        parts += [f"## {section.title}\n", aligned(section.rows), *(f"- {text}" for text in section.said), ""]
    return "\n".join(parts)


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up, so that it reads as text too.

    Args:
        rows: the first is the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:], ""])


def label(mode: str) -> str:
    """What a mode is called in tables and figures."""
    return ROWS[mode].label if mode in ROWS else mode


def mode_order(mode: str) -> tuple[int, str]:
    """Where a mode stands in tables and figures: modes of the user's own last."""
    return (list(ROWS).index(mode) if mode in ROWS else len(ROWS)), mode


def images(dataset: str) -> str:
    """What a data set is called in tables and figures."""
    return IMAGES.get(dataset, dataset)


def listed(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return ", ".join(sorted(set(values)))


def commits(made: Iterable[Record]) -> str:
    """Which commits made some records, in short; what was made in parts has one a part."""
    found = {commit[:9] for record in made if record.commit for commit in record.commit.split("; ")}
    return listed(found) or "unknown"


def failure(failed: Record) -> str:
    """What stands in the cell of a record of a failure."""
    reason = failed.failure.partition(":")[0]
    return reason if reason in ("does not fit", "does not compile", "diverged") else "failed"
