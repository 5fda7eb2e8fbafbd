"""A file that one process at a time can hold; however that process ends, the system lets go of it.

<run's folder>/lock    held by the process that is at the run
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runners.errors import Busy, UserError


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


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep every other process away from a run.

    Args:
        run_dir: the run's folder, made where it is missing.

    Raises:
        Busy: another process is at it.
        UserError: nothing can be written there.
    """
    lock = ExitStack()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            lock.enter_context(held(run_dir / "lock", wait=False))
    except BlockingIOError as error:
        raise Busy(f"another process is at {run_dir}: name another folder by run=") from error
    except OSError as error:
        raise UserError(f"cannot write into {run_dir} ({error.strerror}): name another folder, results=") from error
    with lock:
        yield
