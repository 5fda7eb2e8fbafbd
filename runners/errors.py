"""How a command ends other than well: an exception with one line for its user, and the exit code of the process.

    1          UserError, Stopped
    3          OutOfTime
    4          Busy
    5          Diverged
    128 + n    Interrupted, by signal n

Whatever else is raised is a bug, and keeps its traceback.
"""


class UserError(ValueError):
    """What was asked for cannot be done; the message names the value that was given and what is allowed."""

    exit_code = 1
    """What the process is to exit with."""


class Stopped(RuntimeError):
    """A run came to a stop before its end, for the reason the message gives."""

    exit_code = 1
    """As above."""


class CannotWrite(Stopped):
    """A file of the run could not be written; what was there before is untouched."""


class OutOfTime(Stopped):
    """The command's time was up before the last step; there is a checkpoint."""

    exit_code = 3


class Deferred(Stopped):
    """Another run in the same process failed; there is a checkpoint, and the run goes on in a new process."""


class Busy(Stopped):
    """Another process is at the run."""

    exit_code = 4


class Diverged(Stopped):
    """The loss or the weights are no longer finite: what the run comes to, whenever it is tried."""

    exit_code = 5
    PREFIX = "diverged: "
    """How its record begins."""


class Interrupted(Stopped):
    """A signal stopped the run, after a checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """Its arguments, by which another process makes it again."""
        return Interrupted, (str(self), self.number)
