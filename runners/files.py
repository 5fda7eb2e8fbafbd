"""Files that are whole or absent: a reader, a crash or a full disk finds the old content or the new one."""

import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_whole(file: Path, content: str | bytes | memoryview) -> None:
    """Replace a file by a new one that is complete and on the disk.

    The content goes to <name>.<random>.part in the same folder, which is forced to the disk and then renamed. A killed
    process may leave that file behind. Several processes may write the same file: the last rename counts.

    Args:
        file: the file; its folder is created where it is missing.
        content: the whole content; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    encoded = content.encode() if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(encoded)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(part, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(part, file)
    except BaseException:
        os.unlink(part)
        raise
    if os.name == "posix":  # force the rename to the disk too; elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
