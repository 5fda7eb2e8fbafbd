"""Seconds of several calls, which take turns in one process, so that the machine's drift meets them all alike.

In every other turn the order is reversed, since what runs before leaves caches and heap to what runs after.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

Call = Callable[[], object]


def take_turns(calls: Sequence[Call], turns: int, *, title: str, device: torch.device) -> Tensor:
    """Time each call once a turn.

    Args:
        calls: warmed up.
        turns: how often.
        title: of the progress bar.
        device: what they run on.

    Returns:
        Seconds, float64 [turns, calls].
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
    """One call by the device's own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
