"""Draw every figure from curves.csv, records.csv and the tables of single runs, all of them committed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.config import Config
from runners.errors import Refusals
from runners.records import GROUP, Record
from runners.reporting import figures, networks
from runners.reporting.curves import gather
from runners.reporting.labels import read_labels
from runners.reporting.networks import TABLES


@dataclass
class Settings:
    """Settings of this task."""

    name: str


def run(config: Config) -> list[Record]:
    """Gather curves and records, and draw every figure.

    Args:
        config: `results` is the folder of runs, records, curves and figures.

    Returns:
        An empty list: nothing is measured.

    Raises:
        UserError: a file does not read back whole. Where it is of a single run, the figures of the others are drawn.
    """
    results, labels, refusals = Path(config.results), read_labels(config.config_dir), Refusals()
    curves = gather(results, refusals)
    found = records.collect(results)
    if not found:
        print(f"no finished run under {results / 'runs'}, no {results / 'records.csv'}: nothing to draw")
    for place, rows in curves.groupby(list(GROUP)):
        print(figures.save(figures.draw(rows, labels), results, f"error-{figures.group_slug(place)}"))
    for table in TABLES:
        shown = networks.cells(table, found, labels)
        for conditions in dict.fromkeys(map(table.conditions, shown)):
            group = [record for record in shown if table.conditions(record) == conditions and record.width == 1]
            if len({record.depth for record in group}) > 1:
                name = figures.slug(" ".join((table.name, *table.heading(conditions, labels))))
                print(figures.save(figures.draw_over_depth(table, conditions, group, labels), results, name))
    of_single_runs: dict[str, Callable[[str], Path]] = {
        "memory": lambda name: figures.draw_memory(results, name, labels),
        "gradients": lambda name: figures.draw_gradients(results, name, labels),
        "thresholds": lambda name: figures.draw_thresholds(results, name),
    }
    for folder, draw in of_single_runs.items():
        for file in sorted((results / folder).glob("*.csv")):
            with refusals.collected():
                print(draw(file.stem))
    refusals.raise_if_any()
    return []
