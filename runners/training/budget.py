"""The time limit of a command, budget_minutes, counted from the start of its process.

On time-limited machines a command stops by itself, with all results on disk, and resumes when it is started again.
"""

import math
import time

BEGAN = time.monotonic()
"""When this module was imported, by time.monotonic: shortly after the process began."""


def seconds_left(budget_minutes: float | None) -> float:
    """Return the seconds until the budget is used up: negative afterwards, infinite without a budget."""
    return math.inf if budget_minutes is None else 60 * budget_minutes - (time.monotonic() - BEGAN)
