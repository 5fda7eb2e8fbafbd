"""Printing that costs a run nothing: a write to stdout or stderr that fails is dropped, as are those after it.

Such writes fail where a reader has left (`| head`), a disk is full, a terminal or a stream is closed. What was measured
is in files by then. A character that the stream's encoding lacks is written as its escape.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Output:
    """A standard stream whose writes do not fail; in all else it is that stream.

    Args:
        stream: the stream; None where it was closed before the process began.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = io.StringIO() if stream is None else stream
        self._broken = _closed() if stream is None else None
        self.lost: OSError | None = None
        """Why text was dropped; None where none was."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream: encoding, isatty, fileno."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = str(self._stream.encoding)
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        if text:
            self.lost = self._broken
        return len(text)

    def flush(self) -> None:
        """Write what is waiting, or drop it."""
        if self._broken is None:
            self._attempt(self._stream.flush)
            self.lost = self._broken

    def _attempt(self, function: Callable[..., object], *arguments: object) -> None:
        if self._broken is not None:
            return
        try:
            function(*arguments)
        except OSError as error:
            self._broken = error
            self._discard()
        except ValueError:
            if not self._stream.closed:
                raise
            self._broken = _closed()

    def _discard(self) -> None:
        """Empty the stream's buffer into /dev/null: Python flushes it again at exit, and would fail again."""
        try:
            number = self._stream.fileno()
            own, null = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        except OSError:  # in memory, or without a file any more: nothing can be emptied
            return
        try:
            os.dup2(null, number)
            self._stream.flush()
        finally:
            os.dup2(own, number)
            os.close(own)
            os.close(null)


@contextmanager
def tolerant() -> Iterator[Output]:
    """Drop what cannot be written to stdout or stderr, in this process, as long as the context lasts.

    Yields:
        stdout.
    """
    before = sys.stdout, sys.stderr
    with _descriptors_open():
        output, errors = map(Output, before)
        sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = before


@contextmanager
def _descriptors_open() -> Iterator[None]:
    """Open /dev/null as those of the descriptors 0 to 2 that are closed.

    Otherwise the next file opened, perhaps a checkpoint, would get the number, and what C code prints.
    """
    opened = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, so it is the lowest free number, which open takes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            opened.append(number)
    try:
        yield
    finally:
        for number in opened:
            os.close(number)


def _closed() -> OSError:
    return OSError(errno.EBADF, "the stream is closed")
