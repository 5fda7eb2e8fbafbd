"""When the training runs of a process stop: after a signal, at the end of the budget, or after a failed run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

from runners.training import budget, signals
from runners.training.world import World

STOPPING_SECONDS = 5.0
"""Time reserved for the last step, evaluation and checkpoint; grows to the longest seen."""


class Stopping:
    """Whether the training runs of this process must stop.

    Args:
        signal: as signals.deferred yields it.
        budget_minutes: time limit of the command; None is no limit.
    """

    def __init__(self, signal: signals.Stop, budget_minutes: float | None) -> None:
        self.signal = signal
        self.budget_minutes = budget_minutes
        self.seconds: dict[Path, float] = {}
        """Time that each run under way needs to stop: for a step, an evaluation and a checkpoint."""
        self.is_out_of_time = False
        self.has_failure = False
        """Whether a run of this process failed, and may have made CUDA unusable for the others; set by the caller."""

    @contextmanager
    def of(self, run: Path) -> Iterator[None]:
        """Reserve stopping time for a run while it is under way."""
        self.seconds[run] = STOPPING_SECONDS
        try:
            yield
        finally:
            del self.seconds[run]

    def is_due(self) -> bool:
        """Return whether the runs must stop; once true, always true."""
        if budget.seconds_left(self.budget_minutes) < sum(self.seconds.values()):
            self.is_out_of_time = True
        return self.is_out_of_time or self.has_failure or self.signal.received is not None

    def agree(self, here: World, steps: int) -> tuple[bool, int]:
        """Agree with the other processes on whether to stop, and after how many steps to agree again.

        Args:
            here: the processes. All take over the reason of one that stops.
            steps: proposed; the first process decides.

        Returns:
            Whether the runs must stop, and after how many steps to call this again.
        """
        is_due = self.is_due()
        if here.is_alone:
            return is_due, steps
        number = 0 if self.signal.received is None else self.signal.received
        due, out_of_time, received, steps = here.largest(
            is_due, self.is_out_of_time, number, steps if here.is_first else 0
        )
        self.is_out_of_time = bool(out_of_time)
        if received and self.signal.received is None:
            self.signal.received, self.signal.at = Signals(received), time.monotonic()  # its own will follow
        return bool(due), steps
