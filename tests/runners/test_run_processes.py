"""runners/processes.py: processes that train together, begun here or by another launcher, and how they end."""

import io
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import TINY, TinyNet, assert_same_end, last_checkpoint, refusal, tiny_config, train

from runners import cli, fresh, processes, records, run, sweep
from runners.config import Config
from runners.errors import Busy, CannotWrite, Interrupted, LostProcess, Stopped, UserError
from runners.training import signals, world
from runners.training.stopping import Stopping


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A tiny network on two processes; dataset.root says what happens to it."""
    config = tiny_config()
    gpu = replace(config.gpu, device="cpu", processes=2, timeout_minutes=0.5)
    return replace(config, gpu=gpu, results=str(tmp_path))


def acting(config: Config, what: str, **recipe: object) -> Config:
    return replace(config, dataset=replace(config.dataset, root=what, **recipe))


def folder(config: Config) -> Path:
    return Path(config.results) / "runs" / config.run


def tiny_training(config: Config) -> None:
    """Train, and in step 6 of the first attempt have process 1 send a signal to one of a pid, or 0 for itself."""
    name, _, pid = config.dataset.root.partition(" to ")

    def act(net: TinyNet) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
            os.kill(int(pid) or os.getpid(), getattr(signal, name))

    train(TinyNet({6: act} if pid else {}), folder(config), config)


def killed_before(config: Config) -> None:
    """Train, but in the first attempt kill process 1 before that."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    train(TinyNet(), folder(config), config)


def failing(config: Config) -> None:
    """Fail in the process of a rank, or in all."""
    which, _, how = config.dataset.root.partition(" ")
    errors = {
        "full": CannotWrite("cannot write x"),
        "user": UserError("no such data"),
        "memory": RuntimeError("CUDA out of memory. x"),
        "bug": KeyError(),
    }
    here = world.current()
    with here.together():
        if which in ("all", str(here.rank)):
            raise errors[how]


# ---- begun here


def test_a_process_that_is_killed_ends_the_run_with_a_sentence_or_all_begin_again(config: Config) -> None:
    killed = acting(config, "SIGKILL to 0")
    killed_by = "(was killed by SIGKILL|ended without a word)"  # as torch elastic sees its end first, or process 0's
    sentence = f"rank 1 of 2 {killed_by}, perhaps for want of memory; started again, the run goes on from "
    with pytest.raises(Stopped, match=rf"^{sentence}.*/checkpoint-4-\w+\.pt$"):
        processes.run(tiny_training, killed)
    again = replace(killed, resume=False, gpu=replace(killed.gpu, restarts=1))
    processes.run(tiny_training, again)
    never = replace(acting(config, ""), run="never-killed")
    processes.run(tiny_training, never)
    assert_same_end(folder(config), folder(never))


def test_a_run_that_begins_anew_does_so_though_it_is_killed_at_once(config: Config) -> None:
    processes.run(tiny_training, config)
    before = last_checkpoint(folder(config))["progress"]["seconds"]
    processes.run(killed_before, replace(config, resume=False, gpu=replace(config.gpu, restarts=1)))
    assert last_checkpoint(folder(config))["progress"]["seconds"] != before


@pytest.mark.parametrize("what", ["1 user", "0 full"])
def test_what_another_start_would_not_mend_is_not_tried_again(
    what: str, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UserError, CannotWrite), match=r"no such data|cannot write x"):
        processes.run(failing, acting(replace(config, gpu=replace(config.gpu, restarts=3)), what))
    assert "begin again" not in capfd.readouterr().err


def test_a_reason_of_its_own_is_told_although_a_signal_came(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def received(send: object) -> Iterator[list[int]]:
        yield [signal.SIGTERM]

    monkeypatch.setattr(signals, "passed_on", received)
    with pytest.raises(Stopped, match="cannot write x"):
        processes.run(failing, acting(config, "0 full"))
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        processes.run(failing, acting(config, "nobody"))


def test_a_signal_that_another_process_received_is_not_the_first_of_two() -> None:
    """One's own comes a little later, and is the same."""

    class Two(world.World):
        def largest(self, *values: int) -> list[int]:
            return [1, 0, signal.SIGTERM, 1]

    with signals.deferred() as stop:
        assert Stopping(stop, None).agree(Two(1, 2), 1) == (True, 1)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("to", ["the launcher", "a process"])
def test_a_signal_to_any_process_stops_all_at_one_iteration(to: str, config: Config) -> None:
    config = acting(config, f"SIGTERM to {os.getpid() if to == 'the launcher' else 0}", iterations=2000)
    config = replace(config, task=replace(config.task, checkpoint_every=10_000, evaluate_every=10_000))
    with pytest.raises(Interrupted, match="stopped by SIGTERM at iteration ") as caught:
        processes.run(tiny_training, config)
    assert caught.value.exit_code == 143
    assert len(list(folder(config).glob("checkpoint-*"))) == 1
    iteration = last_checkpoint(folder(config))["progress"]["iteration"]
    assert f" {iteration} of 2000; " in str(caught.value)
    assert 6 <= iteration < 2000


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("1 user", UserError, "no such data"),
        ("all user", UserError, "no such data"),
        ("0 memory", Stopped, "rank 0 of 2: does not fit: CUDA out of memory. x; there is no checkpoint yet"),
        ("1 bug", Stopped, "rank 1 of 2: KeyError; there is no checkpoint yet"),
    ],
    ids=str,
)
def test_the_reason_is_that_of_the_process_that_failed(
    what: str, error: type[Stopped], message: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        processes.run(failing, acting(config, what))
    assert type(caught.value) is error
    assert ("in failing" in capsys.readouterr().err) == ("bug" in what)  # its traceback


LOST = LostProcess("another process ended")
LATE = LostProcess("another process did not answer")
LATE.has_waited = True


@pytest.mark.parametrize(
    ("failures", "exit_codes", "reason"),
    [
        ({0: LOST, 1: UserError("no such data")}, {0: 1}, UserError("no such data")),
        ({0: LOST}, {1: -signal.SIGSEGV}, Stopped("rank 1 of 2 was killed by SIGSEGV")),
        ({}, {1: -signal.SIGKILL}, Stopped("rank 1 of 2 was killed by SIGKILL, perhaps for want of memory")),
        ({1: LOST}, {1: 1}, Stopped("rank 0 of 2 ended without a word, perhaps for want of memory")),
        ({0: LATE}, {0: 1}, LostProcess("rank 1 of 2 did not answer the others for gpu.timeout_minutes=0.5")),
        ({0: LOST, 1: Interrupted("stopped", signal.SIGTERM)}, {0: 1}, Interrupted("stopped", signal.SIGTERM)),
        ({0: LOST, 1: LOST}, {0: 1}, LOST),
    ],
)
def test_one_reason_is_named_for_all(
    failures: dict[int, Exception], exit_codes: dict[int, int], reason: Exception, config: Config, tmp_path: Path
) -> None:
    notes = processes.Notes(tmp_path)
    for rank, error in failures.items():
        notes.fail(rank, 1, error)
    named = processes._reason(config, notes, 1, exit_codes)
    assert (type(named), str(named)) == (type(reason), str(reason))


def test_each_process_has_a_gpu(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = replace(config, gpu=replace(config.gpu, device="auto", processes=8))
    with pytest.raises(
        UserError, match=r"^gpu\.processes=8: this machine has 2 GPUs; on several machines torchrun or "
    ):
        processes.run(tiny_training, asked)


# ---- begun by another launcher


FAILING = """
from runners.data import digits
from runners.errors import UserError
from runners.training import world

def read(config):
    if config.root == str(world.current().rank):
        raise RuntimeError("CUDA out of memory. x")
    return digits.read(config)
"""


def command(environment: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it writes on stderr."""
    os.environ.update(environment)
    with redirect_stderr(io.StringIO()) as text:
        code = cli.main(arguments)
    return code, text.getvalue()


def joined(arguments: list[str]) -> list[tuple[int, str]]:
    """What each of two processes answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fresh.call, command, common | {"RANK": r, "LOCAL_RANK": r}, arguments) for r in "01"]
    return [one.result() for one in both]


def test_processes_of_another_launcher_are_joined_and_one_of_them_writes_and_prints(tmp_path: Path) -> None:
    (tmp_path / "reads.py").write_text(FAILING)
    arguments = [*TINY[:-1], f"results={tmp_path}", f"--config-dir={tmp_path}", "dataset.reader=reads"]
    (first, printed), second = joined(arguments)
    assert first == 0, printed
    assert second == (0, "")
    assert len(records.collect(tmp_path)) == 3
    (run_dir,) = tmp_path.glob("runs/*-processes2-*")
    with run.locked(run_dir):
        (first, printed), second = joined(arguments)
    assert (first, printed.count("\n")) == (Busy.exit_code, 1)
    assert "another process is working on" in printed
    assert second == (Busy.exit_code, "")
    (first, printed), second = joined([*arguments, "resume=false", "dataset.root=1"])
    assert second == (1, "blpa-run: error: rank 1 of 2: does not fit: CUDA out of memory. x\n")
    assert (first, printed.splitlines()[-1]) == (
        1, "blpa-run: error: rank 1: does not fit: CUDA out of memory. x; started again, the run goes on from "
        f"{next(run_dir.glob('checkpoint-*'))}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "seed=0,1"], "-m is not allowed in WORLD_SIZE=2 processes: "),
        (["gpu.processes=4"], "gpu.processes=4, but WORLD_SIZE=2 processes were launched: leave gpu.processes out"),
        (["task=tables"], "gpu.processes=2 is not allowed for task=tables: it is for "),
        (["dataset.batch_size=3"], "gpu.processes=2 does not divide dataset.batch_size=3, "),
    ],
    ids=str,
)
def test_mistakes_are_printed_by_one_of_the_processes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert refusal(arguments, capsys).startswith(f"blpa-run: error: {message}")
    monkeypatch.setenv("RANK", "1")
    assert refusal(arguments, capsys) == ""
    monkeypatch.delenv("MASTER_ADDR")  # left over in a shell
    assert refusal(arguments, capsys).startswith(f"blpa-run: error: {message}")


def test_a_rank_is_the_number_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK=2 and WORLD_SIZE=2: "):
        processes.launched()
    monkeypatch.setenv("WORLD_SIZE", "1")  # nobody to join
    assert processes.launched() is None


def test_jobs_have_as_many_tasks_as_their_cells_have_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=4"]
    message = refusal([*TINY, "dataset.batch_size=16", *tasks], capsys)
    assert "=2 with hydra.launcher.tasks_per_node=4 starts 8 processes for each cell: give gpu.processes=8" in message
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    job = {"NTASKS": "8", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[3-4]", "PROCID": "5", "LOCALID": "1", "JOB_ID": "7"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in (*world.VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "of the command that submitted the job")
    monkeypatch.delenv("MASTER_PORT")  # it would stay
    sweep._join_the_job()
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n3"
    }  # fmt: skip
    assert processes.number(8) == 8
