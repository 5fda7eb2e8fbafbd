"""training/steps.py: capture, with a made-up graph (tests/test_gpu.py has real ones), and what a step computes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import CPU, TinyNet, assert_same_end, tiny_config, tiny_data, train
from torch import Tensor

from runners.config import DatasetConfig, GpuConfig
from runners.data import Split, normalise
from runners.training import steps
from runners.training.evaluation import Evaluation
from runners.training.steps import TrainingStep

CUDA = torch.device("cuda")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps on the CPU believe that they are captured, and a replay calls the function again; tells what happened."""
    told: list[str] = []

    def run_on_stream(call: Callable[[], Tensor], stream: str) -> Tensor:
        told.append(f"eager on {stream}")
        return call()

    def capture(call: Callable[[], Tensor], stream: str, pool: object) -> tuple[SimpleNamespace, Tensor]:
        told.append(f"capture on {stream} in {pool}")
        result = torch.zeros(2)  # replays write to the same memory
        return SimpleNamespace(replay=lambda: result.copy_(call())), result

    monkeypatch.setattr(steps, "uses_cuda_graph", lambda gpu, device: True)
    monkeypatch.setattr(steps, "own_stream", lambda device: "its stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "its pool")
    monkeypatch.setattr(steps, "run_on_stream", run_on_stream)
    monkeypatch.setattr(steps, "capture", capture)
    return told


def tiny_step(net: TinyNet, **options: Any) -> TrainingStep:
    """Steps of the tiny network on the training images of tiny_data, by the recipe of tiny_config."""
    data, config = tiny_data().train, tiny_config()
    optimiser = steps.make_optimiser(net, config.dataset)
    return TrainingStep(
        net, optimiser, lambda inputs: data.batch(inputs, config.dataset), gpu=config.gpu, device=CPU, **options
    )


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_captured_run_is_that_which_is_not(
    log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics: str
) -> None:
    """Over a change of the learning rate, evaluations of 7, 7 and 6 images, and checkpoints.

    Each of the two is captured once, on one stream and in one pool; the first evaluation is of the third step.
    """
    config = tiny_config(eval_statistics=statistics)
    train(TinyNet(), tmp_path / "captured", config)
    eager, captured = "eager on its stream", "capture on its stream in its pool"
    assert log == [eager] * steps.EAGER_STEPS + [eager, captured, eager] + [captured] + [eager] * 3
    monkeypatch.undo()
    train(TinyNet(), tmp_path / "not", config)
    assert_same_end(tmp_path / "captured", tmp_path / "not")


@pytest.mark.usefixtures("log")
def test_a_captured_evaluation_reads_the_weights_and_averages_of_its_moment() -> None:
    data, config, net = tiny_data(), tiny_config(eval_batch_size=5), TinyNet()
    recipe, optimiser = config.dataset, steps.make_optimiser(net, config.dataset)
    step = TrainingStep(net, optimiser, lambda inputs: data.train.batch(inputs, recipe), gpu=config.gpu, device=CPU)
    captured = Evaluation(step, data.test, recipe)
    captured()
    for _, inputs in data.train.inputs(recipe, seed=0):
        step(inputs, rate=0.1)
    again = captured()
    assert net.training
    step.captures = False
    assert again == Evaluation(step, data.test, recipe)()


@pytest.mark.usefixtures("log")
def test_results_of_replays_do_not_write_over_each_other() -> None:
    data, recipe = tiny_data().train, tiny_config().dataset
    net = TinyNet()
    step = tiny_step(net)
    losses = torch.stack([step(inputs, rate=0.1) for _, inputs in data.inputs(recipe, seed=0)])[:, 0]
    assert len(set(losses.tolist())) == recipe.iterations


def test_the_rate_of_each_step_is_the_one_it_is_given() -> None:
    data, recipe = tiny_data().train, tiny_config().dataset
    net = TinyNet()
    step = tiny_step(net)
    _, inputs = next(data.inputs(recipe, seed=0))
    before = net.conv.weight.clone()
    step(inputs, rate=0.0)
    assert torch.equal(net.conv.weight, before)
    step(inputs, rate=0.1)
    assert not torch.equal(net.conv.weight, before)


@pytest.mark.parametrize(
    ("asked", "device", "used"), [(None, CPU, False), (False, CPU, False), (None, CUDA, True), (False, CUDA, False),
                                  (True, CUDA, True)]
)  # fmt: skip
def test_steps_are_captured_on_every_gpu_unless_told_otherwise(
    asked: bool | None, device: torch.device, used: bool
) -> None:
    assert steps.uses_cuda_graph(GpuConfig(cuda_graph=asked), device) is used


def test_a_graph_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gpu\.cuda_graph=true: the run is on the cpu; only a CUDA device captures"):
        steps.uses_cuda_graph(GpuConfig(cuda_graph=True), CPU)


@pytest.mark.parametrize("count", [2, 4])
def test_sub_batches_are_the_mean_of_their_gradients(count: int) -> None:
    """Each is every k-th image, normalised by its own statistics; loss and errors are those of all images."""
    data, recipe = tiny_data().train, tiny_config().dataset
    net, reference = TinyNet(), TinyNet()
    step = tiny_step(net, sub_batches=count)
    _, inputs = next(data.inputs(recipe, seed=0))
    loss, wrong = step(inputs, rate=0.0).tolist()

    reference.zero_grad()
    images, labels = data.batch(inputs, recipe)  # the images of a batch do not depend on each other
    expected = torch.zeros(2)
    for first in range(count):
        logits = reference(images[first::count])
        part = F.cross_entropy(logits, labels[first::count]) / count
        part.backward()
        expected += torch.stack([part.detach(), (logits.argmax(dim=1) != labels[first::count]).sum()])
    assert [loss, wrong] == expected.tolist()
    for name, parameter in reference.named_parameters():
        found = net.get_parameter(name).grad
        assert (found is None) if parameter.grad is None else torch.equal(found, parameter.grad)
    assert net.norm.num_batches_tracked == count
    assert torch.equal(net.norm.running_mean, reference.norm.running_mean)


def test_smoothed_labels_are_a_mean_over_the_label_and_all_classes() -> None:
    data, recipe = tiny_data().train, tiny_config().dataset
    _, inputs = next(data.inputs(recipe, seed=0))
    losses = []
    for smoothing in (0.0, 0.25):
        net = TinyNet()
        losses.append(tiny_step(net, label_smoothing=smoothing)(inputs, rate=0.0)[0].item())
    images, labels = data.batch(inputs, recipe)
    logits = TinyNet()(images).log_softmax(dim=1)
    sharp, spread = -logits.gather(1, labels[:, None]).mean().item(), -logits.mean().item()
    assert losses == pytest.approx([sharp, 0.75 * sharp + 0.25 * spread], rel=1e-5)  # float32 means of 8 and 80 numbers


@pytest.mark.usefixtures("log")
def test_captured_sub_batches_end_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(sub_batches=2)
    train(TinyNet(), tmp_path / "captured", config)
    monkeypatch.undo()
    train(TinyNet(), tmp_path / "not", config)
    assert_same_end(tmp_path / "captured", tmp_path / "not")


def test_top5_counts_images_whose_class_is_not_among_the_five_largest_logits() -> None:
    net, data, recipe = TinyNet(), tiny_data(), tiny_config(top5=True).dataset
    step = TrainingStep(
        net, steps.make_optimiser(net, recipe), lambda inputs: inputs, gpu=tiny_config().gpu, device=CPU
    )
    _, error_percent, top5_error_percent = Evaluation(step, data.test, recipe)()
    with torch.no_grad():
        logits = net.eval()(normalise(data.test.images))
    ranks = (logits > logits.gather(1, data.test.labels[:, None])).sum(dim=1)
    assert error_percent == 100 * ((ranks > 0).sum().item() / 20)
    assert top5_error_percent == 100 * ((ranks > 4).sum().item() / 20)


class Mirrored(Split):
    """Images and their mirror images are two views."""

    def views(self, inputs: tuple[Tensor, ...], config: DatasetConfig) -> tuple[list[Tensor], Tensor]:
        """Return both."""
        (view,), labels = super().views(inputs, config)
        return [view, view.flip(3)], labels


def test_the_mean_logits_of_several_views_are_evaluated() -> None:
    net, recipe, config = TinyNet(), tiny_config(eval_batch_size=20).dataset, tiny_config()
    test = tiny_data().test
    step = TrainingStep(net, steps.make_optimiser(net, recipe), lambda inputs: inputs, gpu=config.gpu, device=CPU)
    loss, error_percent, _ = Evaluation(step, Mirrored(test.images, test.labels), recipe)()
    with torch.no_grad():
        images = normalise(test.images)
        logits = torch.stack([net.eval()(images), net(images.flip(3))]).mean(0)
    assert loss == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-6)  # float32 sums
    assert error_percent == 100 * ((logits.argmax(dim=1) != test.labels).sum().item() / 20)
