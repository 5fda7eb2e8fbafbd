"""Every figure, from curves.csv, records.csv and the tables of single runs: a fresh clone draws them again."""

from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.config import Config
from runners.records import GROUP, Record
from runners.reporting import figures, networks
from runners.reporting.curves import gather
from runners.reporting.labels import read_labels
from runners.reporting.networks import TABLES


@dataclass
class Settings:
    """Of this task."""

    name: str


def run(config: Config) -> list[Record]:
    """Gather curves and records, and draw every figure.

    Args:
        config: `results` is the folder of runs, records, curves and figures.

    Returns:
        Nothing new is measured: an empty list.
    """
    results, labels = Path(config.results), read_labels(config.config_dir)
    curves = gather(results)
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
    for file in sorted((results / "memory").glob("*.csv")):
        print(figures.draw_memory(results, file.stem, labels))
    for file in sorted((results / "gradients").glob("*.csv")):
        print(figures.draw_gradients(results, file.stem, labels))
    for file in sorted((results / "thresholds").glob("*.csv")):
        print(figures.draw_thresholds(results, file.stem))
    return []
