"""blpa/steps.py: recording, with a made-up graph (tests/test_gpu.py has real ones), and what a step computes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import CPU, TinyNet, assert_same_end, tiny_config, tiny_data, train
from torch import Tensor

from blpa import steps
from blpa.config import GpuConfig
from blpa.steps import TrainingStep

CUDA = torch.device("cuda")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps on the CPU believe that they are recorded, and a replay calls the function again; tells what happened."""
    told: list[str] = []

    def aside(call: Callable[[], Tensor]) -> Tensor:
        told.append("aside")
        return call()

    def record(call: Callable[[], Tensor]) -> tuple[SimpleNamespace, Tensor]:
        told.append("record")
        result = torch.zeros(2)  # replays write to the same memory
        return SimpleNamespace(replay=lambda: result.copy_(call())), result

    monkeypatch.setattr(steps, "uses_cuda_graph", lambda gpu, device: True)
    monkeypatch.setattr(steps, "aside", aside)
    monkeypatch.setattr(steps, "record", record)
    return told


def test_a_recorded_run_is_that_which_is_not(log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a change of the learning rate, evaluations and checkpoints; recorded once, after the first few steps."""
    train(TinyNet(), tmp_path / "recorded")
    assert log == ["aside"] * steps.EAGER_STEPS + ["record"]
    monkeypatch.undo()
    train(TinyNet(), tmp_path / "not")
    assert_same_end(tmp_path / "recorded", tmp_path / "not")


@pytest.mark.usefixtures("log")
def test_results_of_replays_do_not_write_over_each_other() -> None:
    data, recipe = tiny_data().train, tiny_config().dataset
    net = TinyNet()
    optimiser = steps.make_optimiser(net, recipe)
    step = TrainingStep(net, optimiser, lambda draws: data.batch(draws, recipe), gpu=tiny_config().gpu, device=CPU)
    losses = torch.stack([step(draws, rate=0.1) for _, draws in data.draws(recipe, seed=0)])[:, 0]
    assert len(set(losses.tolist())) == recipe.iterations


def test_the_rate_of_each_step_is_the_one_it_is_given() -> None:
    data, recipe = tiny_data().train, tiny_config().dataset
    net = TinyNet()
    optimiser = steps.make_optimiser(net, recipe)
    step = TrainingStep(net, optimiser, lambda draws: data.batch(draws, recipe), gpu=tiny_config().gpu, device=CPU)
    _, draws = next(data.draws(recipe, seed=0))
    before = net.conv.weight.clone()
    step(draws, rate=0.0)
    assert torch.equal(net.conv.weight, before)
    step(draws, rate=0.1)
    assert not torch.equal(net.conv.weight, before)


@pytest.mark.parametrize(
    ("asked", "device", "used"), [(None, CPU, False), (False, CPU, False), (None, CUDA, True), (False, CUDA, False),
                                  (True, CUDA, True)]
)  # fmt: skip
def test_steps_are_recorded_on_every_gpu_unless_told_otherwise(
    asked: bool | None, device: torch.device, used: bool
) -> None:
    assert steps.uses_cuda_graph(GpuConfig(cuda_graph=asked), device) is used


def test_a_graph_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gpu\.cuda_graph=true: the run is on the cpu; only a CUDA device records"):
        steps.uses_cuda_graph(GpuConfig(cuda_graph=True), CPU)
