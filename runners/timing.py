"""Seconds of several calls, which take turns in one process, so that the machine's drift meets them all alike.

In every other turn the order is reversed, since what runs before leaves caches and heap to what runs after.

On a GPU a turn is several calls between two events of the device's clock, enqueued without waiting in between, after
one more that is not timed: the host's work for a call, such as launching a graph, is hidden behind the call before it,
as it is in training.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

Call = Callable[[], object]

CALLS_PER_TURN = 5
"""Calls that a turn enqueues on a GPU."""


def calls_per_turn(device: torch.device) -> int:
    """How many calls the seconds of a turn are the mean of: one on a CPU, which does a call before the next begins."""
    return CALLS_PER_TURN if device.type == "cuda" else 1


def take_turns(calls: Sequence[Call], turns: int, *, title: str, device: torch.device) -> Tensor:
    """Time each call in every turn.

    Args:
        calls: warmed up; on a GPU they do not wait for the device.
        turns: how often.
        title: of the progress bar.
        device: what they run on.

    Returns:
        Seconds of one call, float64 [turns, calls]: on a GPU the mean of those that a turn enqueued.
    """
    seconds = torch.zeros(turns, len(calls), dtype=torch.float64)
    for turn in tqdm(range(turns), title):
        for which in range(len(calls))[:: 1 if turn % 2 else -1]:
            seconds[turn, which] = _seconds_of(calls[which], device)
    return seconds


def low_median_high(values: Tensor) -> tuple[float, float, float]:
    """The median of values [n], between their 20 and 80 % quantiles."""
    low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=values.dtype)).tolist()
    return low, median, high


def _seconds_of(call: Call, device: torch.device) -> float:
    """One call by the device's own clock: the mean over a turn's."""
    count = calls_per_turn(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the device busy while the host enqueues those that are timed
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
