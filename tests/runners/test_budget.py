"""budget.py and what heeds it: training runs stop in time, sweeps begin no cell too many, nothing is lost."""

import time
from pathlib import Path

import pytest
import torch
from support import GRADIENTS, TINY, assert_same_end

from runners import cli, provenance, records
from runners import run as run_module
from runners.config import Config
from runners.errors import OutOfTime
from runners.training import budget

TRAINING = [*TINY, "dataset.iterations=3"]


@pytest.fixture(autouse=True)
def a_process_that_just_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "BEGAN", time.monotonic())


def measured(results: str) -> list[tuple[object, ...]]:
    """What the records tell but for times and names of folders."""
    told = ("test_error_percent", "train_loss")
    found = records.collect(Path(results))
    return sorted((r.mode, r.seed, r.metric, r.iterations, r.value) for r in found if r.metric in told)


def test_no_budget_is_no_end() -> None:
    assert budget.seconds_left(None) == float("inf")
    assert 59 < budget.seconds_left(1) <= 60


def test_a_training_run_stops_in_time_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A budget of less than a run keeps for its end: each call makes one step."""
    alone = [argument for argument in TRAINING if argument != "-m"]
    for iteration in (1, 2):
        assert cli.main([*alone, "budget_minutes=0.01"]) == OutOfTime.exit_code
        err = capsys.readouterr().err
        assert f"budget_minutes=0.01 are over at iteration {iteration} of 3; started again, the run goes on" in err
    assert cli.main([*alone, "budget_minutes=0.01"]) == 0
    assert cli.main([*alone, "results=whole"]) == 0
    assert measured("results") == measured("whole") != []


def test_a_queue_that_is_stopped_again_and_again_ends_as_one_that_never_was(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [*TINY, "dataset.iterations=2", "mode=4bit,exact,8bit"]
    calls = 1
    while cli.main([*cells, "budget_minutes=0.01"]) == OutOfTime.exit_code:
        calls += 1
    assert calls == 3 * 2  # cells and steps: the last step of a cell ends its call, for what is left is too little
    err = capsys.readouterr().err
    assert "3 cells: 0 done, 0 finished before (resume=false does them again), 0 failed, 3 left when budget" in err
    assert "3 cells: 1 done, 1 finished before (resume=false does them again), 0 failed, 1 left when budget" in err
    assert not list(Path("results").glob("runs/*/failure.json"))
    assert cli.main([*cells, "results=whole"]) == 0
    assert measured("results") == measured("whole") != []
    for folder in Path("whole/runs").iterdir():
        assert_same_end(Path("results/runs") / folder.name, folder)


def test_a_sweep_begins_no_cell_that_might_not_end_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells of 100 seconds each: after two of them a third would end at 300, which is more than 4.5 minutes."""
    now = [0.0]

    def run_cell(config: Config, **_: object) -> int:
        now[0] += 100
        return 0

    monkeypatch.setattr(budget, "BEGAN", 0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_module, "run_cell", run_cell)
    assert cli.main([*GRADIENTS, "mode=exact,8bit,4bit,2bit", "budget_minutes=4.5"]) == OutOfTime.exit_code
    err = capsys.readouterr().err
    assert "4 cells: 2 done, 0 finished before" in err
    assert "2 left when budget_minutes=4.5 were over" in err
    now[0] = 0  # training runs can stop, and so the third begins
    assert cli.main([*TINY, "mode=exact,8bit,4bit,2bit", "budget_minutes=4.5"]) == OutOfTime.exit_code
    assert "4 cells: 3 done" in capsys.readouterr().err


def test_a_budget_is_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "mode=exact", "budget_minutes=0"]) == 2
    assert "budget_minutes=0.0 is not allowed: it is a number above 0" in capsys.readouterr().err


def test_a_run_in_parts_names_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [argument for argument in TRAINING if argument != "-m"]
    assert cli.main([*alone, "budget_minutes=0.01"]) == OutOfTime.exit_code
    here = provenance.provenance(torch.device("cpu"))["device"]
    monkeypatch.setattr(provenance, "_cpu_name", lambda: "another")
    assert cli.main([*alone, "budget_minutes=0.01"]) == OutOfTime.exit_code
    assert cli.main(alone) == 0
    there = provenance.provenance(torch.device("cpu"))["device"]
    assert {record.device for record in records.collect(Path("results"))} == {f"{here}; {there}"}
