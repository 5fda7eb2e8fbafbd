"""Batch norms that compute their ReLU too, or write over their input: where that is proven, and nowhere else."""

import copy
import functools
import importlib.util
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blpa
from blpa.coded import fusion, norms
from blpa.coded.fusion import NONE, Fusion
from blpa.kernels import cpu

BOTH, RECTIFY, OVERWRITE = Fusion(True, True), Fusion(rectify=True), Fusion(overwrite=True)


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
        return self.head(self.relu(self.bn(torch.cat((x, x, x[:, :2]), 1))))


class ByLoop(Parts):
    def forward(self, x: Tensor) -> Any:
        for module in self.children():
            x = module(x)
        return x

    def unused(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


class ByChoice(Parts):
    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn(self.conv(x)))
        norm = self.bn if self.training else self.same
        again = norm(out)
        return self.head(F.relu(again) + again)


class ByHelper(Parts):
    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn(self.conv(x)))
        return self.head(F.relu(out) + helped(self, out))


def helped(parts: Any, x: Tensor) -> Any:
    return parts.bn(x)


class FinallyRead(Parts):
    def forward(self, x: Tensor) -> Any:
        self.seen: list[Tensor] = []
        try:
            y = self.bn(self.conv(x))
            return self.relu(y)
        finally:
            self.seen.append(y)


class SameInputAgain(Parts):
    def forward(self, x: Tensor) -> Any:
        z = self.conv(x)
        z = torch.stack([self.bn(z) for _ in range(2)]).sum(0)
        return self.head(z)


class OtherNames(Parts):
    def forward(self, x: Tensor) -> Any:
        def relu(y: Tensor) -> Tensor:
            return F.leaky_relu(y, 0.3)

        return self.head(relu(self.bn(self.conv(x))))


class CentredAfterwards(Parts):
    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn(self.conv(x)))
        out.data.sub_(0.5)
        return self.head(F.relu(out))


class ReluOfItsOwn(Parts):
    def act(self, x: Tensor) -> Tensor:
        return x + 1

    def __init__(self) -> None:
        super().__init__()
        self._modules["act"] = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.act(self.bn(self.conv(x))))


class Inserting(nn.Sequential):
    def __iter__(self) -> Any:
        """Yield more modules than there are."""
        for module in self._modules.values():
            yield module
            if isinstance(module, nn.BatchNorm2d):
                yield nn.Tanh()


class ByFunctions(Parts):
    def forward(self, x: Tensor) -> Any:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True)
        x = F.relu(x)
        x = centred(x)
        return self.head(x)


def centred(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True, weight=torch.ones(8), bias=torch.zeros(8))


class Decorated(Parts):
    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Any:
        return self.head(self.relu(self.bn(self.conv(x))))


class Positional(Parts):
    def tail(self, x: Tensor, /) -> Any:
        return self.bn(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.tail(self.conv(x))))


class Residual(Parts):
    """A convolution in one sequence, read by a batch norm in the next and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Sequential(self.conv), nn.Sequential(self.bn, self.relu)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(x)


class Tap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


class Tapped(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.tap = Tap()
        self.body = nn.Sequential(self.conv, self.tap, self.bn, self.relu)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x) + self.tap.kept)


class InStages(Parts):
    def forward(self, x: Tensor) -> Any:
        outs = []
        for first, second in ((self.conv, self.same), (self.same, self.bn)):
            x = first(x)
            x = second(x)
            outs.append(x)
        return self.head(F.relu(outs[1]) + outs[0])


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x = self.second(x)
        return x


class InPairs(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Pair(self.conv, self.same), Pair(self.same, self.bn)

    def forward(self, x: Tensor) -> Any:
        z = self.one(x)
        y = self.two(z)
        return self.head(F.relu(y) + z)


class ByMap(Parts):
    def forward(self, x: Tensor) -> Any:
        z = self.conv(x)
        out = F.relu(torch.add(*map(self.bn, [z, z.flip(0)])))
        return self.head(out + F.relu(sum(map(self.bn, [z, z.flip(0)]))))


class Cached(Parts):
    def forward(self, x: Tensor) -> Any:
        conv, norm = functools.lru_cache(self.conv), functools.lru_cache(self.bn)
        out = self.relu(norm(conv(x)))
        return self.head(out + norm(conv(x)) + conv(x))


class LocalsRead(Parts):
    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        named = locals()
        x = self.head(self.relu(self.bn(self.conv(x))))
        return x * named["scale"]


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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Fusion]]] = {
    "nested": (Nested, [BOTH]),
    "statements": (StatementsInOrder, [BOTH]),
    "functional": (Functional, [BOTH]),
    "out of place": (OutOfPlace, [BOTH]),
    "decorated": (Decorated, [BOTH]),
    "called elsewhere too": (CalledElsewhere, [BOTH]),
    "without modules": (ByFunctions, [BOTH, NONE]),
    "no relu": (NoReLU, [OVERWRITE]),
    "statements with a branch": (Statements, [OVERWRITE]),
    "read later": (ReadLater, [OVERWRITE]),
    "read later by name": (ReadLaterByName, [OVERWRITE]),
    "both read": (BothRead, [OVERWRITE]),
    "in a branch": (InABranch, [OVERWRITE]),
    "kept as an attribute": (KeptAsAttribute, [OVERWRITE]),
    "kept by a function": (KeptByAFunction, [OVERWRITE]),
    "read at the end": (FinallyRead, [OVERWRITE]),
    "relu6": (SixAtMost, [OVERWRITE]),
    "a ReLU of its own": (OwnReLU, [OVERWRITE]),
    "a method before a module": (ReluOfItsOwn, [OVERWRITE]),
    "a function of its own": (OtherNames, [OVERWRITE]),
    "input read too": (InputReadToo, [RECTIFY]),
    "input read again": (SameInputAgain, [NONE, NONE]),
    "other input": (OtherInput, [RECTIFY]),
    "passed on": (PassedOn, [BOTH, NONE]),
    "by choice": (ByChoice, [BOTH, NONE]),
    "by a helper": (ByHelper, [BOTH, NONE]),
    "by another method": (Positional, [NONE]),
    "by a loop": (ByLoop, [NONE]),
    "in two sequences": (Residual, [RECTIFY]),
    "kept in a sequence": (Tapped, [RECTIFY]),
    "in stages": (InStages, [NONE]),
    "in pairs": (InPairs, [NONE]),
    "by map": (ByMap, [NONE] * 4),
    "cached": (Cached, [NONE]),
    "by locals": (LocalsRead, [NONE]),
    "changed afterwards": (CentredAfterwards, [BOTH]),
    "in sequence": (lambda: in_sequence(nn.ReLU()), [BOTH]),
    "in sequence, behind others": (lambda: in_sequence(nn.Identity(), nn.ReLU(True)), [BOTH]),
    "in sequence, no relu": (lambda: in_sequence(nn.SiLU()), [OVERWRITE]),
    "in a sequence of its own": (lambda: Inserting(*in_sequence(nn.ReLU())), [NONE]),
    "one module": (with_one_module, [RECTIFY]),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        bn.weight.copy_(torch.linspace(-1, 1, 8))
        bn.bias.copy_(torch.randn(8))
    return model


X = torch.randn(6, 3, 9, 11)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Fusion]:
    """What batch norms may do, one after the other."""
    found: list[Fusion] = []

    def noted(*args: Any) -> Fusion:
        found.append(fusion.fusion_of(*args))
        return found[-1]

    monkeypatch.setattr(norms, "fusion_of", noted)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_batch_norm_may_do(name: str, found: list[Fusion]) -> None:
    blpa.convert(made(name))(X)
    assert found == NETWORKS[name][1]


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize(("hooked", "expected"), [("conv", RECTIFY), ("bn", NONE), ("relu", OVERWRITE)])
def test_a_hook_may_read_what_goes_by(hooked: str, expected: Fusion, register: str, found: list[Fusion]) -> None:
    model = Nested()
    model.relu = nn.ReLU()  # PyTorch refuses to overwrite what a backward hook has seen
    blpa.convert(model)
    handle = getattr(model.get_submodule(hooked), f"register_{register}")(lambda *_: None)
    model(X)
    handle.remove()
    model(X)
    with_all = getattr(nn.modules.module, f"register_module_{register}")(lambda *_: None)
    try:
        model(X)
    finally:
        with_all.remove()
    assert found == [expected, BOTH, NONE]


@pytest.mark.parametrize(("hooked", "expected"), [("conv", RECTIFY), ("bn", NONE)])
def test_a_hook_that_removes_itself_has_read_it_too(hooked: str, expected: Fusion, found: list[Fusion]) -> None:
    model = blpa.convert(Nested())
    module = model.get_submodule(hooked)
    register = module.register_forward_hook if hooked == "conv" else module.register_forward_pre_hook
    handle = register(lambda *_: handle.remove())
    model(X)
    assert found == [expected]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("patched", "expected"), [("conv", RECTIFY), ("bn", NONE), ("same", OVERWRITE), ("relu", OVERWRITE)]
)
def test_a_forward_that_was_replaced_may_do_anything(
    patched: str, expected: Fusion, before: bool, found: list[Fusion]
) -> None:
    model = StatementsInOrder()
    module = model.get_submodule(patched)
    if before:
        forward = module.forward
        module.forward = lambda x: forward(x)  # type: ignore[method-assign]
    blpa.convert(model)
    if not before:
        forward_after = module.forward
        module.forward = lambda x: forward_after(x)  # type: ignore[method-assign]
    model(X)
    # What is called from an unconverted forward has no coded version of its module, but its functions have.
    assert found == [expected]


def test_relu_that_was_replaced_may_do_anything(found: list[Fusion], monkeypatch: pytest.MonkeyPatch) -> None:
    model = blpa.convert(Nested())
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.leaky_relu(x))
    model(X)
    assert found == [OVERWRITE]


class Watched(Parts):
    """Notes which of the watched tensors are alive when its activation is not needed any more."""

    watched: "list[weakref.ref[Tensor]]"

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.head(x)
        self.alive = [tensor() is not None for tensor in self.watched]
        return x


def test_to_look_at_the_program_keeps_no_tensor_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = blpa.convert(Watched())
    model.watched = []

    def noted(frame: Any, x: Tensor, convolved: Any) -> Fusion:
        model.watched.append(weakref.ref(x))
        return fusion.fusion_of(frame, x, convolved)

    monkeypatch.setattr(norms, "fusion_of", noted)
    model(X)
    assert model.alive == [False]


class KeepingResults(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation; this mode could keep the result."""
        return func(*args, **(kwargs or {}))


class KeepingValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; this mode could keep the value."""
        return func(*args, **(kwargs or {}))


def test_a_call_that_was_replaced_may_do_anything(found: list[Fusion], monkeypatch: pytest.MonkeyPatch) -> None:
    model = blpa.convert(Nested())
    monkeypatch.setattr(nn.ReLU, "__call__", lambda self, x: nn.Module.__call__(self, x), raising=False)
    model(X)
    assert found == [OVERWRITE]


def test_nothing_is_fused_while_a_mode_may_keep_a_tensor(found: list[Fusion]) -> None:
    for mode in (KeepingResults(), KeepingValues()):
        with mode:
            blpa.convert(Nested())(X)
        assert not found
    with torch.device("cpu"):
        blpa.convert(Nested())(X)
    assert found == [BOTH]


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize("strided", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_that_are_not_contiguous_have_another_formula(strided: str) -> None:
    x = torch.randn(64, 5, 300, requires_grad=True)
    norm = nn.BatchNorm1d(5)
    vector = getattr(norm, strided)
    vector.data = torch.rand(5, 2)[:, 0]
    stock = copy.deepcopy(norm)
    getattr(stock, strided).data = torch.stack((vector.data,) * 2, 1)[:, 0]
    assert torch.equal(blpa.convert(norm)(x), stock(x))
    assert all(torch.equal(*pair) for pair in zip(norm.buffers(), stock.buffers(), strict=True))


@pytest.mark.usefixtures("in_cpp")
def test_a_traced_step_computes_the_gradients_of_other_inputs() -> None:
    """What is computed beside the dispatcher would be a constant of the graph."""
    traced = blpa.convert(Nested())
    eager, other, factor = copy.deepcopy(traced), X.flip(0), torch.randn(6, 1, 9, 11)

    def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((model(x) * factor).sum(), list(model.parameters()))

    graph = make_fx(lambda x: gradients(traced, x))(X)
    with torch.no_grad():
        found = graph(other)
    assert all(torch.equal(*pair) for pair in zip(found, gradients(eager, other), strict=True))


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_nan_reaches_the_gradients_that_it_reaches_unfused(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = blpa.convert(made("nested"), bits), X.clone()
    with torch.no_grad():
        model.get_submodule("conv").weight[2, 0, 0, 0] = torch.nan
    unfused = copy.deepcopy(model)
    (model(x) * X[:, :1]).sum().backward()
    monkeypatch.setattr(norms, "fusion_of", lambda *_: NONE)
    (unfused(x) * X[:, :1]).sum().backward()
    for one, other in zip(model.parameters(), unfused.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_source_that_is_not_what_runs_proves_nothing(found: list[Fusion], tmp_path: Path) -> None:
    """A file that was edited after it was imported, and text that was never in a file."""
    good = "return F.relu(self.bn(self.conv(x)))"
    bad = "z = self.conv(x); y = self.bn(z); return F.relu(y) + y + z"
    text = "from test_fusion import *\nclass Net(Parts):\n    def forward(self, x):\n        {}\n"
    file = tmp_path / "edited_network.py"
    file.write_text(text.format(bad))
    spec = importlib.util.spec_from_file_location("edited_network", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_fusion"] = sys.modules[__name__]
    spec.loader.exec_module(module)
    file.write_text(text.format(good))
    blpa.convert(module.Net())(X)
    names: dict[str, Any] = {}
    exec(text.format(good), names)
    blpa.convert(names["Net"]())(X)
    assert found == [NONE, NONE]


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
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    stock, fused, unfused = (made(name) for _ in range(3))
    expected = Trained(stock, x)
    found = Trained(blpa.convert(fused, bits), x)
    monkeypatch.setattr(norms, "fusion_of", lambda *_: NONE)
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
    x = X
    whole, but_relu = made("nested"), made("nested")
    found = Trained(blpa.convert(but_relu, layers={"relu": None}), x)
    expected = Trained(blpa.convert(whole), x)
    for key, gradient in expected.gradients.items():
        assert key == "head.weight" or torch.equal(found.gradients[key], gradient)


@pytest.mark.usefixtures("in_cpp")
def test_outputs_seen_by_a_hook_are_pytorch_s() -> None:
    seen: list[Tensor] = []
    x, model = X, made("nested")
    stock = copy.deepcopy(model)
    blpa.convert(model)
    for one in (model, stock):
        one.get_submodule("bn").register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
        one(x)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write of tensors with an element for each of an activation's."""

    only_counts = True

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
    "batch_stats": ((0,), ()), "batch_norm": ((0,), (8,)), "encode": ((0, 1), ()), "decode": ((0,), (5,)),
    "elementwise_grad": ((0, 1), (6,)), "gradient_sums": ((0, 1), ()), "input_grad": ((0, 1), (7,)),
}  # fmt: skip


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize(("is_fused", "expected"), [(True, 30.0), (False, 46.5)])
def test_bytes_per_element_of_a_batch_norm_a_relu_and_a_convolution(
    is_fused: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 4 bits in fp32: statistics 4, normalise and encode 8.5, decode 4.5, sums 4.5, gradient 8.5 make 30.

    Unfused the ReLU reads and writes 8 more, and so does its gradient, with codes. PyTorch's own take 52.
    """
    x = torch.randn(8, 8, 16, 16, requires_grad=True)
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    blpa.convert(model)
    if not is_fused:
        monkeypatch.setattr(norms, "fusion_of", lambda *_: NONE)
    traffic = Traffic(x.numel())
    for name, (read, written) in KERNELS.items():
        kernel = getattr(cpu, name)

        def counted(
            *args: Any, kernel: Any = kernel, name: str = name, of: Any = (read, written), **kwargs: Any
        ) -> Any:
            result = kernel(*args, **kwargs)
            traffic.count(name, ([args[k] for k in of[0]], [*(args[k] for k in of[1]), *tree_leaves(result)]))
            return result

        monkeypatch.setattr(cpu, name, counted)
    with traffic:
        out = model(x)
    grad = torch.randn_like(out)
    with traffic:
        out.backward(grad)
    assert traffic.nbytes / x.numel() == expected, traffic.lines
