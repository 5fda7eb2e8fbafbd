"""Every figure, from curves.csv, records.csv and the tables of single runs: a fresh clone draws them again."""

from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.config import Config
from runners.records import GROUP, Record
from runners.reporting import figures, networks
from runners.reporting.curves import gather
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
    results = Path(config.results)
    curves = gather(results)
    found = records.collect(results)
    if not found:
        print(f"no finished run under {results / 'runs'}, no {results / 'records.csv'}: nothing to draw")
    for group, rows in curves.groupby(list(GROUP)):
        print(figures.save(figures.draw(rows), results, f"error-{figures.slug(group)}"))
    for table in TABLES:
        shown = networks.cells(table, found)
        for conditions in dict.fromkeys(map(table.conditions, shown)):
            under = [record for record in shown if table.conditions(record) == conditions and record.width == 1]
            if len({record.depth for record in under}) > 1:
                name = figures.slug_of(" ".join((table.name, *conditions)))
                print(figures.save(figures.draw_over_depth(table, conditions, under), results, name))
    for file in sorted((results / "memory").glob("*.csv")):
        print(figures.draw_memory(results, file.stem))
    for file in sorted((results / "gradients").glob("*.csv")):
        print(figures.draw_gradients(results, file.stem))
    for file in sorted((results / "thresholds").glob("*.csv")):
        print(figures.draw_thresholds(results, file.stem))
    return []
