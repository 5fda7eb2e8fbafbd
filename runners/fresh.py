"""Call a function in a fresh process, which has not used the GPU.

A process that has used CUDA does not return to its first state: its context takes memory, its allocator caches blocks,
and a failed kernel or capture can make CUDA unusable. The calling process makes no CUDA context.

Processes are forked from a server that has imported torch and computed nothing.
"""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from runners import printing
from runners.errors import Stopped, UserError
from runners.training import budget, signals

IMPORTED_AHEAD = ["runners.cli", "runners.training.network", "runners.training.loop"]
"""Modules that the server imports once; none of them touches a GPU."""

ENDING_SECONDS = 30.0
"""Time that processes have to end after another one has failed, before they are killed."""


@dataclass
class Ending:
    """How a process ended."""

    number: int
    """Its number among those that began together."""
    returned: Any = None
    """What the function returned."""
    error: Exception | None = None
    """The function's exception, or a RuntimeError that names it if it cannot be pickled; None where there was none, or
    no answer."""
    has_answered: bool = False
    """Whether the function returned, or raised."""
    exit_code: int | None = None
    """Exit code of the process, -n where signal n killed it."""
    was_killed: bool = False
    """Whether it did not end within ENDING_SECONDS after another one had failed, and received SIGKILL."""


class _Process:
    """A process under way.

    Args:
        number: as in Ending.
        function: what it calls.
        arguments: those of the function.
    """

    def __init__(self, number: int, function: Callable[..., Any], arguments: Iterable[object]) -> None:
        self.ending = Ending(number)
        context = get_context("forkserver")
        self.receiving, sending = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_answer, args=(sending, budget.BEGAN, function, tuple(arguments)), daemon=False
        )
        self.process.start()
        sending.close()
        self.has_begun = False
        """Whether it hears signals."""
        self.is_open = True
        """Whether it may send something yet."""

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, number)

    def receive(self, signals_so_far: list[int]) -> None:
        """Receive what it has sent; when it begins, send it the signals that came before."""
        while self.is_open and self.receiving.poll():
            try:
                answer = self.receiving.recv()
            except EOFError:
                self.is_open = False
                return
            if not self.has_begun:
                self.has_begun = True
                for number in signals_so_far:
                    self.send(number)
                continue
            self.ending.returned, self.ending.error = answer
            self.ending.has_answered = True

    def end(self) -> None:
        """Take note of its end."""
        self.process.join()
        self.ending.exit_code = self.process.exitcode
        self.receiving.close()


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
    (ending,), received = call_together(function, [arguments])
    if received:
        signal.raise_signal(received[0])
    if not ending.has_answered:
        raise Stopped(f"a process ended without an answer, by exit code {ending.exit_code}")
    if ending.error is not None:
        raise ending.error
    return ending.returned


def call_together(
    function: Callable[..., Any],
    arguments: Sequence[Iterable[object]],
    *,
    is_failure: Callable[[Ending], bool] = lambda ending: False,
) -> tuple[list[Ending], list[int]]:
    """Call a function in several fresh processes at once, as `call` does, and wait for all.

    Args:
        function: as in `call`.
        arguments: those of each process.
        is_failure: whether the others cannot go on after such an ending. They notice it by themselves, or receive
            SIGKILL after ENDING_SECONDS.

    Returns:
        The endings in the order in which they were noticed; and the signals received and passed on.
    """
    running: list[_Process] = []
    endings: list[Ending] = []
    has_failure = False
    deadline: float | None = None

    def send(number: int) -> None:
        for one in running:
            if one.has_begun:
                one.send(number)

    sys.stdout.flush()
    with signals.passed_on(send) as received:
        _start_server()
        for number, of_this in enumerate(arguments):
            running.append(_Process(number, function, of_this))
        while running:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait([one.receiving if one.is_open else one.process.sentinel for one in running], seconds)
            ended = [one for one in running if not one.is_open and one.process.sentinel in ready]
            for one in running:
                one.receive(received)
            for one in ended:
                one.end()
                endings.append(one.ending)
            known = [one.ending for one in running if one.ending.has_answered or one in ended]
            running = [one for one in running if one not in ended]
            if not has_failure and any(map(is_failure, known)):
                has_failure, deadline = True, time.monotonic() + ENDING_SECONDS
            if deadline is not None and time.monotonic() >= deadline:
                deadline = None
                for one in running:
                    one.ending.was_killed = True
                    one.send(signal.SIGKILL)
    return endings, received


def _start_server() -> None:
    """Start the server with signals blocked: a terminal or Slurm sends them to it too, and it ends with its caller."""
    get_context("forkserver").set_forkserver_preload(IMPORTED_AHEAD)
    resource_tracker.ensure_running()  # the server would start it, and that unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@printing.tolerant()
def _answer(sending: Connection, began: float, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Call the function and send its result or exception."""
    os.setsid()  # so that Ctrl-C reaches this process only through the caller
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)
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
