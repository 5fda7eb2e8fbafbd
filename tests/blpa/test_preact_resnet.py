"""The CIFAR network: its shape, its numbers in every mode against stock PyTorch, and its initial weights."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import gradients, images, prepared
from torch import Tensor, nn

from blpa.kernels.compiled import COMPILED
from blpa.layers import Activation, CodedLayers, StockLayers
from blpa.models.preact_resnet import Bottleneck, PreActResNet
from runners.config import options

MODES = options("mode")
FULL_WIDTH = [name for name in MODES if name != "fewer-features"]
RUN = [name for name in FULL_WIDTH if not name.startswith("compiled-")]  # one compiled mode runs here: they take long
EXACT_FORWARD = [name for name in RUN if name != "naive-8bit"]
CODED = ["8bit", "4bit", "2bit", "exact-one-copy"]

Build = Callable[..., PreActResNet]
Network = Callable[..., PreActResNet]


@pytest.fixture
def network(build: Build) -> Network:
    """How to get a mode's small network in float64, of two blocks a group; compiled ones take seconds each: of one."""
    return lambda name: prepared(build(name, 11 if name == "compiled" else 20, width=0.5))


def parameter_count(depth: int, classes: int) -> int:
    """Counted from the paper, section 4."""
    count, channels_in = 3 * 3 * 3 * 16, 16
    for c in (16, 32, 64):
        for _ in range((depth - 2) // 9):
            count += channels_in * c + 9 * c * c + c * 4 * c + 2 * (channels_in + c + c)
            channels_in = 4 * c
    return count + 2 * channels_in + (channels_in + 1) * classes


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("depth", [164, 254])
def test_parameter_count(depth: int, classes: int) -> None:
    with torch.device("meta"):
        model = PreActResNet(depth, layers=StockLayers(), classes=classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(depth, classes)


def test_quantised_elements_per_sample(build: Build) -> None:
    """The paper, section 4, at depth 164. At 8 bits an element is a byte; besides, an activation has nine vectors."""
    saved_bytes = []

    def count(bn_relu: nn.BatchNorm2d, _: object, activation: Activation) -> None:
        saved_bytes.append(activation.saved.nbytes - 9 * 4 * bn_relu.num_features)

    with torch.device("meta"):
        model = build("8bit", 164, kernels=COMPILED)
        for block in model.blocks:
            for bn_relu in (block.bn1, block.bn2, block.bn3):
                bn_relu.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
    assert sum(saved_bytes) == 3_096_576
    assert len(saved_bytes) == 162


@pytest.mark.parametrize("name", [*RUN, "fewer-features"])
def test_every_mode_trains_every_parameter(name: str, network: Network) -> None:
    """The stem's convolution too (departure 4: the authors' backward loop never reaches it)."""
    model = network(name)
    assert model(images()).shape == (4, 10)
    assert all(gradient.isfinite().all() and gradient.count_nonzero() for gradient in gradients(model))


@pytest.mark.parametrize("source", FULL_WIDTH)
def test_weights_of_every_mode_load_into_every_other(source: str, build: Build) -> None:
    state = build(source, 20, width=0.5).state_dict()
    for target in FULL_WIDTH:
        build(target, 20, width=0.5).load_state_dict(state, strict=True)


def functional(state: dict[str, Tensor], x: Tensor, blocks_per_group: int) -> Tensor:
    """The network in training, in nothing but torch.nn.functional and the paper's words."""

    def bn_relu(x: Tensor, name: str) -> Tensor:
        vectors = (state[f"{name}.{key}"].clone() for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *vectors, training=True, eps=1e-3))

    x = F.conv2d(x, state["stem.weight"], padding=1)
    for k in range(3 * blocks_per_group):
        stride = 2 if k in (blocks_per_group, 2 * blocks_per_group) else 1
        a = bn_relu(x, f"blocks.{k}.bn1")
        shortcut = F.avg_pool2d(a if k == 0 else x, stride)
        out = F.conv2d(a, state[f"blocks.{k}.conv1.weight"], stride=stride)
        out = F.conv2d(bn_relu(out, f"blocks.{k}.bn2"), state[f"blocks.{k}.conv2.weight"], padding=1)
        out = F.conv2d(bn_relu(out, f"blocks.{k}.bn3"), state[f"blocks.{k}.conv3.weight"])
        missing = out.shape[1] - shortcut.shape[1]
        x = out + F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing // 2))
    return F.linear(bn_relu(x, "bn").mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("name", EXACT_FORWARD)
def test_logits_are_those_of_plain_pytorch(name: str, network: Network) -> None:
    model = network(name)
    expected = functional(model.state_dict(), images(), blocks_per_group=len(model.blocks) // 3)
    # 20 layers in float64, each losing a few units of 1e-16.
    torch.testing.assert_close(model(images()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_coded_logits_are_equal_to_the_bit(training: bool, network: Network) -> None:
    expected, *others = (network(name).float().train(training)(images().float()) for name in CODED)
    assert all(torch.equal(logits, expected) for logits in others)


def test_naive_logits_are_not_exact(network: Network) -> None:
    naive, exact = (network(name)(images()) for name in ("naive-8bit", "exact"))
    assert not torch.allclose(naive, exact, rtol=1e-4)


def test_gradients_of_one_copy_are_those_of_stock_layers(network: Network) -> None:
    ours, stock = (gradients(network(name)) for name in ("exact-one-copy", "exact"))
    # Both float64 through 20 layers; gradients of size 1 and less.
    torch.testing.assert_close(ours, stock, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", RUN)
def test_evaluation_uses_the_running_averages(name: str, network: Network) -> None:
    """Departure 5: the authors' code normalises by the statistics of the test batch."""
    model = network(name)
    model(images())
    model.eval()
    beside_others = torch.cat([images()[:1], -images()[1:]])  # of the same size, for another is compiled anew
    with torch.no_grad():
        torch.testing.assert_close(model(images())[:1], model(beside_others)[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RUN)
def test_zero_initialised_gamma_is_trained(name: str, network: Network) -> None:
    model = network(name)
    zeroed = [block.bn3 for block in model.blocks]
    for bn_relu in zeroed:
        nn.init.zeros_(bn_relu.weight)
        nn.init.ones_(bn_relu.bias)
    gradients(model)
    assert all(bn_relu.weight.grad.count_nonzero() == bn_relu.num_features for bn_relu in zeroed)


@pytest.mark.parametrize(
    ("width", "channels"), [(4, [64, 256, 512, 1024]), (1, [16, 64, 128, 256]), (0.25, [4, 16, 32, 64])]
)
def test_width_is_a_factor_on_every_channel_count(width: float, channels: list[int]) -> None:
    with torch.device("meta"):
        model = PreActResNet(11, layers=StockLayers(), classes=10, width=width)
    assert [block.bn1.num_features for block in model.blocks] + [model.bn.num_features] == channels


def test_fewer_features_is_a_quarter_of_the_width(build: Build) -> None:
    with torch.device("meta"):
        narrow = build("fewer-features", 11)
        quarter = PreActResNet(11, layers=StockLayers(), classes=10, width=0.25)
    assert [p.shape for p in narrow.parameters()] == [p.shape for p in quarter.parameters()]


def test_initial_weights() -> None:
    """Convolutions N(0, 2 / (k k C_in)), classifier N(0, 1 / C_in), gamma 1, biases 0."""
    torch.manual_seed(0)
    model = PreActResNet(29, layers=StockLayers(), classes=100)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            expected = math.sqrt((2 if isinstance(module, nn.Conv2d) else 1) / module.weight[0].numel())
            # The deviation of n normal numbers has a relative error of 1 / sqrt(2 n): five of those.
            error = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=error)
    assert (model.classifier.bias == 0).all()


@pytest.mark.parametrize("depth", [-7, 0, 2, 3, 10, 12, 111, 1000])
def test_depth_that_is_not_nine_n_plus_two_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth = {depth}: must be 9 n \+ 2"):
        PreActResNet(depth, layers=StockLayers(), classes=10)


def test_width_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width = 0.03: 16 channels times that is less than one"):
        PreActResNet(11, layers=StockLayers(), classes=10, width=0.03)


@pytest.mark.parametrize("size", [(8, 6), (7, 8)], ids=str)
def test_image_size_that_is_no_multiple_of_four_is_refused(size: tuple[int, int]) -> None:
    model = PreActResNet(11, layers=StockLayers(), classes=10, width=0.25)
    with pytest.raises(ValueError, match=r"height and width must be multiples of 2"):
        model(torch.zeros(2, 3, *size))


def test_block_leaves_its_input_alone() -> None:
    block = Bottleneck(8, 2, 1, CodedLayers()).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)
