"""Write files atomically: readers see the old or the new content, also after a crash or on a full disk."""

import csv
import errno
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.errors import UserError

CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)
"""What file systems answer that cannot sync, or cannot sync a folder: the last is of network mounts."""


def write_whole(file: Path, content: str | bytes | memoryview) -> None:
    """Replace a file by a new one that is complete and on the disk.

    The content goes to <name>.<random>.part in the same folder, which is synced to disk and then renamed. A killed
    process may leave that file behind. Several processes may write the same file: the last rename wins.

    Args:
        file: the file; its folder is created if missing.
        content: the whole content; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    encoded = content.encode() if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            stream.write(encoded)
            stream.flush()
            _sync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # sync the rename too; elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            _sync(folder)
        finally:
            os.close(folder)


def _sync(descriptor: int) -> None:
    """Sync a file or folder to disk, where its file system can do so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def write_csv(file: Path, rows: Sequence[Mapping[Any, object]], *, columns: Sequence[str] = ()) -> None:
    """Write rows as a CSV file, by `write_whole`.

    Args:
        file: the file.
        rows: all with the same keys; None becomes an empty cell.
        columns: the keys in their order; needed only where there may be no row.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def at_home(key: str, path: str) -> str:
    """Return a path with the home that ~ or ~user at its beginning stands for, as a shell does.

    Raises:
        UserError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise UserError(f"{key}={path}: there is no such user; a folder of that name is ./{path}")
    return expanded
