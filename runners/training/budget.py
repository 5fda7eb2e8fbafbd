"""The time a command may take, budget_minutes, counted from when its process began.

On machines that are had for minutes at a time a command stops by itself, with everything it did on the disk, and goes
on when it is started again.
"""

import math
import time

BEGAN = time.monotonic()
"""When this module was imported: when the process began, but for the start of Python itself."""


def seconds_left(budget_minutes: float | None) -> float:
    """Seconds until the budget is used up, negative when it is; infinite where there is none."""
    return math.inf if budget_minutes is None else 60 * budget_minutes - (time.monotonic() - BEGAN)
