"""Users who compile or export a network of the package's own layers.

The backend aot_eager runs PyTorch's own kernels, so its results are eager ones to the bit; Inductor's own kernels round
otherwise.
"""

import copy
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa import Codec, CodedLayers, PreActResNet, StockLayers
from blpa.kernels.compiled import COMPILED
from blpa.kernels.triton_ops import TRITON

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("new_compiler")


class Network(nn.Module):
    """Each way in which layers are put together: one after the other, with a shortcut, after a sum."""

    def __init__(self, layers: CodedLayers | StockLayers) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = layers.batch_norm_relu(8), layers.conv2d(8, 8, 1)
        self.bn2, self.conv2 = layers.batch_norm_relu(8), layers.conv2d(8, 8, 3)
        self.bn3 = layers.last_batch_norm_relu(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.bn1(self.stem(x), overwrite_x=True))
        for _ in range(2):
            out, x = self.conv2.after_with_shortcut(self.bn2, x)
            x = self.conv2.add_shortcut(out, x)
        return self.head(self.bn3(x).value.mean((2, 3)))


def network(layers: CodedLayers | StockLayers, made_by: Any = Network) -> Any:
    torch.manual_seed(0)
    made = made_by(layers)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return made


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(net: nn.Module, model: Callable[[Tensor], Tensor], x: Tensor = IMAGES) -> list[Tensor]:
    net.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def assert_alike(found: list[Tensor], expected: list[Tensor], *, to_the_bit: bool = True) -> None:
    """Alike to the bit, or up to the order of sums of 256 terms in fp32.

    The tracer's weight gradient of a 1x1 convolution is PyTorch's product, not Triton's.
    """
    assert len(found) == len(expected)
    for one, same in zip(found, expected, strict=True):
        assert torch.equal(one, same) if to_the_bit else (one - same).norm() <= 256 * 2**-23 * same.norm()


class Way(NamedTuple):
    layers: CodedLayers
    frozen: bool = False
    bf16: bool = False
    to_the_bit: bool = True


WAYS = {
    "4 bits, bf16": Way(CodedLayers(), bf16=True),
    "one copy, kernels inductor": Way(CodedLayers(codec=None, kernels=COMPILED), to_the_bit=False),
    # Each kernel is one operation for the tracer: quick to compile.
    "frozen, 2 bits": Way(CodedLayers(codec=Codec(2), kernels=TRITON), frozen=True, to_the_bit=False),
    "naive": Way(CodedLayers(codec=Codec(8), forward_from_code=True, kernels=TRITON), to_the_bit=False),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_a_training_step_was_compiled(way: Way) -> None:
    ours = network(way.layers).train(not way.frozen)
    # The bodies of kernels=inductor are the reference's, and compiled with the network.
    other = network(CodedLayers(codec=None)).train(not way.frozen) if way.layers.codec is None else copy.deepcopy(ours)
    model = compiled(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=way.bf16):
        for step in range(2):  # the second runs what the first has compiled
            expected = gradients(other, other, IMAGES + step)
            assert len(expected) == len(list(ours.parameters()))
            assert_alike(gradients(ours, model, IMAGES + step), expected, to_the_bit=way.to_the_bit)
    assert_alike(list(ours.buffers()), list(other.buffers()))


def test_a_block_was_compiled_by_itself() -> None:
    """In torch 2.14 a function that overwrites an input of the compiled graph loses its gradient."""

    def made_by(layers: CodedLayers) -> PreActResNet:
        return PreActResNet(11, layers=layers, classes=5, width=0.25)

    ours = network(CodedLayers(), made_by)
    other = copy.deepcopy(ours)
    ours.blocks[1].compile(fullgraph=True, backend="aot_eager")
    assert_alike(gradients(ours, ours), gradients(other, other))


class Saved(NamedTuple):
    codes: int
    floats: int


def saved_bytes(net: nn.Module, model: Callable[[Tensor], Tensor], x: Tensor) -> Saved:
    """Bytes that a forward pass saves, parameters and x aside."""
    held = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers(), x)}
    found: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        model(x)
    sizes = [(tensor.dtype, tensor.untyped_storage().nbytes()) for key, tensor in found.items() if key not in held]
    codes = sum(size for dtype, size in sizes if dtype == torch.uint8)
    return Saved(codes, sum(size for _, size in sizes) - codes)


class Unit(nn.Module):
    """One batch norm, ReLU and convolution."""

    def __init__(self, layers: CodedLayers) -> None:
        super().__init__()
        self.bn, self.conv = layers.batch_norm_relu(16), layers.conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.after(self.bn, x)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_inductor_compiled_a_layer_and_saves_codes() -> None:
    ours = network(CodedLayers(), Unit)
    other, model, x = copy.deepcopy(ours), compiled(ours, "inductor"), torch.randn(8, 16, 16, 16)
    eager, traced = saved_bytes(other, other, x), saved_bytes(ours, model, x)
    assert eager.codes == traced.codes == x.numel() // 2
    assert traced.floats <= eager.floats + 2 * ours.conv.weight.nbytes  # of which Inductor makes copies
    for one, same in zip(gradients(ours, model, x), gradients(other, other, x), strict=True):
        # Sums of 8 x 16 x 16 fp32 terms in another order, and the codes that rounding moves over an edge.
        assert (one - same).norm() <= 1e-3 * same.norm()


def test_an_activation_was_changed_in_place_in_a_compiled_network() -> None:
    ours = network(CodedLayers(), Unit)

    def forward(x: Tensor) -> Tensor:
        activation = ours.bn(x)
        activation.value.mul_(2)
        return ours.conv(activation)

    x = torch.randn(4, 16, 8, 8)
    with pytest.raises(ValueError, match=r"^a was changed in place since batch_norm_relu returned it"):
        forward(x)
    with pytest.raises(RuntimeError, match=r"is a view and is being modified inplace"):  # torch's own refusal
        torch.compile(forward, backend="aot_eager")(x)


def test_the_last_batch_of_an_epoch_was_smaller() -> None:
    ours = network(CodedLayers(kernels=TRITON), Unit)

    def forward(x: Tensor) -> Tensor:
        return ours.conv(ours.bn(x))

    model, x = torch.compile(forward, fullgraph=True, backend="aot_eager"), torch.randn(6, 16, 8, 8)
    for batch in (6, 5, 4):
        assert_alike(gradients(ours, model, x[:batch]), gradients(ours, forward, x[:batch]), to_the_bit=False)


@pytest.mark.parametrize("which", ["batch norm", "convolution", "both"])
def test_a_graph_ended_between_a_batch_norm_and_its_convolution(which: str) -> None:
    """Nobody knows then whether the activation was changed, so the convolution saves it."""
    ours = network(CodedLayers(codec=Codec(8)), Unit)
    bn = torch.compile(ours.bn, backend="aot_eager") if which != "convolution" else ours.bn
    conv = torch.compile(ours.conv, backend="aot_eager") if which != "batch norm" else ours.conv
    x = torch.randn(4, 16, 8, 8)
    for weight, exact in zip(
        gradients(ours, lambda x: conv(bn(x)), x),
        gradients(ours, lambda x: F.conv2d(ours.bn(x).value, ours.conv.weight, padding=1), x),
        strict=True,
    ):
        torch.testing.assert_close(weight, exact, rtol=1e-4, atol=1e-6)  # the same operations


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_network_was_exported_for_batches_of_any_size(strict: bool, grad: bool) -> None:
    ours = network(CodedLayers()).eval()
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(ours, (IMAGES,), dynamic_shapes=batch, strict=strict).module()
        for x in (IMAGES, torch.cat((IMAGES, IMAGES + 1))[:7]):
            assert torch.equal(exported(x), ours(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")  # torch 2.11's
def test_a_network_was_traced_for_torchscript() -> None:
    ours = network(CodedLayers())
    with pytest.raises(
        ValueError, match=r"^training = True under torch.jit.trace or .*: trace a network in evaluation"
    ):
        torch.jit.trace(ours, IMAGES)
    ours.eval()
    traced = torch.jit.trace(ours, IMAGES)
    x = torch.cat((IMAGES, IMAGES + 1))[:7]
    assert torch.equal(traced(x), ours(x))


def whole(layers: CodedLayers | StockLayers) -> PreActResNet:
    return PreActResNet(11, layers=layers, classes=5)


@pytest.mark.parametrize("layers", [CodedLayers(), StockLayers()])
@pytest.mark.parametrize("made_by", [whole, Unit])
def test_torch_converted_the_batch_norms_of_a_network_for_several_processes(layers: Any, made_by: Any) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(made_by(layers))
    x = torch.randn(4, 3 if made_by is whole else 16, 8, 8)
    wanted = r"^layer is a SyncBatchNorm: must be a BatchNormReLU or StockBatchNormReLU\. .* use CodedLayers\(sync=True"
    with pytest.raises(TypeError, match=wanted):
        converted(x)


@pytest.mark.parametrize("layers", [CodedLayers(), StockLayers()])
def test_torch_converted_a_batch_norm_that_is_called_by_itself(layers: Any) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(layers.batch_norm_relu(4), layers.conv2d(4, 2, 3))
    )
    wanted = r"^activation is a Tensor: must be what a BatchNormReLU returns; .* use CodedLayers\(sync=True"
    with pytest.raises(TypeError, match=wanted):
        converted(torch.randn(2, 4, 5, 5))


def test_a_network_that_synchronises_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = network(CodedLayers(sync=True), Unit)
    x = torch.randn(4, 16, 8, 8)
    compiled(ours)(x)  # in one process
    torch.compiler.reset()
    monkeypatch.setattr("blpa.layers.sharing", lambda process_group: "two processes")
    with pytest.raises(Exception, match=r"sync = True under torch.compile: must be False in several processes"):
        compiled(ours)(x)


def test_a_batch_norm_of_torch_stood_before_a_convolution() -> None:
    layers = CodedLayers()
    for after in (layers.conv2d(4, 4, 3).after, layers.conv2d(4, 4, 3).after_with_shortcut):
        with pytest.raises(TypeError, match=r"^layer is a BatchNorm2d: must be a BatchNormReLU"):
            after(nn.BatchNorm2d(4), torch.randn(2, 4, 5, 5))
