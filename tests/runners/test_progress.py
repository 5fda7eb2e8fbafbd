"""runners/tasks/progress.py: how far runs are, and that they can be moved."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import assert_same_end

from runners import CONF, cli
from runners.errors import OutOfTime
from runners.training import budget, checkpoints

CELLS = ["dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "dataset.iterations=4", "gpu=cpu", "-m"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "BEGAN", time.monotonic())


def test_runs_carried_elsewhere_go_on_as_if_they_had_never_moved(capsys: pytest.CaptureFixture[str]) -> None:
    queue = [*CELLS, "mode=4bit,exact", "task.evaluate_every=2"]
    assert cli.main([*CELLS, "mode=4bit", "seed=0", "task.evaluate_every=2"]) == 0
    for _ in range(3):
        assert cli.main([*queue, "budget_minutes=0.01"]) == OutOfTime.exit_code
    capsys.readouterr()
    assert cli.main(["task=progress"]) == 0
    out = capsys.readouterr().out
    assert out.split()[:9] == ["|", "run", "|", "iterations", "|", "of", "|", "test", "error"]
    finished, under_way = (line.split() for line in out.splitlines()[2:4])
    assert finished[1:6] == ["digits-4bit-depth11-width0.25-seed0", "|", "4", "|", "4"]
    assert under_way[1:6] == ["digits-exact-depth11-width0.25-seed0", "|", "3", "|", "4"]
    assert Path(under_way[-2]).name.startswith("checkpoint-3-")
    shutil.copytree("results", "carried")
    assert cli.main([*queue, "results=carried"]) == 0
    err = capsys.readouterr().err
    assert "2 cells: 1 done, 1 finished before" in err
    assert "going on from carried/runs/digits-exact-depth11-width0.25-seed0/checkpoint-3-" in err
    assert cli.main([*queue, "mode=exact", "results=whole"]) == 0
    name = "runs/digits-exact-depth11-width0.25-seed0"
    assert_same_end(Path("carried", name), Path("whole", name))


def test_a_run_begun_anew_is_under_way_though_it_was_finished_before(capsys: pytest.CaptureFixture[str]) -> None:
    run = [argument for argument in CELLS if argument != "-m"]
    assert cli.main([*run, "task.keep_every=2"]) == 0
    (run_dir,) = Path("results/runs").iterdir()
    assert cli.main([*run, "resume=false", "budget_minutes=0.01"]) == OutOfTime.exit_code
    capsys.readouterr()
    assert cli.main(["task=progress"]) == 0
    assert f"| {run_dir.name} | 1          | 4  | -" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_not_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*(argument for argument in CELLS if argument != "-m"), "budget_minutes=0.01"]
    for _ in range(2):
        assert cli.main(run) == OutOfTime.exit_code
    (run_dir,) = Path("results/runs").iterdir()
    before, newest = checkpoints.checkpoints(run_dir)
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    assert cli.main(["task=progress"]) == 0
    assert f" {before} |" in capsys.readouterr().out


def test_no_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=progress"]) == 0
    assert capsys.readouterr().out == "no training run under results/runs has come to a checkpoint yet\n"
    assert not Path("results").exists()


def test_checkpoints_to_be_kept_are_no_later_one_s_to_replace() -> None:
    run = [*(argument for argument in CELLS if argument != "-m"), "dataset.iterations=8", "task.keep_every=3"]
    assert cli.main([*run, "task.checkpoint_every=1"]) == 0
    (run_dir,) = Path("results/runs").iterdir()
    assert [checkpoints.iteration_of(file) for file in checkpoints.checkpoints(run_dir)] == [3, 6, 7, 8]
    assert cli.main([*run, "results=others"]) == 0  # they are written even where no other one is
    (run_dir,) = Path("others/runs").iterdir()
    assert [checkpoints.iteration_of(file) for file in checkpoints.checkpoints(run_dir)] == [3, 6, 8]


def test_make_train_table_goes_on_call_by_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A call ends in time, and the next one, here of the command that make's own line is, leaves nothing."""
    cells = "dataset=digits depth=11 width=0.25 dataset.iterations=2 seed=0 mode=4bit gpu=cpu gpu.kernels=torch"
    command = ["make", "train-table", f"PYTHON={sys.executable}", f"OUT={tmp_path}/queue", f"CELLS={cells}"]
    done = subprocess.run([*command, "BUDGET_MINUTES=0.01"], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode != 0, done.stderr
    assert f"Error {OutOfTime.exit_code}" in done.stderr
    assert "budget_minutes=0.01 are over at iteration 1 of 2" in done.stderr
    assert "| table1-digits-4bit-depth11-width0.25-tf32-seed0 | 1 " in done.stdout
    assert "(n=1)" not in done.stdout
    (line,) = re.findall(r"^.* -m runners (experiment=.*); code=", done.stdout, re.MULTILINE)
    assert cli.main(shlex.split(line)) == 0
    assert cli.main(["task=tables", "task.tables=[errors]", "results=queue"]) == 0
    assert "(n=1)" in capsys.readouterr().out
