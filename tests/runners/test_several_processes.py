"""Several processes that train one network, by gloo on a CPU: the same images, bits and decisions as one."""

from pathlib import Path

import pytest
import several_processes
import torch
from torch import nn

from blpa import PreActResNet, StockLayers
from runners import fresh
from runners.training.reduction import BUCKET_BYTES, grouped


def test_four_processes(tmp_path: Path) -> None:
    context = fresh.server()  # from which they begin at once
    runs = [context.Process(target=several_processes.run, args=(tmp_path, rank)) for rank in range(4)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    failures = [file.read_text() for file in sorted(tmp_path.glob("failed-*"))]
    assert [one.exitcode for one in runs] == [0] * 4, "\n".join(failures)


@pytest.mark.parametrize(("depth", "architecture"), [(1001, "cifar"), (152, "imagenet")])
def test_gradients_take_at_most_one_collective_per_25_mib(depth: int, architecture: str) -> None:
    with torch.device("meta"):
        model = PreActResNet(depth, layers=StockLayers(), classes=1000, architecture=architecture)
    buckets = grouped(model.parameters())
    parameters = list(model.parameters())
    assert [id(one) for bucket in buckets for one in bucket] == [id(one) for one in reversed(parameters)]
    total = sum(parameter.nbytes for parameter in parameters)
    assert len(buckets) <= -(-total // BUCKET_BYTES)


def test_buckets_hold_what_learns_by_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3, bias=False))
    model[0].bias.requires_grad_(False)
    last, double, first = grouped(model.parameters())
    assert [[p.dtype for p in part] for part in (last, double, first)] == [
        [torch.float32], [torch.float64] * 2, [torch.float32]
    ]  # fmt: skip
