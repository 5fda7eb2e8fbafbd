"""runners/launch.py: sweeps by Hydra's launchers, each cell in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from runners import CONF, cli, records
from runners.errors import OutOfTime
from runners.training import budget

TINY = ["dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "dataset.iterations=1", "gpu=cpu", "-m"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runners", *TINY, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("launcher", [["joblib", "n_jobs=2"], ["submitit_local", "timeout_min=5"]], ids=lambda x: x[0])
def test_every_cell_leaves_its_records_and_finished_ones_are_left_out(
    launcher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, option = launcher
    chosen = [f"hydra/launcher={name}", f"hydra.launcher.{option}"]
    done = launch("mode=exact,4bit", *chosen)
    assert done.returncode == 0, done.stderr
    results = Path("results")
    assert {record.mode for record in records.collect(results)} == {"exact", "4bit"}
    assert [path.name for path in Path.cwd().iterdir()] == ["results"]
    before = {file: file.stat().st_mtime_ns for file in results.glob("runs/*/records.json")}
    assert cli.main([*TINY, "mode=exact,4bit", *chosen]) == 0
    assert capsys.readouterr().err.startswith("2 cells, 2 finished before\n2 cells: 0 done, ")
    assert before == {file: file.stat().st_mtime_ns for file in results.glob("runs/*/records.json")}


LATE = """
import time
from runners.data import digits
from runners.training import budget

def read(config):
    budget.BEGAN = time.monotonic() - 599
    return digits.read(config)
"""
"""A reader of data that takes all but a second of ten minutes."""


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """What joblib begins in this process, and keeps for later launches, ends with this module."""
    yield
    get_reusable_executor().shutdown(kill_workers=True)


@pytest.fixture
def joblib(workers: None) -> list[str]:
    """How to launch two jobs at a time from this process; the workers may have begun in another test's folder."""
    return ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"results={Path.cwd() / 'results'}"]


def test_a_budget_stops_the_runs_of_every_job_and_they_go_on(
    joblib: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own").mkdir()
    Path("own/late.py").write_text(LATE)
    monkeypatch.setattr(budget, "BEGAN", time.monotonic())
    late = [f"--config-dir={Path.cwd() / 'own'}", "dataset.reader=late", "budget_minutes=10"]
    cells = [*TINY, *late, "dataset.iterations=3"]
    assert cli.main([*cells, "mode=exact,4bit", *joblib]) == OutOfTime.exit_code
    err = capfd.readouterr().err
    assert err.count("budget_minutes=10 are over at iteration 1 of 3") == 2
    assert "2 cells: 0 done, 0 finished before (resume=false does them again), 0 failed, 2 left when " in err
    for mode in ("exact", "4bit"):
        assert cli.main([*cells, f"mode={mode}"]) == OutOfTime.exit_code
        err = capfd.readouterr().err
        assert "going on from" in err
        assert "budget_minutes=10 are over at iteration 2 of 3" in err
        monkeypatch.setattr(budget, "BEGAN", time.monotonic())
    assert not list(Path("results").glob("runs/*/*.json"))


def test_a_cell_that_fails_is_recorded_and_does_not_stop_the_rest(
    joblib: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["task=gradient-error", "task.steps=1", "mode=fewer-features,4bit"]
    assert cli.main([*TINY, *arguments, *joblib]) == 1
    assert "blpa-run: error: failed: " in capfd.readouterr().err.splitlines()[-1]
    found = records.collect(Path("results"))
    assert {(record.mode, bool(record.failure)) for record in found} == {("fewer-features", True), ("4bit", False)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra/launcher=jobib"], "hydra/launcher=jobib is not allowed (did you mean joblib?); choose one of basic, "),
        (["hydra/launcher=joblib", "hydra.launcher.n_jbos=2"], "unknown key 'hydra.launcher.n_jbos' (did you mean n_"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=many"], "hydra.launcher.n_jobs: Value 'many'"),
        (["hydra/launcher=joblib,basic"], "hydra/launcher=joblib,basic is not allowed: one launcher runs the whole"),
        (["hydra/launcher=joblib", "seed=0,-1"], "seed=-1 is not allowed"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TINY, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"blpa-run: error: {message}")
    assert list(Path.cwd().iterdir()) == []


def test_slurm_that_is_not_there_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main([*TINY, "seed=0,1", "hydra/launcher=submitit_slurm"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "2 cells, 0 finished before"
    assert err[1].startswith("blpa-run: error: Could not detect")
