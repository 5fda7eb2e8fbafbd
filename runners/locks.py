"""Locks between processes: of a run, of the table of records, of a download.

A lock is flock's on a file, which the system releases however its process ends. Some network and cluster file systems
have no flock. There a lock is the existence of a second file, <name>.owner, with the pid and the host of its process:

    that process ended on this host      the lock is taken over
    it is on another host                nobody can know whether it still runs: its file is removed by hand

The two kinds do not exclude each other, so all hosts that share a folder must mount it alike.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from runners.errors import Busy

try:
    import fcntl
except ImportError:  # Windows, which locks files on every file system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(file: Path, *, seconds: float, busy: str) -> Iterator[None]:
    """Hold a lock.

    Args:
        file: the lock's file, in a folder that exists.
        seconds: 0 does not wait; else, without flock, how long one process may hold the lock before it is taken for one
            that ended on another host. With flock such a process has let go, and the wait has no limit.
        busy: the message if another process holds it.

    Raises:
        Busy: another process holds it; without flock the message names the process and its file.
        OSError: the folder cannot be written.
    """
    if has_flock(file.parent):
        lock = FileLock(file)
        try:
            lock.acquire(blocking=seconds > 0)
        except Timeout as error:
            raise Busy(busy) from error
    else:
        file = file.with_name(f"{file.name}.owner")
        lock = SoftFileLock(file)
        _acquire(lock, file, seconds, busy)
    try:
        yield
    finally:
        lock.release()


def has_flock(folder: Path) -> bool:
    """Return whether files in a folder can be locked by the system.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        if fcntl is None:
            return True
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # nobody else has the file, so it is not locked: ENOSYS, ENOLCK, EOPNOTSUPP or the like
            return False
    return True


def _acquire(lock: SoftFileLock, file: Path, seconds: float, busy: str) -> None:
    """Wait for a lock without flock as long as it passes from process to process."""
    while True:
        before = _owner(file)
        try:
            lock.acquire(timeout=seconds)
        except Timeout as error:
            if (owner := _owner(file)) and (not seconds or owner == before):
                raise Busy(f"{busy}; {file} names {owner}: remove it if that process has ended") from error
        else:
            return


def _owner(file: Path) -> str:
    """Return which process holds a lock without flock, and since when; empty if none does."""
    try:
        pid, host = [*file.read_text(encoding="utf-8", errors="replace").split(), "?", "?"][:2]
        since = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    except FileNotFoundError:
        return ""
    return f"process {pid} on {host} since {since:%Y-%m-%d %H:%M:%S}"
