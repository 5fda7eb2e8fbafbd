"""Offloading: gradients, what is moved and what stays, and the host's memory; a GPU is not needed for it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import composed, gradients, images, prepared
from torch import Tensor

from blpa.memory import GRADIENTS, MIB, step_bytes
from blpa.models.preact_resnet import PreActResNet
from runners import cli
from runners.errors import classify
from runners.tasks import max_batch
from runners.training import network, offloading
from runners.training.offloading import Offload, host_bytes_left

Build = Callable[..., PreActResNet]
NETWORK = ["dataset=digits", "depth=11", "width=0.25", "gpu=cpu", "mode=offload", "run=a"]


def stock(build: Build) -> PreActResNet:
    return prepared(build("exact", 20, width=0.5))


def moving_all(build: Build) -> tuple[PreActResNet, Offload]:
    """The same network, and what moves all that it saves."""
    model = stock(build)
    offload = offloading.offload(model)
    offload.smallest_bytes = 0
    return model, offload


def test_gradients_are_exact_to_the_bit_step_after_step(build: Build) -> None:
    (model, offload), exact = moving_all(build), stock(build)
    for _ in range(3):
        model.zero_grad()
        exact.zero_grad()
        assert all(map(torch.equal, gradients(model), gradients(exact)))
    assert offload.bytes == 0
    assert offload.peak_bytes > 0


def test_names_stay_and_a_copy_moves_its_own_activations(build: Build) -> None:
    model, exact = build("offload", 11), build("exact", 11)
    assert list(model.state_dict()) == list(exact.state_dict())
    copied = copy.deepcopy(model)
    copied.stem.weight.data.zero_()
    copied(torch.ones(64, 3, 8, 8))
    assert offloading.peak_bytes(copied) > offloading.peak_bytes(model) == offloading.peak_bytes(exact) == 0
    assert model.stem.weight.count_nonzero()
    assert torch.equal(model.eval()(torch.ones(1, 3, 8, 8)), exact.eval()(torch.ones(1, 3, 8, 8)))


def test_the_host_s_memory_is_made_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph could record none that is made later."""
    model, _ = moving_all(build)
    first = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()

    def refuse(like: Tensor) -> Tensor:
        raise AssertionError("it was made anew")

    monkeypatch.setattr(offloading.torch, "empty_like", refuse)
    assert all(map(torch.equal, first, gradients(model)))


def test_two_forward_passes_before_a_backward_pass_do_not_mix(build: Build) -> None:
    (model, _), exact = moving_all(build), stock(build)

    def of_both(model: PreActResNet) -> list[Tensor]:
        first, second = (model(images() * scale).square().mean() for scale in (1, 2))
        second.backward(retain_graph=True)
        second.backward()
        first.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, of_both(model), of_both(exact)))


def test_parameters_and_what_is_small_stay_and_layouts_are_kept() -> None:
    offload = Offload()
    offload.smallest_bytes = 4 * 2 * 4 * 6 * 6
    weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    x = (2 * x).contiguous(memory_format=torch.channels_last)  # not a leaf
    small = x[:1] * 1
    with offload.hooks():
        F.conv2d(x, weight, padding=1)
        assert offload.bytes == 0  # nothing refers to it any more
        out = F.conv2d(x, weight, padding=1)
        other = F.conv2d(small, weight, padding=1)
    assert offload.bytes == offload.peak_bytes == x.nbytes
    moved, kept = out.grad_fn._saved_input, other.grad_fn._saved_input
    assert moved.data_ptr() != x.data_ptr()
    assert moved.stride() == x.stride()
    assert torch.equal(moved, x)
    assert kept.data_ptr() == small.data_ptr()
    assert out.grad_fn._saved_weight.data_ptr() == weight.data_ptr()


def test_no_gradient_no_move(build: Build) -> None:
    model, offload = moving_all(build)
    with torch.no_grad():
        model(images())
    assert offload.peak_bytes == 0


def counted(name: str, depth: int, device: str, build: Build) -> tuple[float, float]:
    """MiB per sample at the peak of a step on the device, less the gradients of the weights, and on the host."""
    with torch.device(device):
        model = build(name, depth)
        batch = torch.zeros(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(64, dtype=torch.int64)
    step = step_bytes(model, batch, labels)
    on_device = step.peak_bytes - step.kinds_at_peak.get(GRADIENTS, 0)
    return on_device / 64 / MIB, offloading.peak_bytes(model) / 64 / MIB


def test_what_leaves_the_device_is_not_counted_there_and_depth_costs_nothing(build: Build) -> None:
    """The 3,096,576 encoded elements per sample at depth 164, once as x and twice as ReLU's output."""
    deep, shallow = (counted("offload", depth, "meta", build) for depth in (164, 29))
    assert deep[0] == pytest.approx(1.0, abs=0.005)  # four activations of 64 channels
    assert shallow[0] == pytest.approx(1.0, abs=0.005)
    units_mib = 3_096_576 * 4 / MIB
    assert deep[1] == pytest.approx(3 * units_mib, rel=0.01)


def test_the_meta_device_counts_what_a_real_step_moves(build: Build) -> None:
    on_meta, real = (counted("offload", 11, device, build)[1] for device in ("meta", "cpu"))
    assert on_meta == real


def test_host_memory_that_is_not_there_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "host_bytes_left", lambda: 2**20)
    offloading._check_host_memory(2**20)
    with pytest.raises(RuntimeError) as raised:
        offloading._check_host_memory(2**20 + 1)
    reason = "does not fit: host out of memory: 2097152 bytes are to be pinned and 1048576 are left"
    assert classify(raised.value) == (1, reason)


def test_what_is_left_is_the_machine_s_or_the_container_s(tmp_path: Path) -> None:
    def write(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    write("proc/meminfo", "MemTotal:       1000 kB\nMemAvailable:    500 kB\nBuffers: 3 kB\n")
    assert host_bytes_left(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    assert host_bytes_left(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "300000\n")
    write("sys/fs/cgroup/memory.current", "100000\n")
    assert host_bytes_left(tmp_path) == 200000
    assert host_bytes_left() > 0


@pytest.mark.parametrize("task", ["train", "runtime", "gradient-error"])
def test_without_a_gpu_it_is_refused_on_one_line(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([f"task={task}", *NETWORK]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "blpa-run: error: mode=offload: it moves activations from a GPU to the host, and this run is"
    )
    assert said.count("\n") == 1


def test_without_a_gpu_it_is_not_timed_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["task=runtime", *NETWORK, "mode=exact", "task.modes=[offload]", "task.steps=1", "dataset.batch_size=2"]
    assert cli.main(arguments) == 0
    assert "offload is not timed" in capsys.readouterr().err


def test_without_a_gpu_its_memory_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*NETWORK, "dataset=cifar10", "width=1"]
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.6", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("offload, depth 11, width 1: largest batch ")
    assert said.endswith(" of the host's memory\n")
    assert cli.main(["task=memory", "dataset.batch_size=64", *arguments]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "moved to the host" in line]
    exact, moved = (float(cell) for cell in row.split("|")[2:4])
    assert moved > 0
    assert exact == 0


def test_a_batch_that_the_host_cannot_hold_is_not_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = composed(["task=max-batch", "mode=offload", "depth=11", "gpu=gtx1080ti"])
    bytes_of_64 = network.training_bytes(config, 64).host_bytes
    monkeypatch.setattr(max_batch, "host_bytes_left", lambda: 20 * bytes_of_64)
    assert max_batch._host_batch(config) == 640
    (config,) = composed(["task=max-batch", "mode=exact", "gpu=gtx1080ti"])
    assert max_batch._host_batch(config) > 2**60
