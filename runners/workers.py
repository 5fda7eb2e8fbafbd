"""The processes of Hydra's joblib launcher, which end with the sweep, each run with its checkpoint.

the sweep receives a signal    it passes it on and waits; runs stop with a checkpoint, and no further cell begins
the sweep is killed            each worker sends SIGTERM to itself, and ends when its run has stopped
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable

from runners.errors import Terminated
from runners.training import signals

_until_the_end = contextlib.ExitStack()
_busy = threading.Lock()
"""Locked while this process runs a cell."""


def is_worker() -> bool:
    """Return whether this process was started by another one to run cells."""
    return multiprocessing.parent_process() is not None


def pass_on(number: int) -> None:
    """Send a signal to every worker of this process; without one it acts here."""
    workers = multiprocessing.active_children()
    if not workers:
        raise Terminated(number)
    for worker in workers:
        if worker.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(worker.pid, number)


def run(cell: Callable[[], int]) -> int:
    """Run a cell in a worker, unless a signal has been received.

    Args:
        cell: returns its exit code.

    Returns:
        Its exit code; 128 + n after signal n.
    """
    stop = _begun()
    with _busy:
        if stop.received is None:
            try:
                with signals.raised():
                    code = cell()
            except Terminated as end:
                code = end.exit_code
            if code > 128:
                stop.received = signal.Signals(code - 128)
            return code
    return 128 + stop.received


@functools.cache
def _begun() -> signals.Stop:
    """Begin to watch the sweep, and to remember signals that come between cells."""
    stop = _until_the_end.enter_context(signals.deferred())
    signals.end_with_the_parent(_end_when_idle)
    return stop


def _end_when_idle() -> None:
    with _busy:
        os._exit(128 + signal.SIGTERM)
