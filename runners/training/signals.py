"""Handle SIGINT and SIGTERM later, where a loop can stop, or pass them to the process that computes.

Only the main thread can handle signals: in other threads both context managers change nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SAME_SECONDS = 1.0
"""A second signal within this time is the first one again: a group of processes received it, and one passed it on."""


@dataclass
class Stop:
    """Whether to stop."""

    received: signal.Signals | None = None
    """The signal that asked for it."""
    at: float = 0.0
    """When, by time.monotonic."""


@contextmanager
def deferred() -> Iterator[Stop]:
    """Remember the first SIGINT or SIGTERM, so that a loop can stop cleanly; a second one, later, acts at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received is None:
            stop.received, stop.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - stop.at > SAME_SECONDS:
            restore()
            os.kill(os.getpid(), number)

    with _handled(note) as restore:
        yield stop


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[list[int]]:
    """Pass every SIGINT or SIGTERM on instead of obeying it.

    Args:
        send: called with the signal's number.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    with _handled(hand_on):
        yield received


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Let a function handle both signals; yields a function that restores their handlers earlier than the end."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()
