"""runners/side_by_side.py: a sweep by several processes, which share out its cells and lose nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import assert_same_end

from runners import CONF, cli, records, side_by_side
from runners.locks import alone_in
from runners.training.checkpoints import checkpoints

CELLS = [
    "dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "gpu=cpu", "gpu.kernels=torch",
    "mode=exact,4bit", "-m",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runners", *CELLS, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is one process")
@pytest.mark.parametrize("to_group", [False, True], ids=["to the parent", "to the group, as Ctrl-C"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_process_writes_its_checkpoint_when_a_signal_comes(number: signal.Signals, to_group: bool) -> None:
    sweep = start("jobs=2", "dataset.iterations=100000", "task.evaluate_every=100000", "task.checkpoint_every=20")
    folders = [Path("results/runs") / f"digits-{mode}-depth11-width0.25-seed0" for mode in ("exact", "4bit")]
    while not all(folder.exists() and checkpoints(folder) for folder in folders):
        assert sweep.poll() is None
        time.sleep(0.1)
    (os.killpg if to_group else os.kill)(sweep.pid, number)
    _, said = sweep.communicate()
    assert sweep.returncode == 128 + number
    assert said.count(f"stopped by {number.name} at iteration") == 2
    assert not list(Path("results").glob("runs/*/*.json"))


def test_cells_are_shared_out_and_end_as_those_of_one_process() -> None:
    options = ["dataset.iterations=30", "task.evaluate_every=10", "seed=0,1"]
    sweep = start("jobs=2", *options)
    _, said = sweep.communicate()
    assert sweep.returncode == 0, said
    alone = start("results=alone", *options)
    _, said = alone.communicate()
    assert alone.returncode == 0, said
    folders = sorted(Path("alone/runs").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert_same_end(Path("results/runs") / folder.name, folder)
    told = [
        sorted((r.mode, r.seed, r.metric, r.value) for r in records.collect(Path(results)) if r.unit == "%")
        for results in ("results", "alone")
    ]
    assert told[0] == told[1] != []


@pytest.mark.parametrize(("jobs", "processes", "threads"), [(2, 2, "2"), (6, 5, "1")])
def test_a_cpu_has_no_more_processes_than_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: int, processes: int, threads: str
) -> None:
    class Process:
        def __init__(self, command: list[str], *, env: dict[str, str], start_new_session: bool) -> None:
            started.append(env["OMP_NUM_THREADS"])

        def wait(self) -> int:
            return 0

    started: list[str] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert side_by_side.run(CELLS, jobs) == 0
    assert started == [threads] * processes
    line = "jobs=6: only 5 at a time, one for each core\n"
    assert capsys.readouterr().err == (line if jobs > processes else "")


def test_a_sweep_with_any_cell_on_a_gpu_is_one_process_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(cli, "run_all", lambda configs: ran.append("one process") or 0)
    monkeypatch.setattr(cli.side_by_side, "run", lambda arguments, jobs: ran.append("processes") or 0)
    for on_cuda in ({"train"}, {"train", "memory"}, set[str]()):
        monkeypatch.setattr(cli, "is_on_cuda", lambda config, names=on_cuda: config.task.name in names)
        assert cli.main([*CELLS, "task=train,memory", "jobs=2"]) == 0
    assert ran == ["one process", "one process", "processes"]


def test_a_cell_that_another_process_is_at_is_passed_over_and_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    busy = Path("results/runs/digits-exact-depth11-width0.25-seed0")
    busy.mkdir(parents=True)
    with alone_in(busy):
        assert cli.main([*CELLS, "dataset.iterations=1"]) == 0
        err = capsys.readouterr().err
        assert "2 cells: 1 done, 0 finished before (resume=false does them again), 0 failed, 1 under way in" in err
        assert [file.name for file in busy.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*CELLS, "jobs=0"], "jobs=0 is not allowed"),
        ([*CELLS[:-2], "mode=exact", "jobs=2"], "jobs=2 is for a sweep: add -m, and name no launcher"),
        ([*CELLS, "jobs=2", "hydra/launcher=joblib"], "jobs=2 is for a sweep: add -m, and name no launcher"),
        ([*CELLS, "jobs=2", "resume=false"], "jobs=2 resume=false: each process would do every cell anew"),
    ],
)
def test_jobs_are_for_sweeps(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"blpa-run: error: {reason}")
    assert not Path("results").exists()
