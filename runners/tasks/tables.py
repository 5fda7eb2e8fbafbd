"""Write every table from all records: errors, memory, largest batches, times, gradient errors, kernels.

results/tables/<name>.md is for reading; <name>.csv has the same cells, one per row.
"""

from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.checks import one_of
from runners.config import Config
from runners.files import write_csv, write_whole
from runners.records import COLUMNS, Record, as_row
from runners.reporting import converted, errors, kernels, networks
from runners.reporting.labels import read_labels
from runners.reporting.networks import TABLES
from runners.reporting.pages import markdown


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    tables: list[str]
    """Tables to print, of memory, batches, times, gradients, converted, kernels and errors; [] prints all."""


def check(config: Config) -> None:
    """Check that the tables exist."""
    for name in config.task.tables:
        one_of("task.tables", name, ("memory", "batches", "times", "gradients", "converted", "kernels", "errors"))


def run(config: Config) -> list[Record]:
    """Collect every record, write every table, and print those that task.tables names, or all, the errors last.

    Args:
        config: `results` is the folder of runs, records and tables.

    Returns:
        Every record.
    """
    folder, labels = Path(config.results) / "tables", read_labels(config.config_dir)
    found = records.collect(Path(config.results))
    texts = {}
    for table in TABLES:
        shown = networks.cells(table, found, labels)
        texts[table.name] = markdown(networks.page(table, shown, labels))
        write_csv(folder / f"{table.name}.csv", list(map(as_row, shown)), columns=COLUMNS)
    of_converted = converted.cells(found, labels)
    texts["converted"] = markdown(converted.page(of_converted, labels))
    write_csv(folder / "converted.csv", list(map(as_row, of_converted)), columns=COLUMNS)
    of_kernels = kernels.cells(found, labels)
    texts["kernels"] = markdown(kernels.page(of_kernels, labels))
    write_csv(folder / "kernels.csv", list(map(as_row, of_kernels)), columns=COLUMNS)
    errors_by_cell = errors.summarise(found, labels)
    texts["errors"] = markdown(errors.page(errors_by_cell, labels))
    write_whole(folder / "errors.csv", errors_by_cell.to_csv(index=False, lineterminator="\n"))
    for name, text in texts.items():
        write_whole(folder / f"{name}.md", text)
    print(*(texts[name] for name in config.task.tables or texts), sep="\n", end="")
    return found
