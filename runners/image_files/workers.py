"""Processes that decode image files ahead of the training that uses them.

    jobs, a dozen images each -> worker processes, a few batches ahead -> results, in the order of the jobs

The processes are of concurrent.futures, and differ from a DataLoader's in this: none of them imports torch; results
come through a pipe, so there is no shared memory to run out of; nothing allocates pinned memory from another thread,
which would break the capture of a CUDA graph; and an exception arrives as it was raised.

Signals leave the workers alone, also those that a scheduler sends to every process of a job: the training stops when it
can, and needs its batches until then. Each worker ends with its parent, however that ends.
"""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from runners.errors import Stopped
from runners.training import signals

Result = TypeVar("Result")

MOST_WORKERS = 16
"""Workers where their number is not given: they decode some 10,000 photographs per second, more than a GPU takes."""


def usual_workers() -> int:
    """Return the number of cores that this process may use, at most MOST_WORKERS; processes of one machine share them.

    LOCAL_WORLD_SIZE is how many of the processes that train together are here, as torch elastic sets it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST_WORKERS))


class Workers:
    """Worker processes, which begin with the first of those that use them at the same time and end with the last.

    Args:
        count: number of processes; 0 computes in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seconds_waited = 0.0
        """Time for which this process has waited for results."""
        self._has_worked = False
        """Whether a process has sent a result."""
        self._users = 0
        self._executor: ProcessPoolExecutor | None = None

    def results(
        self, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], *, ahead: int
    ) -> Generator[Result]:
        """Yield function(*job) for each job, in order.

        Args:
            function: importable by name, from a module that is cheap to import.
            jobs: arguments; taken from the iterable when they are begun.
            ahead: jobs begun before their result is asked for; at least two per worker are.

        Raises:
            Exception: that of a job.
            Stopped: a worker was killed.
        """
        if not self.count:
            for job in jobs:
                with self._timed():
                    result = function(*job)
                yield result
            return
        with self._in_use():
            begun: deque[Future[Result]] = deque()
            try:
                for job in jobs:
                    begun.append(self._begin(function, *job))
                    if len(begun) > max(ahead, 2 * self.count):
                        yield self._result(begun.popleft())
                while begun:
                    yield self._result(begun.popleft())
            finally:
                for future in begun:
                    future.cancel()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(self.count, mp_context=_Context(), initializer=_begin_worker)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                ended, self._executor = self._executor, None
                ended.shutdown(cancel_futures=True)

    def _begin(self, function: Callable[..., Result], *job: Any) -> "Future[Result]":
        assert self._executor is not None
        try:
            with signals.blocked():
                return self._executor.submit(function, *job)
        except BrokenProcessPool as error:
            raise self._stopped() from error

    def _result(self, future: "Future[Result]") -> Result:
        try:
            with self._timed():
                result = future.result()
        except BrokenProcessPool as error:
            raise self._stopped() from error
        self._has_worked = True
        return result

    def _stopped(self) -> Stopped:
        if not self._has_worked:
            return Stopped(
                "a process that decodes images ended before its first result: it imports the script that is run, which "
                "is to be a file whose work stands under if __name__ == '__main__'; or there is too little memory for "
                f"dataset.workers={self.count} (0 starts no process)"
            )
        return Stopped(
            "a process that decodes images was killed, perhaps for want of memory: "
            f"dataset.workers={self.count} may be too many"
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_waited += time.perf_counter() - begun


class _Process(SpawnProcess):
    def start(self) -> None:
        """Start the process, with the usual start method in place of this process's own.

        A new process is told that of its parent, also where it does not know it: joblib's processes are of its "loky".
        """
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method("spawn", force=True)
        try:
            super().start()
        finally:
            multiprocessing.set_start_method(before, force=True)

    def terminate(self) -> None:
        """Kill the process: the executor terminates the others when one has died, and workers ignore SIGTERM."""
        self.kill()


class _Context(SpawnContext):
    """Starts processes anew, since a fork of a process with threads or CUDA in it is not safe."""

    Process = _Process  # type: ignore[assignment]


def _begin_worker() -> None:
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    signals.end_with_the_parent(lambda: os._exit(1))
