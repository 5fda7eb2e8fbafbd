"""Call a function in a fresh process, which has not used the GPU.

A process that has used CUDA does not return to its first state: its context takes memory, its allocator caches blocks,
and a failed kernel or capture can make CUDA unusable. The calling process makes no CUDA context.

Processes are forked from a server that has imported torch and computed nothing.
"""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import (
    forkserver,
    get_all_start_methods,
    get_context,
    get_start_method,
    resource_tracker,
    set_start_method,
)
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from runners import printing
from runners.errors import Stopped, UserError
from runners.training import budget, signals

IMPORTED_AHEAD = ["runners.cli", "runners.training.network", "runners.training.loop"]
"""Modules that the server imports once; none of them touches a GPU."""


def server() -> ForkServerContext:
    """Start the server, unless it runs, and return the context of the processes that it forks.

    The server has signals blocked: a terminal or Slurm sends them to it too, and it ends with its caller. So has the
    tracker of multiprocessing's resources, and have the processes that it forks, which unblock them when they are ready
    (signals.unblock).
    """
    if get_start_method() not in get_all_start_methods():  # joblib's, in its workers: processes would look for it
        set_start_method("forkserver", force=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_AHEAD)
    with signals.blocked():
        resource_tracker.ensure_running()
    with signals.blocked():  # again: starting the tracker unblocks some
        forkserver.ensure_running()
    return context


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process and wait for it.

    A signal received in the meantime is passed on to that process, and takes effect here once it has ended. If this
    process ends first, the other one receives SIGTERM.

    Args:
        function: importable by name, like the types of its arguments. It may use `call` itself.
        arguments: its arguments.

    Returns:
        The function's result.

    Raises:
        Exception: the function's exception, or a RuntimeError that names it if it cannot be pickled.
        Stopped: the process died without an answer.
    """
    context = server()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, budget.BEGAN, function, arguments), daemon=False)
    has_begun = False

    def send(number: int) -> None:
        if has_begun and process.pid is not None:
            with suppress(ProcessLookupError):  # the process has just ended
                os.kill(process.pid, number)

    sys.stdout.flush()
    with signals.passed_on(send) as received:
        process.start()
        sending.close()
        answer = _received(receiving)
        if answer is not None:  # the process has begun
            has_begun = True
            for number in received:
                send(number)
            answer = _received(receiving)
        process.join()
    if received:
        signal.raise_signal(received[0])
    if answer is None:
        raise Stopped(f"a process ended without an answer, by exit code {process.exitcode}")
    returned, error = answer
    if error is not None:
        raise error
    return returned


def _received(receiving: Connection) -> tuple[Any, Exception | None] | None:
    """Return the next object sent; None where the sending process has ended."""
    try:
        answer: tuple[Any, Exception | None] = receiving.recv()
    except EOFError:
        return None
    return answer


@printing.tolerant()
def _answer(sending: Connection, began: float, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Call the function and send its result or exception."""
    os.setsid()  # so that Ctrl-C reaches this process only through the caller
    signals.unblock()
    signals.end_with_the_parent()
    budget.BEGAN = began
    returned, error = None, None
    try:
        sending.send((None, None))
        returned = function(*arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as raised:
        if not isinstance(raised, UserError | Stopped):
            traceback.print_exc()  # the pipe does not carry the traceback
        error = _portable(raised)
    with suppress(BrokenPipeError):  # the caller has ended
        sending.send((returned, error))


def _portable(error: Exception) -> Exception:
    """Return the exception if it can be pickled, else a RuntimeError that names it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
