"""Stopping in good order: a signal is noted, and obeyed where the loop can."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SAME_SECONDS = 1.0
"""A signal so soon after the first is the same one: sent to a group of processes, and handed on by one of them."""


@dataclass
class Stop:
    """Whether to stop."""

    received: signal.Signals | None = None
    """The signal that asked for it."""
    at: float = 0.0
    """When, by time.monotonic."""


@contextmanager
def noted() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM instead of obeying it; one a second later does what it did before, at once.

    Outside of the main thread, which alone can handle signals, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received is None:
            stop.received, stop.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - stop.at > SAME_SECONDS:
            restore()
            os.kill(os.getpid(), number)

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
