"""Stopping in good order: a signal is noted, and obeyed where the loop can, or handed on to the process that computes.

Outside of the main thread, which alone can handle signals, both leave them alone.
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
    """Note the first SIGINT or SIGTERM instead of obeying it; one a second later does what it did before, at once."""
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
def handed_on(send: Callable[[int], object]) -> Iterator[list[int]]:
    """Hand every SIGINT or SIGTERM on instead of obeying it.

    Args:
        send: is given its number.

    Yields:
        The numbers of those that came.
    """
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    with _handled(hand_on):
        yield received


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Let a function handle both signals; yields what gives back their handlers before the end does."""
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
