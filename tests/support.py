"""Configurations, networks, kernels' arguments and comparisons that several test files share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.codec import Codec
from blpa.kernels import Kernels, Norm, compute_dtype
from blpa.kernels.reference import REFERENCE
from blpa.models.preact_resnet import PreActResNet
from runners import cli, compose
from runners.cells import task_settings
from runners.config import Config, DatasetConfig, GpuConfig, ModeConfig
from runners.data import ImageData, Split
from runners.tasks import train as train_task
from runners.training import loop

CPU = torch.device("cpu")
EPS = 1e-3
CODECS = [Codec(8), Codec(4), Codec(2), None]
CHANNELS = {
    "centred": torch.tensor([0.0, 1.0]),
    "ten thousand deviations from zero": torch.tensor([1e4, 1.0]),
    "tiny": torch.tensor([0.0, 1e-12]),
    "constant": torch.tensor([7.7, 0.0]),
}
"""Mean and deviation of a channel."""

TINY = ["dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "dataset.iterations=1", "gpu=cpu", "-m"]
GRADIENTS = [*TINY, "task=gradient-error", "task.steps=1", "gpu.kernels=torch"]


# ---- configurations and runs


def composed(arguments: list[str], *, multirun: bool = False) -> list[Config]:
    """The configurations that a command line asks for."""
    with compose.session():
        return [cell.config for cell in compose.cells(arguments, multirun=multirun)]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that is refused, or that the machine cannot run."""
    assert cli.main(arguments) in (1, 2)
    return capsys.readouterr().err


def make(*, task: str = "train", **values: object) -> Config:
    """A valid configuration; `dataset__batch_size=0` sets a value of a group."""
    config = Config(
        dataset=DatasetConfig(
            name="digits",
            reader="runners.data.digits",
            classes=10,
            image_size=8,
            image_channels=1,
            download=False,
            iterations=300,
            batch_size=64,
            schedule=[[0.00625, 0.01], [0.5, 0.1], [0.75, 0.01], [1.0, 0.001]],
            crop_padding=1,
            flip=False,
        ),
        mode=ModeConfig(name="4bit", layers="coded", bits=4),
        gpu=GpuConfig(name="cpu", device="cpu"),
        task=task_settings(task),
        depth=29,
        run="a-run",
    )
    for key, value in values.items():
        group, _, name = key.rpartition("__")
        target = getattr(config, group) if group else config
        assert hasattr(target, name), key
        setattr(target, name, value)
    return config


# ---- the loop on a tiny network


def tiny_config(**recipe: Any) -> Config:
    """Twelve iterations of five an epoch, evaluated every 3 and saved every 4."""
    values: dict[str, Any] = {
        "name": "digits",
        "reader": "runners.data.digits",
        "classes": 10,
        "image_size": 8,
        "image_channels": 1,
        "iterations": 12,
        "batch_size": 8,
        "schedule": [[0.5, 0.1], [1.0, 0.01]],
        "crop_padding": 1,
        "eval_batch_size": 7,
    }
    return Config(
        dataset=DatasetConfig(**{**values, **recipe}),
        mode=ModeConfig(name="exact", layers="stock"),
        gpu=GpuConfig(name="cpu", kernels="torch", precision="fp32"),
        task=train_task.Settings("train", evaluate_every=3, checkpoint_every=4, keep_every=None),
        run="tiny",
    )


def tiny_data() -> ImageData:
    """42 training images of noise (5 batches of 8, 2 left over) and 20 test images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (62, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (62,), generator=generator)
    return ImageData(Split(images[:42], labels[:42]), Split(images[42:], labels[42:]))


class TinyNet(nn.Module):
    """A convolution, a batch norm and a classifier; `at` tells what to do in the training step of a number."""

    def __init__(self, at: dict[int, Callable[["TinyNet"], object]] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 10)
        self.unused = nn.Parameter(torch.zeros(1))
        self.scale = 1.0
        self.step = 0
        self.at = at or {}
        generator = torch.Generator().manual_seed(0)
        for parameter in (self.conv.weight, self.classifier.weight):
            nn.init.normal_(parameter, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.step += 1
            if self.step in self.at:
                self.at[self.step](self)
        rectified = F.relu(self.norm(self.conv(images)))
        logits: Tensor = self.classifier(rectified.mean(dim=(2, 3)))
        return logits * self.scale


def train(net: nn.Module, run_dir: Path, config: Config | None = None) -> loop.Outcome:
    return loop.train(net, tiny_data(), config or tiny_config(), device=CPU, run_dir=run_dir)


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    file = max(run_dir.glob("checkpoint-*.pt"), key=lambda file: int(file.name.split("-")[1]))
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Weights, statistics and momentum alike to the bit, and metrics.csv to the byte."""
    assert (run_dir / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    ours, theirs = last_checkpoint(run_dir), last_checkpoint(reference)
    assert ours["progress"].pop("seconds") > 0
    assert theirs["progress"].pop("seconds") > 0
    assert ours["progress"] == theirs["progress"]
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())
    assert ours["optimiser"]["state"].keys() == theirs["optimiser"]["state"].keys()
    for key, values in ours["optimiser"]["state"].items():
        assert torch.equal(values["momentum_buffer"], theirs["optimiser"]["state"][key]["momentum_buffer"])


# ---- the CIFAR network


def prepared(model: PreActResNet) -> PreActResNet:
    """In float64, without the ones and zeros that would hide a mistake."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
    return model.double()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module) -> list[Tensor]:
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    return [parameter.grad for parameter in model.parameters()]


# ---- kernels against the reference


class KernelInputs(NamedTuple):
    """Arguments of the kernel functions of one BN-ReLU-conv."""

    x: Tensor
    grad: Tensor
    vectors: Tensor
    saved: Tensor

    @property
    def norm(self) -> Norm:
        return Norm(*self.vectors)


def kernel_inputs(shape: tuple[int, int], codec: Codec | None, dtype: torch.dtype = torch.float64) -> KernelInputs:
    """Draw random inputs; where there are channels enough, one has gamma = 0 and one gamma < 0."""
    generator = torch.Generator().manual_seed(shape[0])
    x, grad = (3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64) + 1).to(dtype)
    gamma, beta, spread = torch.randn(3, shape[1], generator=generator, dtype=torch.float64).to(compute_dtype(dtype))
    gamma[1:2], gamma[2:3] = 0, -gamma[2:3].abs()
    mean, var = x.mean(0).to(gamma.dtype), 10 * (spread / 2).exp()
    vectors = torch.stack(Norm.of(mean, var, gamma, beta, eps=EPS, codec=codec))
    codes = REFERENCE.normalise_rectify_encode(x, vectors, codec=codec, out=torch.empty_like(x))
    return KernelInputs(x, grad, vectors, x if codes is None else codes)


def recovered(i: KernelInputs, codec: Codec | None) -> tuple[Tensor, Tensor]:
    """x_hat~ and relu_mask by the formulas, of whole matrices, with neither row blocks nor packing."""
    x_hat = (i.x - i.norm.mean) * i.norm.rstd
    y = i.norm.gamma * x_hat + i.norm.beta
    if codec is not None:
        x_hat, y = codec.decode(codec.encode(x_hat, y, i.norm.grid), i.norm.grid)
    return x_hat, y > 0


def assert_stats_are_accurate(kernels: Kernels, x: Tensor) -> None:
    """The mean to 8 roundings of the largest value; the variance to the square of that and 4 roundings a row of 64."""
    eps = torch.finfo(torch.float32).eps
    gamma, beta = torch.linspace(-2, 2, 2 * x.shape[1], device=x.device).view(2, -1)
    vectors = kernels.channel_stats(x, gamma, beta, eps=EPS, codec=Codec(4))
    mean, var, *_ = vectors
    torch.testing.assert_close(  # what follows from them is another test's subject: here, that it does follow
        vectors, torch.stack(Norm.of(mean, var, gamma, beta, eps=EPS, codec=Codec(4))), rtol=1e-6, atol=0
    )
    exact_var, exact_mean = torch.var_mean(x.double(), 0, correction=0)
    mean_bound = 8 * eps * x.double().abs().amax(0)
    assert ((mean - exact_mean).abs() <= mean_bound).all()
    assert ((var - exact_var).abs() <= mean_bound.square() + 4 * 64 * eps * exact_var).all()


def assert_backward_is_the_references(
    kernels: Kernels, i: KernelInputs, codec: Codec | None, constant_stats: bool, *, adds: bool = False
) -> None:
    """The sums but for the order of their terms, and dX but for what comes of that."""
    expected, actual = torch.empty_like(i.grad), i.grad.clone()
    options = {"codec": codec, "constant_stats": constant_stats, "add": i.x.flip(0).contiguous() if adds else None}
    expected_sums = REFERENCE.backward(i.grad, i.saved, i.vectors, **options, out=expected)
    sums = kernels.backward(actual, i.saved, i.vectors, **options, out=actual)
    # Two orders of a sum of M terms differ by at most M roundings of the sum of their sizes.
    x_hat, relu_mask = recovered(i, codec)
    sizes = torch.stack([i.grad.abs() * relu_mask, (i.grad * x_hat).abs() * relu_mask]).sum(1)
    off = len(i.x) * torch.finfo(sums.dtype).eps * sizes
    assert ((sums - expected_sums).abs() <= off).all()
    if constant_stats:
        assert torch.equal(actual, expected)
        return
    # The sums reach dX divided by M; and two roundings to its own dtype may differ by one of its units.
    through_sums = off[0] + x_hat.abs() * off[1]
    bound = (i.norm.gamma * i.norm.rstd).abs() * through_sums / len(i.x)
    rounding = torch.finfo(i.x.dtype).eps * expected.abs()
    assert ((actual - expected).abs() <= bound + rounding + 4 * torch.finfo(sums.dtype).eps * scale(i, x_hat)).all()


def assert_the_means_of_others_reach_dx(kernels: Kernels, i: KernelInputs, codec: Codec | None) -> None:
    """Given between the two parts of backward, which have the bits of the whole where the means are the same."""
    results = []
    for constant_stats, means in (
        (False, None), (False, lambda sums: sums * (1 / len(i.x))), (True, None), (False, torch.zeros_like),
    ):  # fmt: skip
        out = torch.empty_like(i.grad)
        options = {"constant_stats": constant_stats, "out": out, "add": i.x.flip(0).contiguous(), "means": means}
        results.append((kernels.backward(i.grad, i.saved, i.vectors, codec=codec, **options), out))
    assert all(torch.equal(sums, results[0][0]) for sums, _ in results)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[2][1], results[3][1])


def scale(i: KernelInputs, x_hat: Tensor) -> Tensor:
    """The sizes of what dX is the difference of."""
    dbeta, dgamma = i.grad.abs().mean(0), (i.grad * x_hat).abs().mean(0)
    return (i.norm.gamma * i.norm.rstd).abs() * (i.grad.abs() + dbeta + x_hat.abs() * dgamma)
