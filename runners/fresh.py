"""Call a function in a process of its own, where nothing is on the GPU yet.

What a process does with CUDA stays with it: its context takes memory, its allocator keeps blocks, and after a kernel or
a capture that fails CUDA can be unusable. The process that calls makes no CUDA context.

Processes are forked from a server that has imported torch and computed nothing.
"""

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

from runners.errors import Stopped, UserError
from runners.training import budget, signals

IMPORTED_AHEAD = ["runners.cli", "runners.training.network", "runners.training.loop"]
"""Modules that the server imports, once; none of them asks for a GPU."""


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process and wait for it.

    A signal received meanwhile is passed on to that process, and takes effect here when it has ended. If this process
    ends first, the other one receives SIGTERM.

    Args:
        function: importable by its name, as are the types of the arguments. It may use `call` itself.
        arguments: its arguments.

    Returns:
        What it returned.

    Raises:
        Exception: what it raised, or a RuntimeError that names it where it cannot be pickled.
        Stopped: the process died without an answer.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_AHEAD)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, budget.BEGAN, function, arguments), daemon=False)
    has_begun = False

    def send(number: int) -> None:
        if has_begun and process.pid is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)

    sys.stdout.flush()
    with signals.passed_on(send) as received:
        process.start()
        sending.close()
        answer = _received(receiving)
        if answer is not None:  # it has begun
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
    """What was sent; None where the process that could send has ended."""
    try:
        answer: tuple[Any, Exception | None] = receiving.recv()
    except EOFError:
        return None
    return answer


def _answer(sending: Connection, began: float, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Call the function and send what it returned or raised."""
    os.setsid()  # the terminal's Ctrl-C comes by way of the caller alone
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    budget.BEGAN = began
    returned, error = None, None
    try:
        sending.send((None, None))
        returned = function(*arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as raised:
        if not isinstance(raised, UserError | Stopped):
            traceback.print_exc()  # the pipe carries the exception without it
        error = _portable(raised)
    with suppress(BrokenPipeError):  # the caller has ended
        sending.send((returned, error))


def _end_with_the_caller() -> None:
    caller = parent_process()
    if caller is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _portable(error: Exception) -> Exception:
    """An exception that can be pickled: where its class needs more than its arguments, one that names it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
