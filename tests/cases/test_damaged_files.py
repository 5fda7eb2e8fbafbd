"""A few of the damages that fuzz.py tries, always the same ones."""

from pathlib import Path

import fuzz
import pytest

from runners.reporting import figures
from runners.reporting.labels import read_labels
from runners.tasks import plots, tables

COUNT = 40
"""Damages of each file; fuzz.py tries as many as it is told to."""

LABELS = read_labels()


@pytest.mark.parametrize("name", fuzz.CASES)
def test_a_file_that_a_disk_an_editor_or_a_merge_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, results, name: results / name)  # pictures would take most of it
    for task in (plots, tables):
        monkeypatch.setattr(task, "read_labels", lambda config_dir: LABELS)
    outcomes, wrong = fuzz.fuzz(fuzz.CASES[name], COUNT, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert outcomes.total() == COUNT
    assert outcomes["refused"]
    assert outcomes["accepted"]
