"""Exceptions that end a command, their exit codes, and the classification of any exception for the user.

    1          UserError, Stopped, and errors of the machine: a full disk, too little memory
    3          OutOfTime
    4          Busy
    5          Diverged
    128 + n    Interrupted and Terminated, by signal n

Any other exception is a bug, and keeps its traceback.
"""

import difflib
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
"""A character that no file, name or message can hold."""


class UserError(ValueError):
    """The request cannot be met; the message names the value that was given and what is allowed."""

    exit_code = 1
    """Exit code of the process."""
    is_shared = False
    """Whether all processes that train together raise it, so that one of them prints it."""


class Refusals:
    """Messages of files that are skipped, so that one of them does not cost the others."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Go on after a UserError, which `raise_if_any` raises."""
        try:
            yield
        except UserError as error:
            self.messages.append(str(error))

    def raise_if_any(self) -> None:
        """Raise one UserError of all that were collected."""
        if self.messages:
            raise UserError("; ".join(self.messages))


class Stopped(RuntimeError):
    """A run stopped before its end; the message gives the reason."""

    exit_code = 1


class CannotWrite(Stopped):
    """A file of the run could not be written; existing files are untouched."""


class OutOfTime(Stopped):
    """The time limit came before the last step; there is a checkpoint."""

    exit_code = 3


class Deferred(Stopped):
    """Another run in the same process failed; there is a checkpoint, and the run continues in a new process."""


class Busy(Stopped):
    """Another process is working on the run."""

    exit_code = 4


class LostProcess(Stopped):
    """Another of the processes that train together ended or hangs: what it says is the reason, not this."""

    has_waited = False
    """Whether the other one did not answer in time."""


class Diverged(Stopped):
    """The loss or the weights are no longer finite: a retry would diverge again."""

    exit_code = 5
    PREFIX = "diverged: "
    """Prefix of the failure in its record."""


class Interrupted(Stopped):
    """A signal stopped the run, after a checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """Return class and arguments, for pickling."""
        return Interrupted, (str(self), self.number)


class Terminated(KeyboardInterrupt):
    """A signal ends the command, outside of training; `except Exception` does not hold it up."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""In the messages of torch, the CUDA driver and Triton; the second is of a CPU."""

PERHAPS_OUT_OF_MEMORY = (
    "ALLOC_FAILED",  # cuBLAS and cuDNN without memory for themselves, or after an error of another kind
    "STATUS_NOT_INITIALIZED",  # the same, where they begin
    "unable to find an engine",  # cuDNN without memory for a workspace, or with no kernel for a tensor of that size
)
"""In messages that lack of memory can cause, and other reasons too."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the message of an exception, or of one that led to it, names a lack of memory."""
    return _with_words(error, OUT_OF_MEMORY) is not None


def may_be_out_of_memory(error: BaseException | None) -> bool:
    """Return whether lack of memory may be the cause, although no message names it."""
    return _with_words(error, PERHAPS_OUT_OF_MEMORY) is not None


def missing_memory(error: BaseException) -> str:
    """Return the first line of the message that names the lack of memory, for an error that is_out_of_memory."""
    found = _with_words(error, OUT_OF_MEMORY)
    assert found is not None
    return first_line(found)


def _with_words(error: BaseException | None, words: tuple[str, ...]) -> BaseException | None:
    """Return the first of an exception, its causes and contexts whose message has one of these words.

    When a CUDA graph runs out of memory during its capture, the last exception is that the capture cannot be ended.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), "")


def cannot_run_here(error: BaseException) -> bool:
    """Return whether the error is a requested kernel backend that this machine does not have."""
    from blpa.kernels import NotAvailable  # imported here: the command line does not need blpa

    return isinstance(error, NotAvailable)


def classify(error: Exception) -> tuple[int | None, str]:
    """Distinguish errors of the user or the machine from bugs.

    Returns:
        The exit code, None for a bug; and one line.
    """
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UserError | Stopped):
        return error.exit_code, f"{Diverged.PREFIX if isinstance(error, Diverged) else ''}{error}"
    message = first_line(error)
    if cannot_run_here(error):
        return 1, message
    if is_out_of_memory(error):
        return 1, f"does not fit: {message}"
    if may_be_out_of_memory(error):
        return 1, f"does not run, for want of memory or for the size of its tensors: {message}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        from blpa.kernels.available import compiler_message

        return 1, f"does not compile: {compiler_message(error)}"
    return None, f"{type(error).__name__}: {message}"


def allowed(key: str, names: Iterable[str]) -> str:
    """List the keys allowed in place of an unknown one, with a suggestion."""
    group, _, name = key.rpartition(".")
    names = set(names) - {"hydra", "config_dir"}
    names |= set() if group else {"network"}
    return f"{hint(name, names)}; allowed{f' in {group}' if group else ''}: {', '.join(sorted(names))}"


def hint(wrong: str, right: Iterable[str]) -> str:
    """Suggest the closest allowed name, if any."""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
