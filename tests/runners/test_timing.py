"""runners/timing.py, on a made-up GPU that works off what is enqueued."""

from types import SimpleNamespace

import pytest
import torch

from runners import timing

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Gpu:
    """Its clock stands at the end of what was enqueued; a call that finds it idle keeps it waiting for the host."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: self.log.append("wait"))

        def record() -> None:
            self.log.append("event")
            event.now = self.now

        event.record = record
        event.elapsed_time = lambda end: 1e3 * (end.now - event.now)
        return event

    def call(self) -> None:
        self.now += 3.0 if self.log[-1:] in ([], ["wait"]) else 2.0
        self.log.append("call")


def test_on_a_gpu_a_turn_is_several_calls_enqueued_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(timing.torch.cuda, "Event", gpu.event)
    count = timing.calls_per_turn(CUDA)
    seconds = timing.take_turns([gpu.call], 3, title="", device=CUDA)
    assert gpu.log == ["call", "event", *["call"] * count, "event", "wait"] * 3
    assert seconds.tolist() == [[2.0]] * 3
    assert count > 1


def test_on_a_cpu_a_turn_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 2.0, 4.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.take_turns([lambda: None], 2, title="", device=CPU)
    assert seconds.tolist() == [[1.5], [2.0]]
    assert timing.calls_per_turn(CPU) == 1
