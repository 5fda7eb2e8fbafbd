"""convert and restore: any network, the same object, the gradients within the codes' error."""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import blpa
from blpa.coded.mode import THREAD
from blpa.memory import LiveBytes

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def network(name: str = "resnet18", *, classes: int = 10) -> nn.Module:
    """A network of torchvision in the state of a trained one: gammas of either sign, biases that are not zero."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.data += 0.3 * torch.randn(module.weight.shape, generator=generator)
            module.bias.data += 0.3 * torch.randn(module.bias.shape, generator=generator)
    return model


def step(model: nn.Module, x: Tensor = IMAGES) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name."""
    torch.manual_seed(3)
    logits = model(x)
    labels = torch.randint(logits.shape[1], logits.shape[:1], generator=torch.Generator().manual_seed(0))
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative error of the whole gradient."""
    assert grads.keys() == exact.keys()
    squares = [
        torch.stack([(grads[name].double() - exact[name].double()).square().sum(), exact[name].double().square().sum()])
        for name in exact
    ]
    numerator, denominator = torch.stack(squares).sum(0).sqrt().tolist()
    return float(numerator / denominator)


# ---- gradients


NETWORKS = {
    "resnet18": {8: 0.006, 4: 0.085, 2: 0.29},
    "densenet121": {8: 0.010, 4: 0.13, 2: 0.42},
    "mobilenet_v2": {8: 0.015, 4: 0.19, 2: 0.55},
    "efficientnet_b0": {8: 0.03},
    "shufflenet_v2_x0_5": {8: 0.015, 4: 0.18, 2: 0.55},
}
"""Largest gradient error by bits: about a code's error, times the root of the number of layers where errors add up."""


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_buffers_are_pytorch_s_and_the_gradient_is_within_the_codes_error(name: str) -> None:
    model = network(name, classes=1000)
    x = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    stock = copy.deepcopy(model)
    logits, exact = step(stock, x)
    for bits, limit in {None: 1e-5, **NETWORKS[name]}.items():  # without codes rounding in fp32 alone
        coded = blpa.convert(copy.deepcopy(model), bits)
        coded_logits, grads = step(coded, x)
        assert torch.equal(coded_logits, logits)
        assert all(torch.equal(one, other) for one, other in zip(coded.buffers(), stock.buffers(), strict=True))
        assert error(grads, exact) <= limit


def test_without_codes_the_gradient_is_exact_in_float64() -> None:
    stock = network().double()
    coded = blpa.convert(copy.deepcopy(stock), None)
    _, exact = step(stock, IMAGES.double())
    _, grads = step(coded, IMAGES.double())
    assert error(grads, exact) <= 1e-12  # sums of 1e5 terms in 53 bits


def test_frozen_statistics_on_data_of_another_domain_keep_their_range() -> None:
    """The grid is about the data's own mean: about the running mean it would cut off all of it."""
    model = network().eval()
    x = 5 + 3 * IMAGES
    stock = copy.deepcopy(model)
    _, exact = step(stock, x)
    for bits, limit in NETWORKS["resnet18"].items():
        _, grads = step(blpa.convert(copy.deepcopy(model), bits), x)
        assert error(grads, exact) <= limit


def test_a_vision_transformer_saves_little_and_shares_the_codes_of_layer_norms() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 4, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads[0].weight, std=0.02)  # torchvision's is 0: nothing below would have a gradient
    x = torch.randn(4, 3, 32, 32)
    stock = copy.deepcopy(model)
    logits, exact = step(stock, x)
    for settings, limit in (({"bits": None}, 1e-5), ({"bits": 8}, 0.02), ({"bits": 4}, 0.2)):
        coded = blpa.convert(copy.deepcopy(model), **settings)
        coded_logits, grads = step(coded, x)
        assert torch.equal(coded_logits, logits)
        assert error(grads, exact) <= limit
    exact_attention = error(step(blpa.convert(copy.deepcopy(model), 8, attention=None), x)[1], exact)
    assert exact_attention < error(step(blpa.convert(copy.deepcopy(model), 8), x)[1], exact)


def test_others_codes_what_has_no_coded_version() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x * 1)
            return torch.tanh(y) * torch.sigmoid(y)

    torch.manual_seed(0)
    model = Gated()
    saved = {}
    for others in (None, 8):
        coded = blpa.convert(copy.deepcopy(model), 8, others=others)
        counter = LiveBytes()
        with counter:
            out = coded(IMAGES)
            saved[others] = counter.live_bytes
        found = torch.autograd.grad(out.square().sum(), coded.conv.weight)[0]
        exact = torch.autograd.grad(model(IMAGES).square().sum(), model.conv.weight)[0]
        # 8 bits of four tensors: half a bin is 1/510 of a range that is a few deviations wide.
        assert (found - exact).norm() / exact.norm() < 0.02
    assert saved[8] < 0.6 * saved[None]


# ---- the object


def test_only_the_classes_of_modules_change_and_restore_gives_them_back() -> None:
    model = network()
    model.layer1.register_forward_hook(lambda *_: None)
    before = {
        "ids": [id(value) for value in (*model.modules(), *model.parameters(), *model.buffers())],
        "vars": [{**vars(module)} for module in model.modules()],
        "types": [type(module) for module in model.modules()],
        "repr": repr(model),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
    }
    assert blpa.convert(model) is model
    assert isinstance(model, torchvision.models.ResNet)
    assert type(model) is not torchvision.models.ResNet
    assert type(model).__name__ == "ResNet"
    for _ in range(2):
        assert [id(value) for value in (*model.modules(), *model.parameters(), *model.buffers())] == before["ids"]
        assert [vars(module) for module in model.modules()] == before["vars"]
        assert repr(model) == before["repr"]
        state = model.state_dict()
        assert list(state) == list(before["state"])
        assert all(torch.equal(state[name], value) for name, value in before["state"].items())
        assert blpa.restore(model) is model
    assert [type(module) for module in model.modules()] == before["types"]
    fresh = network()
    (logits, grads), (fresh_logits, fresh_grads) = step(model), step(fresh)
    assert torch.equal(logits, fresh_logits)
    assert all(torch.equal(grads[name], fresh_grads[name]) for name in fresh_grads)


def test_copies_and_pickles_are_independent_and_coded() -> None:
    model = blpa.convert(network(), 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    _, grads = step(model)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        other.load_state_dict(network().state_dict())
        other.zero_grad()
        _, other_grads = step(other)
        assert all(torch.equal(other_grads[name], grads[name]) for name in grads)
        assert type(blpa.restore(other)) is torchvision.models.ResNet
        assert type(model) is not torchvision.models.ResNet


def test_an_exception_in_the_forward_pass_leaves_no_mode_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            self.conv(x)
            raise KeyboardInterrupt

    model = blpa.convert(Failing())
    with pytest.raises(KeyboardInterrupt):
        model(IMAGES)
    assert not _get_current_function_mode_stack()
    assert THREAD.mode is None


def test_a_class_that_registers_its_subclasses_or_has_a_metaclass_converts() -> None:
    registered = []

    class Meta(type):
        pass

    class Registering(nn.Module, metaclass=Meta):
        def __init_subclass__(cls, *, name: str) -> None:
            registered.append(name)

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return scale * x

    module = Registering()
    stock = torch.ones(1)
    assert torch.equal(blpa.convert(module)(stock, scale=3.0), 3 * stock)
    assert type(type(module)) is Meta
    assert registered == []


def test_without_gradients_pytorch_s_own_forward_runs() -> None:
    model = blpa.convert(network())
    with torch.no_grad():
        model(IMAGES)
    with torch.inference_mode():
        logits = model.eval()(IMAGES)
    assert torch.equal(logits, blpa.restore(model)(IMAGES))


# ---- settings


def saved_bytes(model: nn.Module, x: Tensor = IMAGES) -> int:
    counter = LiveBytes()
    counter.ignore([x, *model.parameters(), *model.buffers()])
    with counter:
        out = model(x)
        found = counter.live_bytes
    out.sum().backward()
    return found


def test_settings_of_layers_the_last_pattern_that_matches_counts() -> None:
    stock, whole = saved_bytes(network()), saved_bytes(blpa.convert(network()))
    none = saved_bytes(blpa.convert(network(), layers={"*": None}))
    assert none == stock
    some = saved_bytes(blpa.convert(network(), layers={"layer1": None}))
    assert whole < some < stock
    assert saved_bytes(blpa.convert(network(), layers={"*": None, "layer[1-4].*": 4, "layer1.0": 8})) < stock
    inner = saved_bytes(blpa.convert(network(), layers={"layer1": None, "layer1.*": 4}))
    assert whole <= inner < some
    model = blpa.convert(network(), 2)
    assert saved_bytes(blpa.convert(model, 8)) > saved_bytes(blpa.convert(model, 4)) > saved_bytes(
        blpa.convert(model, blpa.Codec(2, clip="range"))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error_type", "words"),
    [
        (lambda m: blpa.convert(3), TypeError, "model is a int: must be a torch.nn.Module"),
        (lambda m: blpa.convert(m, 3), ValueError, "bits = 3: must be 8, 4, 2, a blpa.Codec or None"),
        (lambda m: blpa.convert(m, True), ValueError, "bits = True: must be"),
        (lambda m: blpa.convert(m, "4"), ValueError, "bits = '4': must be"),
        (lambda m: blpa.convert(m, attention=4), ValueError, "attention = 4: must be 8 or None"),
        (lambda m: blpa.convert(m, others=2), ValueError, "others = 2: must be 8 or None"),
        (lambda m: blpa.convert(m, layers=["layer1"]), TypeError, "layers is a list: must map"),
        (lambda m: blpa.convert(m, layers={"layer1": 5}), ValueError, "bits = 5: must be"),
        (lambda m: blpa.convert(m, layers={"layre4.*": 8}), ValueError, "'layre4.*' matches no module.*layer4"),
        (
            lambda m: blpa.convert(m, layers={"head": None}),
            ValueError,
            "'head' matches no module; the model's are .*fc",
        ),
        (lambda m: blpa.convert(blpa.PreActResNet(11, layers=blpa.CodedLayers(), classes=10)), ValueError, "is a blpa"),
        (lambda m: blpa.explain(m, (2, 3, 64, 64)), ValueError, "the inputs hold no tensor"),
        (lambda m: blpa.convert(torch.compile(m)), ValueError, "model is compiled"),
        (lambda m: m.layer1.compile() or blpa.convert(m), ValueError, "module 'layer1' is compiled"),
        (lambda m: blpa.convert(wrapped(m)), ValueError, "model has a forward of its own: must be its class's"),
        (lambda m: blpa.Codec(4, clip="wide"), ValueError, "clip = 'wide': must be"),
        (lambda m: blpa.gradient_error(m, IMAGES), ValueError, "ResNet is not converted"),
        (lambda m: blpa.convert(m, torch.tensor(4)), ValueError, "must be 8, 4, 2, a blpa.Codec or None"),
        (lambda m: blpa.convert(m, layers={1: 8}), TypeError, "layers: 1 is a int: must be a pattern"),
        (lambda m: blpa.convert(nn.Linear(2, 2), layers={"a": 8}), ValueError, "the model has no modules inside"),
        (lambda m: blpa.explain(m, bits=4), ValueError, "the inputs hold no tensor"),
    ],
)
def test_what_is_not_allowed_is_refused_and_nothing_changes(
    call: Callable[[nn.Module], Any], error_type: type[Exception], words: str
) -> None:
    model = network()
    with pytest.raises(error_type, match=words):
        call(model)
    assert type(model) is torchvision.models.ResNet


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
def test_a_scripted_network_is_refused() -> None:
    with pytest.raises(ValueError, match="model is a RecursiveScriptModule"):
        blpa.convert(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_a_sharded_network_is_refused() -> None:
    class FSDPModule(nn.Module):  # of this name in torch.distributed, which not every build has
        pass

    with pytest.raises(ValueError, match="model is sharded by FSDP: must be a plain module; convert, then shard"):
        blpa.convert(FSDPModule())


def test_a_network_that_saves_no_codes_warns_once() -> None:
    model = blpa.convert(nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="Linear is converted, but its forward pass saved no codes"):
        model(torch.ones(1, 3))
    model(torch.ones(1, 3))


# ---- with other parts of PyTorch


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: torch.func.vmap(lambda x: m(x[None]))(IMAGES), "torch.func transforms: not supported"),
        (
            lambda m: torch.func.grad(lambda p: torch.func.functional_call(m, p, IMAGES).sum())(
                dict(m.named_parameters())
            ),
            "torch.func transforms: not supported",
        ),
        (lambda m: torch.export.export(m.train(), (IMAGES,)), "export in training: not supported"),
        (lambda m: torch.jit.trace(m, IMAGES), "tracing: not supported"),
        (lambda m: torch.jit.script(m), "torch.jit.script: not supported"),
        (lambda m: twice(m), "second derivatives .* are not supported, since"),
        (
            lambda m: torch.autograd.functional.hvp(lambda x: m(x).sum(), IMAGES, IMAGES),
            "second derivatives .* are not supported, since",
        ),
    ],
)
def test_what_cannot_read_codes_is_refused(call: Callable[[nn.Module], Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(blpa.convert(network()).eval())


def twice(model: nn.Module) -> None:
    x = IMAGES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum().backward()


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    model = blpa.convert(network())
    loss = model(IMAGES).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Checkpointed(nn.Module):
    """All of a network inside one checkpoint, functions called by hand included."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = network()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda x: self.body(F.relu(x)), x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_parts_are_left_to_pytorch(use_reentrant: bool) -> None:
    stock = Checkpointed(use_reentrant)
    coded = blpa.convert(copy.deepcopy(stock))
    grads = []
    for model in (stock, coded):
        x = IMAGES.clone().requires_grad_()
        if model is coded:
            with pytest.warns(UserWarning, match="saved no codes"):
                out = model(x)
        else:
            out = model(x)
        out.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if use_reentrant:  # it runs a second time in the backward pass, where its modules are converted
        assert error(grads[1], grads[0]) < NETWORKS["resnet18"][4]
    else:
        assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def wrapped(model: nn.Module) -> nn.Module:
    """Put a wrapper around its forward into a model, as Accelerate does for mixed precision."""
    function = type(model).forward

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any) -> Any:
        return function(self, *args)

    model.forward = MethodType(forward, model)
    return model


def test_a_forward_that_a_tool_has_wrapped_follows_convert_and_restore() -> None:
    def net() -> Net:
        return Net(lambda net, x: F.relu(F.conv2d(F.relu(x), net.conv.weight)))  # nothing that a module inside does

    x = torch.randn(4, 6, 16, 16)
    model = blpa.convert(net(), 4)
    function = type(model).forward
    wrapped(model)
    assert inspect.signature(model.forward) == inspect.signature(net().forward)
    assert inspect.unwrap(model.forward) is function
    for bits in (4, 8):
        assert saved_bytes(blpa.convert(model, bits), x) == saved_bytes(blpa.convert(net(), bits), x)
    assert saved_bytes(blpa.restore(model), x) == saved_bytes(net(), x)


# ---- sharing


class Net(nn.Module):
    """Layers for a forward that a test writes."""

    def __init__(self, function: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.bn, self.relu, self.conv = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)
        self.other, self.linear = nn.Conv2d(12, 6, 1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x * 1)


def changed_between(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    y += 0.5
    a = net.bn(net.conv(torch.relu(y)))
    a *= 2
    out: Tensor = net.conv(a)
    return out


def changed_through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    y.flatten(1)[:, ::3] = 0.7
    out: Tensor = net.conv(y)
    return out


def a_view_changed_after_its_base(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    tokens = y.flatten(2).transpose(1, 2)
    y.add_(1)
    out: Tensor = net.linear(tokens)
    return out


def read_by_a_relu_and_a_sum(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    out: Tensor = net.conv(torch.relu(y)) + y
    return out


def joined(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.other(torch.cat([net.relu(net.bn(x)), net.conv(x)], 1))
    return out


def split(net: Net, x: Tensor) -> Tensor:
    both = torch.cat([torch.relu(net.bn(x)), torch.relu(net.bn(2 * x))], 1)
    first, second = both.chunk(2, 1)
    out: Tensor = net.conv(first) + net.conv(second)
    return out


def split_of_one(net: Net, x: Tensor) -> Tensor:
    a = torch.relu(net.bn(x))
    first, second = a.split([2, 4], 1)
    out: Tensor = net.conv(torch.cat([second, first], 1))
    return out


def tokens(net: Net, x: Tensor) -> Tensor:
    a = torch.relu(net.bn(x))
    out: Tensor = F.gelu(net.linear(a.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return out


def reshaped(net: Net, x: Tensor) -> Tensor:
    a = F.silu(net.bn(x))
    out: Tensor = net.linear(a.reshape(len(a), 6, -1).transpose(1, 2).contiguous().view(-1, 6))
    return out


def one_relu_in_three_places(net: Net, x: Tensor) -> Tensor:
    y = net.relu(net.bn(x))
    y = net.relu(net.conv(y) + y)
    out: Tensor = net.relu(net.conv(y))
    return out


def a_block_called_twice(net: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = net.conv(net.relu(net.bn(x)))
    return x


def relu_of_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    y[:, :3].relu_()
    out: Tensor = net.conv(y)
    return out


def in_place_after_a_linear_layer(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.linear(net.relu(net.linear(x.flatten(2).transpose(1, 2))))
    return out


def read_before_and_after_a_relu(net: Net, x: Tensor) -> Tensor:
    y = net.bn(x)
    first = net.conv(y)
    out: Tensor = first + net.conv(net.relu(y))
    return out


SHARING = [
    changed_between, changed_through_a_view, a_view_changed_after_its_base, read_by_a_relu_and_a_sum, joined, split,
    split_of_one, tokens, reshaped, one_relu_in_three_places, a_block_called_twice, relu_of_a_view,
    in_place_after_a_linear_layer,
]  # fmt: skip


@pytest.mark.parametrize("function", SHARING)
def test_readers_of_a_tensor_get_its_value_at_the_time(function: Callable[[Net, Tensor], Tensor]) -> None:
    x = torch.randn(4, 6, 10, 9, generator=torch.Generator().manual_seed(5))
    # Without codes all must be exact; 1e-6 is fp32's rounding. At 8 bits a code that belongs elsewhere would show.
    for bits, limit in ((None, 1e-6), (8, 0.03)):
        stock = Net(function)
        coded = blpa.convert(Net(function), bits)
        grads = []
        for net in (stock, coded):
            out = net(x)
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(6))).sum().backward()
            grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert error(grads[1], grads[0]) <= limit


def test_reading_before_a_change_in_place_needs_the_value_before() -> None:
    """PyTorch refuses this backward pass, for it saved y itself; the codes are of y as it was."""
    x = torch.randn(4, 6, 10, 9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Net(read_before_and_after_a_relu)(x).sum().backward()
    blpa.convert(Net(read_before_and_after_a_relu))(x).sum().backward()


def test_what_hooks_and_callers_get_carries_no_codes() -> None:
    caught: list[Tensor] = []
    model = blpa.convert(network())
    model.bn1.register_forward_hook(lambda module, inputs, output: caught.append(output.clone()))
    features = nn.Sequential(*list(model.children())[:3])
    out = blpa.convert(features)(IMAGES)
    stock = network()
    stock_features = nn.Sequential(*list(stock.children())[:3])
    stock.bn1.register_forward_hook(lambda module, inputs, output: caught.append(output.clone()))
    stock_out = stock_features(IMAGES)
    assert torch.equal(*caught)
    assert torch.equal(out, stock_out)
    sizes = []
    for tensor in (out.detach(), stock_out.detach()):
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        sizes.append(buffer.getbuffer().nbytes)
    assert sizes[0] == sizes[1]


def changed(net: nn.Module, x: Tensor) -> float:
    """Error of the gradient of a network against its own without codes."""
    return blpa.gradient_error(net, x).total


def test_no_codes_outlive_the_forward_pass_or_belong_to_another() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.register_buffer("table", torch.randn(256, 16))
            self.plain = torch.randn(256, 16)  # neither a buffer nor an input
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Any:
            self.kept = torch.tanh(self.first(self.table)) + self.second(self.plain)
            return self.second(self.kept) + x

    model = blpa.convert(Constant(), 8)
    for _ in range(2):
        assert changed(model, torch.ones(256, 16)) < 0.02
        assert all(getattr(t, "_blpa_tag", None) is None for t in (model.table, model.plain, model.kept))
        model.table.data.mul_(-3)  # which autograd does not count as a change
        model.plain.data.mul_(-3)


def test_layers_called_one_by_one_save_as_little_as_in_their_network() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4))
            )

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

        def features(self, x: Tensor) -> Any:
            for layer in self.body:
                for part in layer:
                    x = part(x)
            return x

    x = torch.randn(8, 8, 24, 24)
    model = blpa.convert(Features())
    whole = saved_bytes(model, x)
    counter = LiveBytes()
    with counter:
        out = model.features(x)
        parts = counter.live_bytes
    assert parts < 1.1 * whole + out.nbytes


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, Tensor.sigmoid, torch.exp, lambda x: x.softmax(1)])
def test_an_output_that_pytorch_saves_gets_no_code_besides(function: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Any:
            x = function(self.bn(self.conv(x)))
            return self.head(x.movedim(1, -1))

    net, x = Net(), torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = []
    for bits in (None, 4):
        model = net if bits is None else blpa.convert(copy.deepcopy(net), bits)
        model(x).square().sum().backward()
        found.append(model.head.weight.grad)
    assert torch.equal(*found)  # codes of the output would be approximate
    coded = blpa.explain(net, x).coded.saved
    assert coded < blpa.explain(net, x).stock.saved
    assert blpa.explain(blpa.convert(copy.deepcopy(net), 4, others=8), x).coded.saved < coded


def test_a_channel_far_from_zero_keeps_its_precision() -> None:
    class Shifted(nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.offset = offset

        def forward(self, x: Tensor) -> Any:
            return self.bn(self.second(torch.tanh(self.first(x)) + self.offset))

    for offset in (-10.0, 0.0, 3.0, 10.0):
        error = {row.name: row.error for row in blpa.gradient_error(blpa.convert(Shifted(offset), 8), IMAGES).rows}
        assert error["second.weight"] < 0.02


class Attention(nn.Module):
    """Attention whose queries and keys come from layer norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        for norm in (self.q_norm, self.k_norm):
            nn.init.constant_(norm.weight, 3.0)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x * 1).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_attention_has_8_bits_even_of_a_norm_with_4() -> None:
    x = torch.randn(4, 40, 32)
    model = blpa.convert(Attention(), 4)
    eight, four = changed(model, x), changed(blpa.convert(model, 4, attention=None), x)
    assert eight < 1.3 * four + 0.05


def test_a_small_factor_under_autocast_sums_in_its_own_precision() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.scale = nn.Linear(16, 16), nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Any:
            return self.linear(x * 1) * self.scale

    model = blpa.convert(Scaled())
    with torch.autocast("cpu", torch.float16):
        out = model(torch.randn(64, 16))
    (out.sum() * 2.0**16).backward()
    assert model.scale.grad is not None and model.scale.grad.isfinite().all()


def test_others_leaves_a_mask_of_minus_infinity_exact() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x * 1)
            return torch.logsumexp(y.masked_fill(torch.arange(16) % 3 == 0, -torch.inf), -1)

    model = blpa.convert(Masked(), others=8)
    model(torch.randn(64, 16)).sum().backward()
    assert model.linear.weight.grad is not None and model.linear.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*saved no codes")
@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: torch.sparse.mm(torch.eye(len(x)).to_sparse(), net.linear(x)),
        lambda net, x: torch.cat([net.linear(x), x], axis=1),
        lambda net, x: torch.dropout(net.linear(x), p=0.0, train=True),
        lambda net, x: torch.layer_norm(net.linear(x), (6,), cudnn_enable=False),
        lambda net, x: F.max_pool1d(net.linear(x), np.int64(2)),
        lambda net, x: F.conv1d(net.linear(x)[None], torch.ones(1, len(x), 2, requires_grad=True), None, np.int64(2)),
        lambda net, x: F.relu(input=net.linear(input=x)),
    ],
)
def test_calls_are_taken_as_pytorch_takes_them(function: Callable[[Net, Tensor], Tensor]) -> None:
    x = torch.randn(40, 6)
    torch.manual_seed(0)
    expected = Net(function)(x)
    out = blpa.convert(Net(function))(x)
    assert torch.equal(out, expected)
    out.sum().backward()


def test_a_sparse_input_is_taken() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, adjacency: Tensor) -> Any:
            return adjacency @ torch.relu(self.linear(x * 1))

    blpa.convert(Graph())(torch.randn(40, 6), torch.eye(40).to_sparse()).sum().backward()


def test_a_class_changed_after_converting_is_not_lost() -> None:
    model = blpa.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    nn.utils.parametrizations.weight_norm(model[0])
    classes = [type(module) for module in model.modules()]
    for call in (blpa.restore, blpa.convert):
        with pytest.raises(ValueError, match="became a ParametrizedConv2d after it was converted"):
            call(model)
        assert [type(module) for module in model.modules()] == classes
    model(IMAGES).sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_frozen_network_runs_as_pytorch_s_own() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    encoder.requires_grad_(False)
    x, padding = torch.randn(4, 10, 16), torch.arange(10).expand(4, 10) > 7
    expected = encoder(x, src_key_padding_mask=padding)
    assert torch.equal(blpa.convert(encoder)(x, src_key_padding_mask=padding), expected)
