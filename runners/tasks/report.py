"""One page with every table, figure and record, to send to a colleague: results/report.html."""

from dataclasses import dataclass
from pathlib import Path

from runners import records
from runners.config import Config
from runners.files import write_whole
from runners.records import Record
from runners.reporting import report
from runners.reporting.labels import read_labels
from runners.tasks import plots


@dataclass
class Settings:
    """Of this task."""

    name: str


def run(config: Config) -> list[Record]:
    """Collect every record, draw every figure and write the page.

    Args:
        config: `results` is the folder of runs, records and figures.

    Returns:
        Every record.
    """
    results = Path(config.results)
    found = records.collect(results)
    plots.run(config)
    file = results / "report.html"
    write_whole(file, report.render(found, sorted((results / "figures").glob("*.png")), read_labels(config.config_dir)))
    print(file)
    return found
