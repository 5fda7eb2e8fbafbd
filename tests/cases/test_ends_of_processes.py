"""Commands that are ended from outside, by a closed terminal, a scheduler or a kill; alone, in sweeps, in workers."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import TINY, TinyNet, assert_same_end, train

from runners import CONF, cli, errors, fresh, workers
from runners.config import Config
from runners.tasks import train as train_task

OTHERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]

READER = """
import os, signal, threading
from pathlib import Path
from runners.data import digits

def kill_the_sweep():
    while len(list(Path("results").glob("runs/*/metrics.csv"))) < 2:
        threading.Event().wait(0.02)
    os.kill(os.getppid(), signal.SIGKILL)

def read(config):
    threading.Thread(target=kill_the_sweep).start()
    return digits.read(config)
"""
"""A reader of data; when two runs train, their sweep is killed."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


def ended_by(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a signal arrive in each cell, outside of training; the seeds of the cells that began."""
    seeds = []

    def run(config: Config) -> None:
        seeds.append(config.seed)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(train_task, "run", run)
    return seeds


@pytest.mark.parametrize("number", OTHERS)
def test_a_run_that_was_told_to_end_and_started_again(tmp_path: Path, number: signal.Signals) -> None:
    train(TinyNet(), tmp_path / "reference")
    with pytest.raises(errors.Interrupted, match=f"^stopped by {number.name} at iteration 7 of 12; ") as caught:
        train(TinyNet({7: lambda net: os.kill(os.getpid(), number)}), tmp_path / "run")
    assert caught.value.exit_code == 128 + number
    resumed = TinyNet()
    train(resumed, tmp_path / "run")
    assert resumed.step == 5
    assert_same_end(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *OTHERS])
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]], ids=str)
def test_a_command_that_was_told_to_end_outside_of_training(
    number: signal.Signals, sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds, before = ended_by(number, monkeypatch), signal.getsignal(number)
    assert cli.main(sweep) == 128 + number
    assert seeds == [0]
    assert capsys.readouterr().err.splitlines()[-1] == f"blpa-run: error: stopped by {number.name}"
    assert signal.getsignal(number) == before


def test_a_run_under_nohup_whose_terminal_was_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN):
        train(TinyNet({7: lambda net: os.kill(os.getpid(), signal.SIGHUP)}), tmp_path)
        seeds = ended_by(signal.SIGHUP, monkeypatch)
        assert cli.main(["-m", "seed=0,1"]) == 0
        assert seeds == [0, 1]


def test_a_terminal_that_was_closed_under_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its progress bar goes nowhere, and the checkpoint is written."""
    emulator, terminal = pty.openpty()
    before = os.dup(2)
    os.dup2(terminal, 2)

    def close(net: TinyNet) -> None:
        os.close(emulator)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(2, b"x")
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(2, b"x")

    try:
        with pytest.raises(errors.Interrupted, match="checkpoint-7-"):
            train(TinyNet({7: close}), tmp_path)
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(terminal)


def test_one_job_at_a_time_that_was_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = ended_by(signal.SIGUSR1, monkeypatch)
    assert cli.main(["hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "seed=0,1", "-m"]) == 128 + signal.SIGUSR1
    assert seeds == [0]


def test_a_sweep_of_two_jobs_that_was_killed() -> None:
    """Both runs write a checkpoint, no further cell begins, and no process is left: stderr is read to its end."""
    Path("own").mkdir()
    Path("own/killing.py").write_text(READER)
    own = ["--config-dir=own", "dataset.reader=killing", "dataset.iterations=1000000000"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "runners", *TINY, "mode=exact", "seed=0,1,2,3", *own, *launcher]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.count("stopped by SIGTERM at iteration ") == 2
    assert len(list(Path("results/runs").iterdir())) == 2
    assert len(list(Path("results/runs").glob("*/checkpoint-*"))) == 2


def codes_of_a_worker(number: int, *, is_idle: bool) -> list[int]:
    """Have a signal arrive during the second of four cells, or after it; their exit codes."""

    def cell() -> int:
        begun.append(True)
        if len(begun) == 2 and not is_idle:
            os.kill(os.getpid(), number)
        return 0

    begun: list[bool] = []
    codes = [workers.run(cell), workers.run(cell)]
    if is_idle:
        os.kill(os.getpid(), number)
    codes += [workers.run(cell), workers.run(cell)]
    assert len(begun) == 2
    return codes


def test_a_job_that_was_told_to_end_begins_no_further_cell() -> None:
    number = signal.SIGTERM
    assert fresh.call(partial(codes_of_a_worker, is_idle=False), number) == [0, *[128 + number] * 3]
    assert fresh.call(partial(codes_of_a_worker, is_idle=True), number) == [0, 0, *[128 + number] * 2]
