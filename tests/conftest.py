"""What several test files share."""

import gc
import os
from collections.abc import Callable

import pytest

# Two processes run tests on two cores. torch reads these when it is imported, as do the processes that tests begin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
pytest.register_assert_rewrite("support")

import torch

# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when it is imported, as much
# of torch does below.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.profiler import ProfilerActivity, profile

from blpa.kernels import Kernels
from blpa.kernels.reference import REFERENCE
from blpa.models.preact_resnet import PreActResNet
from runners import config
from runners.training import network


@pytest.fixture
def build() -> Callable[..., PreActResNet]:
    """How to build the network of a mode for ten classes, by the name of the mode's file."""

    def of_mode(name: str, depth: int, *, width: float = 1.0, kernels: Kernels = REFERENCE) -> PreActResNet:
        dataset = config.DatasetConfig(classes=10, image_channels=3)
        cell = config.Config(mode=config.mode(name), dataset=dataset, depth=depth, width=width)
        return network.build(cell, kernels)

    return of_mode


@pytest.fixture
def allocator_peak() -> Callable[[Callable[[], object]], int]:
    """How to get the most bytes that a function holds at once on the CPU, by the allocator's own account."""

    def peak_bytes(function: Callable[[], object]) -> int:
        gc.collect()  # nothing of before is freed during the measurement
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
            function()
        events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    return peak_bytes
