"""What a training step launches on a GPU, counted without one: a small kernel costs its launch, not its work."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blpa.layers import CodedLayers
from blpa.models.preact_resnet import PreActResNet
from runners.config import DatasetConfig, GpuConfig
from runners.data import Split
from runners.training import steps

pytest.importorskip("triton", reason="Triton comes with torch for CUDA: it is not installed")
from blpa.kernels import triton_ops
from blpa.kernels.triton_ops import TRITON

NO_KERNEL = {"alias", "as_strided", "detach", "empty", "empty_like", "new_empty", "expand", "permute", "reshape",
             "select", "slice", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}  # fmt: skip
"""Operations that make a view, or memory that nothing is written to."""


class Launches(TorchDispatchMode):
    """Counts the kernels that operations launch; those of ours are counted, not run.

    Attributes:
        counts: launches by the name of the operation, or of the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def launched(self, kernel: Any, *others: object, **constants: object) -> None:
        """Stand in for triton_ops._launch."""
        self.counts[kernel.__name__] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        name = func._schema.name.removeprefix("aten::")
        if name == "_fused_sgd_":
            self.counts[name] += math.ceil(len(args[0]) / 48)  # tensors that fit the arguments of one launch
        elif name == "constant_pad_nd":
            self.counts[name] += 2  # zeros, and what is copied between them
        elif not name.startswith(("blpa::", "profiler::")) and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_step(monkeypatch: pytest.MonkeyPatch, *, depth: int, precision: str) -> Counter[str]:
    """With 4 bits, on images so small that the CPU's own arithmetic takes no time."""
    counted = Launches()
    monkeypatch.setattr(triton_ops, "_launch", counted.launched)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(conv=SimpleNamespace(fp32_precision="tf32")))
    recipe = DatasetConfig(name="cifar10", batch_size=4, momentum=0.9)
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last), torch.arange(4))
    model = PreActResNet(depth, layers=CodedLayers(kernels=TRITON, eps=1e-3), classes=10)
    gpu = GpuConfig(name="cpu", precision=precision)
    model = model.to(memory_format=torch.channels_last)
    step = steps.TrainingStep(
        model,
        steps.make_optimiser(model, recipe),
        lambda inputs: split.batch(inputs, recipe),
        gpu=gpu,
        device=torch.device("cpu"),
    )
    draws = torch.tensor([[image, 4, 4, 0] for image in range(4)])
    step((draws,), rate=0.0)  # the first one makes the momentum
    counted.counts.clear()
    with counted:
        step((draws,), rate=0.0)
    return counted.counts


BN_RELU_CONVS, POINTWISE = 162, 106
"""BN-ReLU-convs of depth 164, and those of them whose convolution is 1x1 and of stride 1."""


@pytest.mark.parametrize(("precision", "most"), [("tf32", 1400), ("bf16", 1600)])
def test_a_step_of_depth_164_launches_few_kernels(precision: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stock layers PyTorch launches some 1,450: a step of batch 128 is bound by the time that a launch takes."""
    counts = launches_of_a_step(monkeypatch, depth=164, precision=precision)
    assert counts.total() <= most
    for kernel in ("_channel_stats", "_normalise_rectify_encode", "_gradient_sums", "_input_gradient"):
        assert counts[kernel] == BN_RELU_CONVS + 1
    assert (counts["_weight_gradient"], counts["_decode"]) == (POINTWISE, BN_RELU_CONVS - POINTWISE)


def test_bf16_casts_a_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradient of one, where a product of bfloat16 made it: in the backward pass no weight is cast."""
    casts = [launches_of_a_step(monkeypatch, depth=29, precision=p)["_to_copy"] for p in ("tf32", "bf16")]
    bn_relu_convs, pointwise = 27, 16
    # Besides: images, stem's and classifier's weights, bias and logits, and on the way back all but the images.
    assert casts[1] - casts[0] == bn_relu_convs + (bn_relu_convs - pointwise) + 5 + 4
