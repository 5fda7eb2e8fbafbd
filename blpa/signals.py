"""Stopping in good order: a signal is noted, and obeyed where the loop can."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether to stop."""

    received: signal.Signals | None = None
    """The signal that asked for it."""


@contextmanager
def noted() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM instead of obeying it; a second one does what it did before, at once.

    Outside of the main thread, which alone can handle signals, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.received = signal.Signals(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
