"""What several test files share."""

import copy
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

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

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from blpa.kernels import Kernels
from blpa.kernels.reference import REFERENCE
from blpa.models.preact_resnet import PreActResNet
from runners import compose, config, fresh, option_files
from runners.training import network

# What a child process would import by itself before its first training step, and the test that it takes its function
# from: the server from which they are forked imports it once.
fresh.IMPORTED_AHEAD += ["torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "pytest"]


def pytest_collection_finish() -> None:
    """Have no collection of garbage look again through all that was imported, which takes a quarter of a second."""
    gc.collect()
    gc.freeze()


_compose = compose.compose


@functools.cache
def _composed(name: str, overrides: tuple[str, ...], has_hydra: bool, folder: str) -> DictConfig:
    return _compose(name, list(overrides), return_hydra_config=has_hydra)


def _compose_once(name: str, overrides: list[str], return_hydra_config: bool = False) -> DictConfig:
    """What hydra.compose returns of conf/, without composing the same twice; Hydra's own part names the folder."""
    if "provider=command-line" in str(GlobalHydra.instance().config_loader().get_search_path()):
        return _compose(name, overrides, return_hydra_config=return_hydra_config)  # the user's options may change
    folder = str(Path.cwd()) if return_hydra_config else ""
    return copy.deepcopy(_composed(name, tuple(overrides), return_hydra_config, folder))


compose.compose = _compose_once


@pytest.fixture
def build() -> Callable[..., PreActResNet]:
    """How to build the network of a mode for ten classes, by the name of the mode's file."""

    def of_mode(name: str, depth: int, *, width: float = 1.0, kernels: Kernels = REFERENCE) -> PreActResNet:
        dataset = config.DatasetConfig(classes=10, image_channels=3)
        cell = config.Config(mode=option_files.mode(name), dataset=dataset, depth=depth, width=width)
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


@pytest.fixture
def same_logging() -> Iterator[None]:
    """Restore the root logger, which Hydra's --info sets up."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def new_compiler() -> Iterator[None]:
    """Begin and end without compiled graphs, and ignore the compiler's own deprecations."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch._dynamo.reset()
