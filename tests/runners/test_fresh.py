"""runners/fresh.py: what a process of its own answers, how it dies, and that it hears signals."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from joblib.externals.loky.backend.context import LokyContext

from runners import fresh
from runners.errors import Interrupted, Stopped
from runners.training import budget, signals


class Awkward(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def raise_awkward() -> None:
    raise Awkward("one", "two")


def raise_interrupted() -> None:
    raise Interrupted("stopped by SIGTERM", signal.SIGTERM)


def began_and_touched() -> tuple[float, bool, int]:
    return budget.BEGAN, torch.cuda.is_initialized(), os.getsid(0)


def wait_for_a_signal(sender: int, number: int) -> str | None:
    """Have a signal sent to another process, and see whether it comes here."""
    with signals.deferred() as stop:
        os.kill(sender, number)
        end = time.monotonic() + 20
        while stop.received is None and time.monotonic() < end:
            pass
    return stop.received and stop.received.name


def orphan(told: Path, caller: int) -> None:
    told.write_text(f"{wait_for_a_signal(caller, signal.SIGKILL)}")  # a pipe, which the test reads to its end


def call_within(told: Path) -> None:
    assert fresh.call(os.getpid) != os.getpid()
    fresh.call(orphan, told, os.getpid())


def test_a_function_answers_from_another_process_or_hands_its_error_over() -> None:
    assert fresh.call(os.getpid) not in (os.getpid(), fresh.call(os.getpid), None)
    with pytest.raises(ValueError, match="could not convert string to float: 'x'"):
        fresh.call(float, "x")
    with pytest.raises(RuntimeError, match="Awkward: one and two"):
        fresh.call(raise_awkward)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        fresh.call(raise_interrupted)
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_process_that_dies_is_named_by_its_exit_code() -> None:
    with pytest.raises(Stopped, match="ended without an answer, by exit code 7"):
        fresh.call(os._exit, 7)
    with pytest.raises(Stopped, match="ended without an answer, by exit code -9"):
        fresh.call(signal.raise_signal, signal.SIGKILL)


def test_its_minutes_are_the_command_s_and_cuda_is_untouched() -> None:
    began, is_touched, session = fresh.call(began_and_touched)
    assert began == budget.BEGAN
    assert not is_touched
    assert session != os.getsid(0)


@pytest.fixture
def obeys_sigint() -> Iterator[None]:
    """Raise KeyboardInterrupt also where a shell began this process in the background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("obeys_sigint")
def test_a_signal_is_handed_on_and_then_obeyed() -> None:
    with signals.deferred() as stop:
        assert fresh.call(wait_for_a_signal, os.getpid(), signal.SIGTERM) == "SIGTERM"
        assert stop.received is signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        fresh.call(wait_for_a_signal, os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fresh.call(os.kill, os.getpid(), signal.SIGINT)


def test_calls_are_made_within_calls_and_end_with_their_caller(tmp_path: Path) -> None:
    told = tmp_path / "pipe"
    os.mkfifo(told)
    with pytest.raises(Stopped, match="by exit code -9"):
        fresh.call(call_within, told)
    assert told.read_text() == "SIGTERM"


def test_a_worker_of_joblib_calls_functions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", LokyContext())  # as in a worker
    assert fresh.call(multiprocessing.get_start_method) == "forkserver"  # joblib's is unknown without joblib
