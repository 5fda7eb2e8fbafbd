"""The first signal is noted, the second obeyed."""

import os
import signal
import threading
from types import FrameType

import pytest

from runners.training import signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_obeyed(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    obeyed: list[int] = []

    def obey(number: int, frame: FrameType | None) -> None:
        obeyed.append(number)

    before = signal.signal(number, obey)
    try:
        with signals.deferred() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received is number
            os.kill(os.getpid(), number)  # the same one, which somebody handed on
            assert obeyed == []
            stop.at -= 2 * signals.SAME_SECONDS
            os.kill(os.getpid(), number)
            assert obeyed == [number]
        assert signal.getsignal(number) is obey
    finally:
        signal.signal(number, before)


def test_handlers_are_restored_where_no_signal_came() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals.deferred():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    within: list[object] = []

    def work() -> None:
        with signals.deferred() as stop:
            within.extend([stop.received, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [None, before]
