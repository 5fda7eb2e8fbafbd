"""Time several calls in turn in one process, so that machine drift affects all alike.

Every other turn reverses the order, since a call finds the caches and the heap that the previous one left.

On a GPU a turn is several calls between two events on the device's clock. They are enqueued without waiting, after one
untimed call, so the host's work for a call, such as launching a graph, overlaps the previous call, as it does in
training.
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
    """Return the number of calls that a turn averages: one on a CPU, where nothing overlaps."""
    return CALLS_PER_TURN if device.type == "cuda" else 1


def take_turns(calls: Sequence[Call], turns: int, *, title: str, device: torch.device) -> Tensor:
    """Time each call in every turn.

    Args:
        calls: warmed up; on a GPU they do not wait for the device.
        turns: number of turns.
        title: title of the progress bar.
        device: where the calls run.

    Returns:
        Seconds per call, float64 [turns, calls]: on a GPU the mean over the calls of a turn.
    """
    seconds = torch.zeros(turns, len(calls), dtype=torch.float64)
    for turn in tqdm(range(turns), title):
        for which in range(len(calls))[:: 1 if turn % 2 else -1]:
            seconds[turn, which] = _seconds_of(calls[which], device)
    return seconds


def low_median_high(values: Tensor) -> tuple[float, float, float]:
    """Return the 20 % quantile, the median and the 80 % quantile of values [n]."""
    low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=values.dtype)).tolist()
    return low, median, high


def _seconds_of(call: Call, device: torch.device) -> float:
    """Measure the seconds per call over one turn, on the device's clock."""
    count = calls_per_turn(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the device busy while the host enqueues the timed calls
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
