"""A file that one process at a time can hold; however that process ends, the system lets go of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUSY = 4
"""Exit code of a command whose run another process is at."""


@contextmanager
def held(file: Path, *, wait: bool) -> Iterator[None]:
    """Hold a file.

    Args:
        file: made where it is missing, in a folder that exists; it stays. Where the system has no flock (Windows)
            nobody is kept out.
        wait: until nobody else holds it.

    Raises:
        BlockingIOError: somebody does, and this is not to wait.
    """
    with file.open("w") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
