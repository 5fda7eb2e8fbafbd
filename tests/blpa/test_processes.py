"""Networks in several processes, and converted ones with activations that other parts of PyTorch offload."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

import blpa

IMAGES = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "check"),
    [("two_processes", "sync"), ("two_processes", "fsdp"), ("two_processes", "ddp"), ("layers_in_processes", "layers")],
)
def test_two_processes(tmp_path: Path, name: str, check: str) -> None:
    script = Path(__file__).with_name(f"{name}.py")
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, tmp_path / "store", str(rank), check], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    errors = [run.communicate()[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)


def test_sync_batch_norm_in_one_process_is_batch_norm() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    explanations = [blpa.explain(one, IMAGES) for one in (model, sync)]
    assert explanations[0].coded == explanations[1].coded
    assert explanations[0].stock == explanations[1].stock
    for one in (model, sync):
        blpa.convert(one)(IMAGES).square().mean().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(sync.parameters(), model.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    )
    assert nn.SyncBatchNorm in {type(module) for module in blpa.restore(sync).modules()}


# ---- offloading


def network() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    return blpa.convert(model)


def gradients(model: nn.Module, hooks: Callable[[], Any] | None = None) -> list[Tensor]:
    if hooks is None:
        out = model(IMAGES)
    else:
        with hooks():
            out = model(IMAGES)
    out.square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_hooks_around_a_converted_network_see_codes_weights_and_vectors() -> None:
    model = network()
    held = {parameter.data_ptr() for parameter in (*model.parameters(), IMAGES)}
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held:
            seen.append(tensor)
        return tensor.clone()  # as one that offloads it

    grads = gradients(model, lambda: saved_tensors_hooks(pack, lambda tensor: tensor.clone()))
    assert same(grads, gradients(network()))
    others = [tensor.shape for tensor in seen if tensor.dtype != torch.uint8]
    assert len(seen) - len(others) > 40
    assert all(len(shape) <= 2 for shape in others)  # vectors, and what the last layer reads


def test_save_on_cpu_gives_the_same_gradient() -> None:
    assert same(gradients(network(), save_on_cpu), gradients(network()))


@pytest.mark.parametrize("converts_first", [False, True])
def test_offloaded_blocks_give_the_same_gradient(converts_first: bool) -> None:
    model = network()
    if not converts_first:
        blpa.restore(model)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, name, offload_wrapper(getattr(model, name)))
    if not converts_first:
        blpa.convert(model)
    assert same(gradients(model), gradients(network()))
