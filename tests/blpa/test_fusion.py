"""Batch norms that compute their ReLU too, or write over their input: where that is proven, and nowhere else."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import blpa
from blpa.coded import fusion
from blpa.coded.fusion import Fusion, fusion_of
from blpa.kernels import cpu

BOTH = Fusion(rectify=True, overwrite=True)
convert_module = importlib.import_module("blpa.convert")


class Parts(nn.Module):
    """What the networks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.head = nn.Conv2d(8, 4, 1)


class Nested(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.relu(self.bn(self.conv(x))))


class Statements(Parts):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        x = self.bn(x)
        if self.training:
            x = self.conv(x) if x.shape[1] == 3 else x
        x = self.head(x)
        return x


class StatementsInOrder(Parts):
    def forward(self, x: Tensor) -> Any:
        out = self.conv(x)
        out = self.bn(out)
        out = self.same(out)
        out = self.relu(out)
        return self.head(out)


class Functional(Parts):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class OutOfPlace(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.bn(self.conv(x))))


class NoReLU(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x)))


class ReadLater(Parts):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        a = F.relu(y)
        return self.head(a + y)


class ReadLaterByName(Parts):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        a = F.relu(y)
        return self.head(a), y


class BothRead(Parts):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        y = F.relu(y) + y.tanh()
        return self.head(y)


class InputReadToo(Parts):
    def forward(self, x: Tensor) -> Any:
        z = self.conv(x)
        y = self.relu(self.bn(z))
        return self.head(y + z)


class InABranch(Parts):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if y.shape[0] > 1:
            y = self.relu(y)
        return self.head(y)


class KeptAsAttribute(Parts):
    def forward(self, x: Tensor) -> Any:
        self.kept = self.bn(self.conv(x))
        return self.head(self.relu(self.kept))


class KeptByAFunction(Parts):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        y = self.relu(y)
        self.again = lambda: y
        return self.head(y)


class CalledElsewhere(Parts):
    def features(self, x: Tensor) -> Any:
        return self.bn(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.relu(self.bn(self.conv(x))))


class PassedOn(Parts):
    def forward(self, x: Tensor) -> Any:
        first = self.relu(self.bn(self.conv(x)))
        return self.head(first + call(self.bn, first))


def call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


class OtherInput(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.relu(self.bn(x.repeat(1, 3, 1, 1)[:, :8])))


class ByLoop(Parts):
    def forward(self, x: Tensor) -> Any:
        for module in self.children():
            x = module(x)
        return x

    def unused(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


class SixAtMost(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu6(self.bn(self.conv(x))))


class Quadrupled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 4 * input.clamp_min(0)


class OwnReLU(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.relu = Quadrupled()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.relu(self.bn(self.conv(x))))


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm and ReLU in one module, as timm's."""

    def __init__(self) -> None:
        super().__init__(8)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Any:
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        x = self.drop(x)
        x = self.act(x)
        return x


def in_sequence(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *between, nn.Conv2d(8, 4, 1))


def with_one_module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), BatchNormAct(), nn.Conv2d(8, 4, 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Fusion]] = {
    "nested": (Nested, BOTH),
    "statements": (StatementsInOrder, BOTH),
    "functional": (Functional, BOTH),
    "out of place": (OutOfPlace, BOTH),
    "no relu": (NoReLU, Fusion(overwrite=True)),
    "statements with a branch": (Statements, Fusion(overwrite=True)),
    "read later": (ReadLater, Fusion(overwrite=True)),
    "read later by name": (ReadLaterByName, Fusion(overwrite=True)),
    "both read": (BothRead, Fusion(overwrite=True)),
    "in a branch": (InABranch, Fusion(overwrite=True)),
    "kept as an attribute": (KeptAsAttribute, Fusion(overwrite=True)),
    "kept by a function": (KeptByAFunction, Fusion(overwrite=True)),
    "relu6": (SixAtMost, Fusion(overwrite=True)),
    "a ReLU of its own": (OwnReLU, Fusion(overwrite=True)),
    "input read too": (InputReadToo, Fusion(rectify=True)),
    "other input": (OtherInput, Fusion(rectify=True)),
    "called elsewhere": (CalledElsewhere, fusion.NONE),
    "passed on": (PassedOn, fusion.NONE),
    "by a loop": (ByLoop, fusion.NONE),
    "in sequence": (lambda: in_sequence(nn.ReLU()), BOTH),
    "in sequence, behind others": (lambda: in_sequence(nn.Identity(), nn.ReLU(True)), BOTH),
    "in sequence, no relu": (lambda: in_sequence(nn.SiLU()), Fusion(overwrite=True)),
    "one module": (with_one_module, Fusion(rectify=True)),
}


def batch_norm_in(model: nn.Module) -> tuple[nn.BatchNorm2d, nn.Module]:
    """Return the batch norm, and the module around it."""
    return next(
        (inside, module)
        for module in model.modules()
        for inside in module.children()
        if isinstance(inside, nn.BatchNorm2d)
    )


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    bn, _ = batch_norm_in(model)
    with torch.no_grad():
        bn.weight.copy_(torch.linspace(-1, 1, 8))
        bn.bias.copy_(torch.randn(8))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_batch_norm_may_do(name: str) -> None:
    model = made(name)
    assert fusion_of(*batch_norm_in(model)) == NETWORKS[name][1]
    assert fusion_of(*batch_norm_in(blpa.convert(model))) == NETWORKS[name][1]


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize(
    ("hooked", "expected"), [("conv", Fusion(rectify=True)), ("bn", fusion.NONE), ("relu", Fusion(overwrite=True))]
)
def test_a_hook_may_read_what_goes_by(hooked: str, expected: Fusion, register: str) -> None:
    model = Nested()
    handle = getattr(model.get_submodule(hooked), f"register_{register}")(lambda *_: None)
    assert fusion_of(*batch_norm_in(model)) == expected
    handle.remove()
    assert fusion_of(*batch_norm_in(model)) == BOTH
    with_all = getattr(nn.modules.module, f"register_module_{register}")(lambda *_: None)
    found = fusion_of(*batch_norm_in(model))
    with_all.remove()
    assert found == fusion.NONE


class Trained:
    """Outputs, gradients and buffers of a step."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        out = model(x)
        self.outputs = [one.detach().clone() for one in (out if isinstance(out, tuple) else (out,))]
        (out[0] * out[1].mean() if isinstance(out, tuple) else out).square().sum().backward()
        self.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        self.buffers = dict(model.named_buffers())


@pytest.fixture
def in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the C++ serve tensors of any size."""
    if cpu._load() is None:
        pytest.skip("no compiler here: nothing is fused on this CPU")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 0)


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_has_the_bits_of_one_that_fuses_nothing(
    name: str, bits: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(6, 3, 9, 11)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    stock, fused, unfused = (made(name) for _ in range(3))
    expected = Trained(stock, x)
    found = Trained(blpa.convert(fused, bits), x)
    monkeypatch.setattr(convert_module, "fusion_of", lambda *_: fusion.NONE)
    monkeypatch.setattr(cpu, "normalises_as_pytorch", lambda *_: False)
    plain = Trained(blpa.convert(unfused, bits), x)
    assert all(map(torch.equal, found.outputs, expected.outputs))
    for key, buffer in expected.buffers.items():
        assert torch.equal(found.buffers[key], buffer)
    for key, gradient in plain.gradients.items():
        assert gradient is found.gradients[key] or torch.equal(gradient, found.gradients[key])


@pytest.mark.usefixtures("in_cpp")
def test_a_relu_that_is_excluded_changes_no_gradient_below() -> None:
    """It runs once more, on what is rectified; the convolution after it then encodes its input for itself."""
    x = torch.randn(6, 3, 9, 11)
    whole, but_relu = made("nested"), made("nested")
    found = Trained(blpa.convert(but_relu, layers={"relu": None}), x)
    expected = Trained(blpa.convert(whole), x)
    for key, gradient in expected.gradients.items():
        assert key == "head.weight" or torch.equal(found.gradients[key], gradient)


@pytest.mark.usefixtures("in_cpp")
def test_outputs_seen_by_a_hook_are_pytorch_s() -> None:
    seen: list[Tensor] = []
    x, model = torch.randn(6, 3, 9, 11), made("nested")
    stock = copy.deepcopy(model)
    blpa.convert(model)
    for one in (model, stock):
        one.get_submodule("bn").register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
        one(x)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write of tensors with an element for each of an activation's."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.nbytes = numel, 0
        self.lines: list[tuple[str, float]] = []

    def count(self, name: str, tensors: Any) -> None:
        """Add the tensors of a call: its arguments and results."""
        sizes = {
            (one.data_ptr(), k): one.numel() * one.element_size()
            for k, some in enumerate(tensors)
            for one in some
            if isinstance(one, Tensor) and 8 * one.numel() >= self.numel
        }
        if sizes:
            self.nbytes += sum(sizes.values())
            self.lines.append((name, sum(sizes.values()) / self.numel))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation that is no kernel of ours, and count it."""
        result = func(*args, **(kwargs or {}))
        name = str(func)
        makes_no_traffic = any(
            part in name for part in ("view", "detach", "new_", "empty", "blpa", "convolution", "alias")
        )
        if not makes_no_traffic:
            results = result if isinstance(result, tuple | list) else (result,)
            self.count(name, (args, results))
        return result


KERNELS = {  # which arguments are read, and which written
    "channel_stats": ((0,), ()), "encode": ((0, 1), ()), "normalise_encode": ((0,), (7,)), "decode": ((0,), (5,)),
    "elementwise_grad": ((0, 1), (6,)), "gradient_sums": ((0, 1), ()), "input_grad": ((0, 1), (7,)),
}  # fmt: skip


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize(("is_fused", "most"), [(True, 30.0), (False, 47.0)])
def test_bytes_per_element_of_a_batch_norm_a_relu_and_a_convolution(
    is_fused: bool, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 4 bits in fp32: statistics 4, normalise and encode 8.5, decode 4.5, sums 4.5, gradient 8.5 make 30.

    Unfused the ReLU reads and writes 8 more, and so does its gradient, with codes. PyTorch's own take 52.
    """
    x = torch.randn(8, 8, 16, 16, requires_grad=True)
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    blpa.convert(model)
    if not is_fused:
        monkeypatch.setattr(convert_module, "fusion_of", lambda *_: fusion.NONE)
    traffic = Traffic(x.numel())
    for name, (read, written) in KERNELS.items():
        kernel = getattr(cpu, name)

        def counted(
            *args: Any, kernel: Any = kernel, name: str = name, of: Any = (read, written), **kwargs: Any
        ) -> Any:
            result = kernel(*args, **kwargs)
            traffic.count(name, ([args[k] for k in of[0]], [*(args[k] for k in of[1]), result]))
            return result

        monkeypatch.setattr(cpu, name, counted)
    with traffic:
        out = model(x)
    grad = torch.randn_like(out)
    with traffic:
        out.backward(grad)
    assert traffic.nbytes / x.numel() <= most, traffic.lines
