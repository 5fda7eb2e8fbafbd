"""Converted networks under torch.compile: eager gradients, codes between the passes, and a refusal where neither holds.

The backend aot_eager runs PyTorch's own kernels, so its results are eager ones to the bit; Inductor's own kernels round
otherwise.
"""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import blpa

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("new_compiler")


class Network(nn.Module):
    """Most of the coded functions, and the ways in which networks change activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.norm = nn.BatchNorm2d(8)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.squeeze = nn.Sequential(nn.Linear(8, 8), nn.Hardsigmoid(inplace=True))
        self.smooth = nn.Sequential(nn.InstanceNorm2d(8), nn.Hardswish(inplace=True), nn.LeakyReLU(0.1, inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        out = self.norm(self.block(x))
        out += x
        x = F.relu(out)
        x = self.smooth(x * self.squeeze(x.mean((2, 3)))[:, :, None, None])
        x = torch.cat((F.silu(self.group_norm(x)), F.avg_pool2d(x, 2).repeat(1, 1, 2, 2)), 2)
        return self.head(F.gelu(self.layer_norm(x.flatten(2).transpose(1, 2)))).mean(1)


def gradients(network: nn.Module, model: Callable[[Tensor], Tensor], x: Tensor = IMAGES) -> list[Tensor]:
    network.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def pair(bits: int | None = 4, **settings: Any) -> tuple[Network, Network]:
    """Two converted networks with the same weights."""
    torch.manual_seed(0)
    network = blpa.convert(Network(), bits, **settings)
    return network, copy.deepcopy(network)


def compiled(network: nn.Module, backend: Any = "aot_eager") -> Any:
    return torch.compile(network, fullgraph=True, backend=backend)


def saved_bytes(network: nn.Module, model: Callable[[Tensor], Tensor]) -> dict[torch.dtype, int]:
    """Bytes that a forward pass saves, weights and input aside, by dtype."""
    held = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers(), IMAGES)}
    found: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        model(IMAGES)
    total: dict[torch.dtype, int] = {}
    for address, tensor in found.items():
        if address not in held:
            total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("setting", ["4 bits", "8 bits", "no codes", "layers", "eval", "channels last", "bf16"])
def test_gradients_and_statistics_are_those_of_eager(setting: str) -> None:
    settings: dict[str, Any] = {"layers": {"block": 8, "head": None}} if setting == "layers" else {}
    network, other = pair({"8 bits": 8, "no codes": None}.get(setting, 4), **settings)
    network.train(setting != "eval")
    other.train(setting != "eval")
    x = IMAGES
    if setting == "channels last":
        network, other, x = (thing.to(memory_format=torch.channels_last) for thing in (network, other, x))
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
        expected, found = gradients(other, other, x), gradients(network, compiled(network), x)
    assert len(found) == len(expected) == len(list(network.parameters()))
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, network.buffers(), other.buffers()))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_inductor_computes_the_same_up_to_rounding() -> None:
    network, other = pair()
    expected, found = gradients(other, other), gradients(network, compiled(network, "inductor"))
    for one, same in zip(found, expected, strict=True):
        # Sums of 8 x 16 x 16 fp32 terms in another order, and the codes that rounding moves over an edge.
        assert (one - same).norm() <= 1e-3 * same.norm() + 1e-7


def test_codes_are_saved_and_not_floats() -> None:
    network, other = pair()
    eager, traced = saved_bytes(other, other), saved_bytes(network, compiled(network))
    assert traced[torch.uint8] <= eager[torch.uint8]
    assert traced[torch.float32] <= eager[torch.float32]
    stock = blpa.restore(copy.deepcopy(other))
    assert sum(traced.values()) < 0.35 * sum(saved_bytes(stock, compiled(stock)).values())


def test_an_output_that_pytorch_saves_gets_no_code_besides() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1))
    eager = blpa.convert(copy.deepcopy(stock))
    network = copy.deepcopy(eager)
    expected, found = gradients(eager, eager), gradients(network, compiled(network))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(expected[4], gradients(stock, stock)[4])  # of the last convolution's weight: exact


def test_batches_of_other_sizes_share_a_graph() -> None:
    torch.manual_seed(0)
    network = blpa.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    other = copy.deepcopy(network)
    counter = CompileCounterWithBackend("aot_eager")
    model = compiled(network, counter)
    for batch in (8, 12, 16, 10, 24, 18):
        x = torch.randn(batch, 3, 16, 16)
        assert all(map(torch.equal, gradients(network, model, x), gradients(other, other, x)))
    assert counter.frame_count <= 3  # one size, and ranges of even ones


def test_a_process_that_never_ran_the_network_uncompiled() -> None:
    network = blpa.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    model = compiled(network)
    with ThreadPoolExecutor(1) as fresh:  # what the library remembers, it remembers for each thread
        found = [fresh.submit(gradients, network, model).result() for _ in range(3)]
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.skipif(torch.__version__ < "2.14", reason="PyTorch 2.11 traces Tensor.unflatten under no mode")
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_compiles_without_its_codes(need_weights: bool) -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=need_weights)[0]

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(2), nn.Linear(256, 16), nn.LayerNorm(16), Attention(16, 2, batch_first=True))
    blpa.convert(network, attention=None)
    other = copy.deepcopy(network)
    x = torch.randn(8, 64, 16, 16)
    for one, same in zip(gradients(network, compiled(network), x), gradients(other, other, x), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-7)  # the compiler chooses another attention kernel


def test_dropout_draws_what_eager_draws() -> None:
    torch.manual_seed(0)
    network = blpa.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)))
    torch.manual_seed(1)
    expected = [grad.clone() for grad in gradients(network, network)]
    torch.manual_seed(1)
    assert all(map(torch.equal, gradients(network, compiled(network)), expected))


def test_a_compiled_step_trains_as_an_eager_one() -> None:
    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = network(IMAGES).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    network, other = pair()
    compiled_step = torch.compile(step, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (network, other)]
    assert torch.equal(compiled_step(network, optimizers[0]), step(other, optimizers[1]))
    compiled_step(network, optimizers[0])
    step(other, optimizers[1])
    for one, same in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)  # the optimizer is compiled too, and may round


def test_restored_and_converted_again_it_compiles_again() -> None:
    network, other = pair()
    model = compiled(network)
    for change in (blpa.restore, lambda m: blpa.convert(m, 8)):
        change(network)
        change(other)
        assert all(map(torch.equal, gradients(network, model), gradients(other, other)))


def test_a_compiled_block_of_a_network_saves_codes() -> None:
    network, other = pair(None)
    network.block.compile(backend="aot_eager", fullgraph=True)
    for one, same in zip(gradients(network, network), gradients(other, other), strict=True):
        assert (one - same).norm() <= 1e-5 * same.norm() + 1e-7  # the same formulas in another order of sums
    blpa.convert(blpa.restore(other), 4)
    coded, _ = pair()
    coded.block.compile(backend="aot_eager", fullgraph=True)
    saved, stock = saved_bytes(coded, coded), saved_bytes(other, blpa.restore(copy.deepcopy(other)))
    assert sum(saved.values()) < 0.35 * sum(stock.values())


def test_a_function_that_is_compiled_for_itself_saves_what_the_compiler_chooses() -> None:
    half = torch.compile(lambda x: F.silu(x) / 2, backend="aot_eager", fullgraph=True)

    class Half(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return half(super().forward(x))

    torch.manual_seed(0)
    network = Half(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    expected = [grad.clone() for grad in gradients(network, network)]
    for one, same in zip(gradients(network, blpa.convert(network, None)), expected, strict=True):
        assert (one - same).norm() <= 1e-5 * same.norm() + 1e-7


class Changed(Network):
    """A network that does something between its batch norm and what reads it."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.block(self.pool(self.stem(x))))
        self.change(out)
        return self.head(F.relu(out).mean((2, 3)))


def assign(out: Tensor) -> None:
    out[:, 0] = 1


def add_without_gradient(out: Tensor) -> None:
    with torch.no_grad():
        out.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out,
        lambda out: out.add_(1),
        lambda out: F.relu(out, inplace=True),
        lambda out: out.view(-1)[:10].add_(1),
        lambda out: torch._foreach_mul_([out], 2.0),
        assign,
        add_without_gradient,
    ],
)
def test_an_activation_that_is_changed_in_place_is_coded_anew(change: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    network = blpa.convert(Changed(change))
    other = copy.deepcopy(network)
    assert all(map(torch.equal, gradients(network, compiled(network)), gradients(other, other)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: torch._dynamo.graph_break(), "graph_break"),
        (lambda out: F.scaled_dot_product_attention(*(out.flatten(2),) * 3), "attention.* in 8 bits: not supported"),
    ],
)
def test_what_the_tracer_cannot_follow_is_refused(change: Callable[[Tensor], Any], words: str) -> None:
    network = blpa.convert(Changed(change))
    model = torch.compile(network, backend="aot_eager")
    with pytest.raises(Exception, match=words):
        model(IMAGES)
    assert blpa.coded.mode.THREAD.traced_mode is None


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_evaluation_is_the_network_s_own(strict: bool) -> None:
    network = pair()[0].eval()
    exported = torch.export.export(network, (IMAGES,), strict=strict)
    assert torch.equal(exported.module()(IMAGES), network(IMAGES))
    assert not [node for node in exported.graph.nodes if "blpa" in str(node.target)]
    with pytest.raises(Exception, match="export in training"):
        torch.export.export(network.train(), (IMAGES,), strict=strict)
