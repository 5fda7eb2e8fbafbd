"""What the processes that train together and the one that started them tell each other, beside torch elastic.

Torch elastic reports the first failure that it sees, often that of a process which lost another one, and passes on no
signal that comes before there is anybody to receive it.
"""

import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runners.files import write_whole


@dataclass(frozen=True)
class Notes:
    """A folder of such notes."""

    folder: Path

    def begin(self) -> int:
        """Note that this process heeds signals; return the number of one that came before, or 0.

        The starting process notes a signal before it looks for whom to send it to: so none is lost.
        """
        (self.folder / f"heeds-{os.getpid()}").touch()
        sent = self.folder / "signal"
        return int(sent.read_text()) if sent.exists() else 0

    def send(self, number: int) -> None:
        """Send a signal to all processes, also to those that begin later."""
        write_whole(self.folder / "signal", str(number).encode())
        for file in self.folder.glob("heeds-*"):
            with suppress(ProcessLookupError):  # it has ended
                os.kill(int(file.name.partition("-")[2]), number)

    def fail(self, rank: int, restart: int, error: Exception) -> None:
        """Note why a process failed."""
        write_whole(self.folder / f"failed-{restart}-{rank}", pickle.dumps(error))

    def failures(self, restart: int) -> dict[int, Exception]:
        """Return why processes of a start failed, by rank, the first first; one that was killed has told nothing."""
        files = sorted(self.folder.glob(f"failed-{restart}-*"), key=lambda file: file.stat().st_mtime_ns)
        return {int(file.name.rpartition("-")[2]): pickle.loads(file.read_bytes()) for file in files}
