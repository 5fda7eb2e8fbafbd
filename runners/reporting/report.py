"""One HTML page with the tables, the figures and the command that repeats every number, to send to a colleague.

Everything is in the one file, results/report.html: no script, no picture or style from elsewhere.
"""

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

import blpa
from runners.records import Record
from runners.reporting import converted, errors, kernels, networks
from runners.reporting.labels import Labels
from runners.reporting.networks import TABLES
from runners.reporting.pages import commits

FIGURES = ("error-", "memory-", "batches-", "times-", "gradients-")
"""Prefixes of the figures that belong to a table, in the order of the page; figures of single runs follow."""


@dataclass(frozen=True)
class Figure:
    """A picture of the page."""

    name: str
    data: str
    """PNG in base64."""


@dataclass(frozen=True)
class Machine:
    """A machine and the versions on it that made records."""

    device: str
    torch: str
    triton: str
    cuda: str
    records: int
    dates: str
    commits: str


def render(found: list[Record], pictures: Iterable[Path], labels: Labels) -> str:
    """Render the page as HTML.

    Args:
        found: the records it shows.
        pictures: PNG files.
        labels: names, colours and order of modes and data sets.
    """
    pages = [errors.page(errors.summarise(found, labels), labels)]
    pages += [networks.page(table, networks.cells(table, found, labels), labels) for table in TABLES]
    pages.append(converted.page(converted.cells(found, labels), labels))
    pages.append(kernels.page(kernels.cells(found, labels), labels))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("runners.reporting", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    return environment.get_template("report.html.j2").render(
        pages=pages,
        figures=[
            Figure(picture.stem, base64.b64encode(picture.read_bytes()).decode())
            for picture in sorted(pictures, key=_order)
        ],
        machines=_machines(found),
        records=found,
        version=blpa.__version__,
        date=datetime.now(UTC).date().isoformat(),
    )


def _code(text: str) -> Markup:
    """Escape text, and mark words between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _order(picture: Path) -> tuple[int, str]:
    place = next((n for n, start in enumerate(FIGURES) if picture.stem.startswith(start)), len(FIGURES))
    return place, picture.stem


def _machines(found: list[Record]) -> list[Machine]:
    """List each machine and set of versions once, the one with the most records first."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in found:
        key = record.device, record.torch, record.triton or "none", record.cuda or "not used"
        groups.setdefault(key, []).append(record)
    machines = []
    for (device, torch, triton, cuda), made in groups.items():
        dates = sorted(record.date[:10] for record in made)
        name = "counted, on no device" if device == "none" else device
        period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        machines.append(Machine(name, torch, triton, cuda, len(made), period, commits(made)))
    return sorted(machines, key=lambda machine: -machine.records)
