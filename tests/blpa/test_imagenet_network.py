"""The ImageNet network: its counts, its numbers against plain PyTorch, and its max pool."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa import ops
from blpa.codec import Codec
from blpa.kernels.compiled import COMPILED
from blpa.kernels.reference import REFERENCE
from blpa.layers import Activation, BatchNormReLU, CodedLayers, Conv2d, Layers, StockLayers
from blpa.memory import step_bytes
from blpa.models.preact_resnet import PreActResNet
from blpa.saved import MaxPool

MIB = 2**20
FULL_TENSOR_MIB = 56 * 56 * 256 * 4 / MIB
"""The largest full-precision tensor, per image: a sum of the first group, or the stem's output."""

ELEMENTS = 19_618_816
"""Elements per image of the 149 activations that are saved as codes; counted from the authors' network."""


def network(layers: Layers, depth: int = 26, **others: object) -> PreActResNet:
    values = {"classes": 10, "width": 0.25, **others}
    return PreActResNet(depth, layers=layers, architecture="imagenet", **values)  # type: ignore[arg-type]


def on_meta(layers: Layers, depth: int = 152) -> PreActResNet:
    with torch.device("meta"):
        model = network(layers, depth, classes=1000, width=1.0)
    return model.to(memory_format=torch.channels_last)


def coded(bits: int | None, **others: bool) -> CodedLayers:
    return CodedLayers(codec=None if bits is None else Codec(bits), eps=1e-3, kernels=COMPILED, **others)


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_parameters_of_the_authors_network() -> None:
    model = on_meta(StockLayers())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.weight.numel() for module in (*convolutions, model.classifier)) == 57_271_488
    assert sum(norm.num_features for norm in norms) == 71_872
    assert len(convolutions) + 1 == 152


@pytest.mark.parametrize(("depth", "blocks"), [(26, 8), (50, 16), (101, 33), (152, 50)])
def test_depth_counts_convolutions_and_the_classifier(depth: int, blocks: int) -> None:
    model = on_meta(StockLayers(), depth)
    assert len(model.blocks) == blocks
    assert model.blocks[-1].conv3.out_channels == 2048


def test_elements_of_the_activations() -> None:
    """149 BN-ReLU-convs; the first one's max pool and the last one, which no convolution reads, count apart."""
    model = on_meta(CodedLayers(codec=Codec(8), kernels=REFERENCE))
    elements: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormReLU):
            module.register_forward_hook(
                lambda _, __, activation, name=name: elements.update({name: activation.saved.layout.shape.numel()})
            )
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert elements.pop("blocks.0.bn1") == 802_816
    assert elements.pop("bn") == 100_352
    assert len(elements) == 149
    assert sum(elements.values()) == ELEMENTS


@pytest.mark.parametrize(("bits", "codes_max_pool", "mib"), [(4, False, 13.03), (8, False, 22.39), (4, True, 10.5)])
def test_bytes_of_a_step_at_224(bits: int, codes_max_pool: bool, mib: float) -> None:
    """Codes, a byte per output of the pool, and at full precision the last activation, and the first unless coded.

    The peak exceeds what is saved by at most three full-precision tensors: the block's sum, its gradient, and one of
    decoding; 5 % are for vectors, weight gradients and index tensors of the pool.
    """
    batch = 32
    images = torch.empty(batch, 3, 224, 224, device="meta").to(memory_format=torch.channels_last)
    counted = step_bytes(on_meta(coded(bits, codes_max_pool=codes_max_pool)), images, images.new_empty(batch).long())
    places, first, last = 56 * 56 * 64, 802_816, 100_352
    saved = ELEMENTS * bits / 8 + places + first * (bits / 8 if codes_max_pool else 4) + last * 4
    vectors, loss, head = 71_872 * 36, 2 * 4, 4 * batch * (2048 + 1000)  # the head's input, and softmax
    assert counted.forward_bytes == saved * batch + vectors + loss + head
    assert saved / MIB <= mib
    of_weights = 4 * 57_416_232
    assert counted.peak_bytes <= 1.05 * batch * (saved + 3 * FULL_TENSOR_MIB * MIB) + of_weights


# ---- numbers --------------------------------------------------------------------------------------------------------


def functional(state: dict[str, Tensor], x: Tensor, blocks_of_groups: tuple[int, ...]) -> Tensor:
    """The network in training, in nothing but torch.nn.functional."""

    def bn_relu(x: Tensor, name: str) -> Tensor:
        vectors = (state[f"{name}.{key}"].clone() for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *vectors, training=True, eps=1e-3))

    x = F.conv2d(x, state["stem.weight"], stride=2, padding=3)
    firsts = [sum(blocks_of_groups[:group]) for group in range(1, len(blocks_of_groups))]
    for k in range(sum(blocks_of_groups)):
        stride = 2 if k in firsts else 1
        a = bn_relu(x, f"blocks.{k}.bn1")
        if k == 0:
            a = x = F.max_pool2d(a, 3, 2, 1)
        out = F.conv2d(a, state[f"blocks.{k}.conv1.weight"], stride=stride)
        out = F.conv2d(bn_relu(out, f"blocks.{k}.bn2"), state[f"blocks.{k}.conv2.weight"], padding=1)
        out = F.conv2d(bn_relu(out, f"blocks.{k}.bn3"), state[f"blocks.{k}.conv3.weight"])
        shortcut = F.avg_pool2d(x, stride)
        missing = out.shape[1] - shortcut.shape[1]
        x = out + F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing // 2))
    return F.linear(bn_relu(x, "bn").mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def logits_and_gradients(layers: Layers) -> tuple[Tensor, list[Tensor]]:
    """Of one network of random gammas and betas in float64."""
    torch.manual_seed(0)
    model = network(layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
    model.double()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model(images)
    expected = functional(model.state_dict(), images, (2, 2, 2, 2))
    # Float64 through 26 layers, each losing a few units of 1e-16.
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits, torch.arange(3)).backward()
    return logits, [cast(Tensor, parameter.grad) for parameter in model.parameters()]


def test_logits_and_gradients_are_those_of_plain_pytorch() -> None:
    stock_logits, stock = logits_and_gradients(StockLayers(eps=1e-3))
    logits, gradients = logits_and_gradients(CodedLayers(codec=None, kernels=REFERENCE, eps=1e-3))
    torch.testing.assert_close(logits, stock_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, stock, rtol=1e-8, atol=1e-10)
    for codes_max_pool in (False, True):
        layers = CodedLayers(codec=Codec(8), kernels=REFERENCE, eps=1e-3, codes_max_pool=codes_max_pool)
        same_logits, approximate = logits_and_gradients(layers)
        assert torch.equal(same_logits, logits)
        error = torch.cat([(a - b).flatten() for a, b in zip(approximate, stock, strict=True)]).norm()
        # At 8 bits a bin is 6 / 256 wide: an error of about 0.7 % of each weight gradient, and of what it adds to dX.
        assert 0 < error < 0.05 * torch.cat([gradient.flatten() for gradient in stock]).norm()


# ---- the max pool ---------------------------------------------------------------------------------------------------

POOLS = [MaxPool(3, 2, 1), MaxPool(2, 2, 0), MaxPool(3, 1, 1), MaxPool(3, 3, 1)]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 4)], ids=str)
def test_a_max_pool_is_pytorchs(pool: MaxPool, size: tuple[int, int]) -> None:
    x = torch.randint(-3, 4, (2, 5, *size)).double().contiguous(memory_format=torch.channels_last)  # many equal values
    leaf = x.clone().requires_grad_()
    expected = F.max_pool2d(leaf, *pool)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out, places = pool(x)
    assert torch.equal(out, expected)
    assert torch.equal(pool.values(x, places), expected)
    dx = pool.input_grad(grad, places, x.shape)
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-15, atol=1e-15)  # the same numbers, added in another order
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("codec", [Codec(8), Codec(4), Codec(2), None], ids=str)
def test_a_pooled_activation_has_the_gradient_of_its_decoded_values(codec: Codec | None) -> None:
    """DW is that of the pooled decoded activation; dX that of the same layers, pooled by PyTorch."""
    torch.manual_seed(0)
    pool = MaxPool(3, 2, 1)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.randn(2, 6, dtype=torch.float64)
    weight = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    bn = ops.BatchNorm(codec, kernels=REFERENCE)

    def gradients(pooled: bool) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        a, saved = ops.batch_norm_relu(
            leaf, gamma.requires_grad_(), beta.requires_grad_(), bn, max_pool=pool if pooled else None
        )
        assert saved is not None
        if pooled:
            out = ops.conv2d(a, saved, weight)
            decoded = saved.decode(torch.float64)
        else:
            out = F.conv2d(F.max_pool2d(a, *pool), weight)
            decoded = F.max_pool2d(a, *pool)
        dx, dgamma, dbeta, dw = torch.autograd.grad(out, (leaf, gamma, beta, weight), grad)
        if pooled:  # the closed form, on the decoded activation
            torch.testing.assert_close(
                dw[..., 0, 0], torch.einsum("nohw,nchw->oc", grad, decoded), rtol=1e-12, atol=1e-12
            )
        return dx, dgamma, dbeta

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-12, atol=1e-12)


def test_a_pooled_layer_saves_a_byte_per_output_besides_the_codes() -> None:
    layer = CodedLayers(codec=Codec(4), codes_max_pool=True).batch_norm_relu_max_pool(8, MaxPool(3, 2, 1))
    activation = layer(torch.randn(2, 8, 16, 16))
    assert activation.saved is not None
    assert activation.value.shape == activation.saved.shape == (2, 8, 8, 8)
    assert activation.saved.nbytes == 2 * 8 * 16 * 16 // 2 + 2 * 8 * 8 * 8 + 9 * 4 * 8
    assert "max_pool=MaxPool(kernel_size=3" in repr(layer)


def test_a_pooled_layer_is_never_fused_with_a_convolution() -> None:
    """conv.after would give the convolution an activation that is not pooled."""
    layer = CodedLayers().batch_norm_relu_max_pool(8, MaxPool(2, 2, 0))
    conv = Conv2d(8, 4, 1)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(conv.after(layer, x), conv(cast(Activation, layer(x))))


@pytest.mark.parametrize("depth", [11, 25, 164])
def test_depth_without_a_network_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^depth = {depth}: must be one of 26, 50, 101, 152$"):
        network(StockLayers(), depth)


def test_an_architecture_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^architecture = 'imgnet': must be one of cifar, imagenet$"):
        PreActResNet(50, layers=StockLayers(), classes=10, architecture="imgnet")


@pytest.mark.parametrize(
    ("pool", "size"), [(MaxPool(3, 2, 1), (5, 2)), (MaxPool(3, 2, 1), (1, 5)), (MaxPool(17, 1, 8), (20, 20))], ids=str
)
def test_a_window_that_is_too_large_is_refused(pool: MaxPool, size: tuple[int, int]) -> None:
    """A byte names a place among 16 x 16, and rows narrower than a window would give two places one name."""
    with pytest.raises(ValueError, match=rf"^kernel_size = {pool.kernel_size}: must be at most 16, and the height"):
        pool(torch.zeros(1, 1, *size))
