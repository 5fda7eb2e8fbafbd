"""Signals that ask a process to end: Ctrl-C, kill, a closed terminal, and a scheduler's notice before its time limit.

    raised       outside of training they end the command, as Python does at Ctrl-C
    deferred     a loop stops when it can, with a checkpoint
    passed_on    they go to the process that computes

A signal that is ignored when the command begins stays ignored, as SIGHUP is under nohup. SIGINT is the exception: a
script ignores it for what it starts with &, and a run that computes there should stop with the script.

Only the main thread can handle signals: in other threads the three change nothing.
"""

import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from runners.errors import Terminated

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
NUMBERS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
"""Those that the system has: Windows has two."""

SAME_SECONDS = 1.0
"""A second signal within this time counts as the first: a process group received it, and one process passed it on."""

WATCHING_SECONDS = 0.5
"""Time between two looks at whether the parent still runs, where the system does not report its end."""


@dataclass
class Stop:
    """A request to stop."""

    received: signal.Signals | None = None
    """The first signal received, if any."""
    at: float = 0.0
    """When it was received, by time.monotonic."""


@contextmanager
def raised() -> Iterator[None]:
    """Raise Terminated at a signal."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    with _handled(terminate):
        yield


@contextmanager
def deferred() -> Iterator[Stop]:
    """Remember the first signal, so that a loop can stop cleanly; a second one acts at once."""
    stop = Stop()

    def remember(number: int, frame: FrameType | None) -> None:
        if stop.received is None:
            stop.received, stop.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - stop.at > SAME_SECONDS:
            restore()
            os.kill(os.getpid(), number)

    with _handled(remember) as restore:
        yield stop


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[list[int]]:
    """Pass every signal on instead of acting on it.

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
    """Install a handler for all signals; yield a function that restores the previous handlers before the end."""

    def handle(number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            _leave_the_terminal()
        handler(number, frame)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in NUMBERS if _is_obeyed(number)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()


def _is_obeyed(number: signal.Signals) -> bool:
    """Return whether a signal is to be handled: not where it is ignored, or handled by other than Python."""
    handler = signal.getsignal(number)
    return number == signal.SIGINT or handler not in (signal.SIG_IGN, None)


def _leave_the_terminal() -> None:
    """Discard output to a terminal that was closed: each write would fail, also before the checkpoint."""
    for descriptor in (1, 2):
        try:
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        except OSError:  # the command was started without that output
            continue
        if is_device and not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back; a process that begins here holds them back for good."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Let through the signals that were held back."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def end_with_the_parent(then: Callable[[], object] = lambda: None) -> None:
    """Have a process of multiprocessing, or of joblib, send itself SIGTERM when its parent ends, however that ends.

    Args:
        then: called after that, in a thread.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        if parent.sentinel is None:  # joblib's
            while os.getppid() == parent.pid:
                time.sleep(WATCHING_SECONDS)
        else:
            parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        then()

    threading.Thread(target=watch, daemon=True).start()
