"""Several processes that train one network, by gloo on a CPU: the same images, bits and decisions as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from blpa import PreActResNet, StockLayers
from runners.training.reduction import BUCKET_BYTES, grouped

TESTS = Path(__file__).parent.parent


def test_four_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("several_processes.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, tmp_path, str(rank)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(4)
    ]
    errors = [run.communicate()[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, "\n".join(errors)


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
