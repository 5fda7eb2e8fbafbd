"""What a step launches on a GPU, counted without one: a small kernel costs its launch, not its work."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blpa.models.preact_resnet import PreActResNet
from blpa.modes import Mode

pytest.importorskip("triton", reason="Triton comes with torch for CUDA: it is not installed")
from blpa.kernels import triton_ops  # noqa: E402
from blpa.kernels.triton_ops import TRITON  # noqa: E402

NO_KERNEL = {"detach", "empty", "empty_like", "new_empty", "empty_strided", "t", "transpose", "permute", "expand", "view",
             "as_strided", "slice", "unbind", "select", "alias", "unsqueeze", "_unsafe_view", "squeeze"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel; ours by the launches inside of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        monkeypatch.setattr(triton_ops, "_launch", self._launch)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        self.counts[kernel.__name__] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith("blpa::") and name.removeprefix("aten::") not in NO_KERNEL:
            self.counts[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def launches(mode: Mode, depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], ...]:
    """Those of a forward and of a backward pass, on images so small that the arithmetic of the CPU takes no time."""
    model = PreActResNet(depth, mode=mode, classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1])
    for parameter in model.parameters():  # as after zero_grad
        parameter.grad = None
    with Launches(monkeypatch) as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        forward, counted.counts = counted.counts, Counter()
        loss.backward()
    return forward, counted.counts
