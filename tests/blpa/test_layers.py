"""The layers stand in for PyTorch's own: same keys, same numbers, same running statistics."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.codec import Codec
from blpa.kernels.compiled import COMPILED
from blpa.layers import (
    Activation,
    BatchNormReLU,
    CodedLayers,
    Conv2d,
    Layers,
    ResidualSum,
    StockBatchNormReLU,
    StockConv2d,
    StockLayers,
)
from blpa.saved import MaxPool

BATCH_NORMS: dict[str, Callable[..., nn.BatchNorm2d]] = {
    "coded": lambda channels, **others: BatchNormReLU(channels, codec=Codec(4), **others),
    "one copy": lambda channels, **others: BatchNormReLU(channels, codec=None, **others),
    "stock": StockBatchNormReLU,
}
batch_norms = pytest.mark.parametrize("kind", BATCH_NORMS)
convolutions = pytest.mark.parametrize("layer", [Conv2d, StockConv2d])


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@batch_norms
def test_batch_norm_has_the_stock_state(kind: str) -> None:
    stock, ours = nn.BatchNorm2d(4), BATCH_NORMS[kind](4)
    assert list(ours.state_dict()) == list(stock.state_dict())
    nn.init.normal_(stock.weight)
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours.weight, stock.weight)


@convolutions
def test_convolution_has_the_stock_state(layer: type[nn.Conv2d]) -> None:
    stock, ours = nn.Conv2d(4, 2, 3, bias=False), layer(4, 2, 3, bias=False)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours.weight, stock.weight)


@batch_norms
@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_batch_norm_goes_through_training_and_evaluation_as_stock(kind: str, momentum: float | None) -> None:
    stock = nn.BatchNorm2d(4, eps=1e-3, momentum=momentum, dtype=torch.float64)
    ours = BATCH_NORMS[kind](4, eps=1e-3, momentum=momentum).double()
    for step in range(4):
        x = images(step) * (step + 1) + step
        torch.testing.assert_close(ours(x.clone()).value, F.relu(stock(x)), rtol=0, atol=1e-12)  # float64, values of 1
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    ours.eval(), stock.eval()
    torch.testing.assert_close(ours(images()).value, F.relu(stock(images())), rtol=0, atol=1e-12)
    assert ours.num_batches_tracked == 4


def test_a_tensor_is_no_activation() -> None:
    with pytest.raises(TypeError, match=r"^activation is a Tensor: must be what a BatchNormReLU returns; "):
        Conv2d(4, 2, 3)(images().float())


@convolutions
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}], ids=str)
def test_convolution_is_stock(layer: type[nn.Conv2d], options: dict[str, int]) -> None:
    conv = layer(4, 2, 3, bias=False, **options).double()
    bn_relu = BatchNormReLU(4, codec=Codec(4)).double()
    activation = bn_relu(images())
    expected = F.conv2d(activation.value, conv.weight, **options)
    assert torch.equal(conv(activation), expected)
    assert torch.equal(conv(Activation(activation.value, None)), expected)


@pytest.mark.parametrize("codec", [Codec(4), None], ids=str)
def test_one_process_synchronises_with_nobody(codec: Codec | None) -> None:
    results = []
    for sync in (False, True):
        torch.manual_seed(0)
        bn, conv = BatchNormReLU(4, codec=codec, sync=sync).double(), Conv2d(4, 2, 3).double()
        x = images().requires_grad_()
        for out in (conv.after(bn, x), conv.after(bn.eval(), x)):
            out.square().sum().backward()
        assert x.grad is not None
        results.append([out, x.grad, *(parameter.grad for parameter in bn.parameters()), *bn.buffers()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layers", [StockLayers(sync=True), CodedLayers(sync=True, codes_max_pool=True)])
def test_every_batch_norm_that_a_factory_makes_synchronises(layers: Layers) -> None:
    for make in (
        lambda factory: factory.batch_norm_relu(4), lambda factory: factory.last_batch_norm_relu(4),
        lambda factory: factory.batch_norm_relu_max_pool(4, MaxPool(2, 2, 0)),
    ):  # fmt: skip
        bn, own = make(layers).double(), make(replace(layers, sync=False)).double()
        assert bn.sync if isinstance(bn, BatchNormReLU) else isinstance(bn, nn.SyncBatchNorm)
        assert bn.state_dict().keys() == own.state_dict().keys()
        assert torch.equal(bn(images()).value, own(images()).value)


def test_stock_layers_keep_nothing_of_ours() -> None:
    assert StockBatchNormReLU(4).double()(images()).saved is None


def test_coded_layers_keep_codes_and_one_copy_keeps_x() -> None:
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_()
    coded, one_copy = (BATCH_NORMS[kind](4).double()(x).saved for kind in ("coded", "one copy"))
    assert coded.values.dtype == torch.uint8
    assert one_copy.values.data_ptr() == x.data_ptr()


def test_activation_takes_the_place_of_x_only_where_told() -> None:
    bn_relu = BatchNormReLU(4, codec=Codec(4)).double()
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert bn_relu(x).value.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    assert bn_relu(x, overwrite_x=True).value.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layers", ["coded", "one copy", "stock"])
def test_convolution_after_a_batch_norm_is_one_after_the_other(layers: str) -> None:
    bn = BATCH_NORMS[layers](4).double()
    conv = (StockConv2d if layers == "stock" else Conv2d)(4, 2, 3, bias=False, stride=2, padding=1).double()
    results = []
    for together in (True, False):
        bn.reset_running_stats()
        x = images().requires_grad_()
        out = conv.after(bn, x) if together else conv(bn(x))
        gradients = torch.autograd.grad(out.square().sum(), [x, bn.weight, bn.bias, conv.weight])
        results.append([out, bn.running_mean, bn.running_var, bn.num_batches_tracked, *gradients])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("kind", "on_conv"),
    [
        ("register_forward_hook", False),
        ("register_forward_hook", True),
        ("register_forward_pre_hook", False),
        ("register_forward_pre_hook", True),
        ("register_full_backward_hook", False),  # on a convolution it would not see the tensors inside an Activation
    ],
)
def test_hooks_on_the_layers_are_called(kind: str, on_conv: bool) -> None:
    bn, conv = BatchNormReLU(4, codec=Codec(4)).double(), Conv2d(4, 2, 3, bias=False).double()
    x = images().requires_grad_()
    expected = conv.after(bn, x)
    for after in (conv.after, lambda bn, x: conv.after_with_shortcut(bn, x)[0]):
        calls: list[nn.Module] = []
        handle = getattr(conv if on_conv else bn, kind)(lambda module, *others, calls=calls: calls.append(module))
        out = after(bn, x)
        out.sum().backward()
        handle.remove()
        assert torch.equal(out, expected)
        assert calls == [conv if on_conv else bn]


def test_global_hooks_are_called() -> None:
    bn, conv = BatchNormReLU(4, codec=Codec(4)).double(), Conv2d(4, 2, 3, bias=False).double()
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *others: calls.append(module))
    conv.after(bn, images())
    handle.remove()
    assert calls == [bn, conv]


class Doubled(Conv2d):
    """Its own forward."""

    def forward(self, activation: Activation) -> Tensor:
        return 2 * super().forward(activation)


def test_a_layer_with_its_own_forward_is_called() -> None:
    bn, doubled, patched = (
        BatchNormReLU(4, codec=Codec(4)).double(),
        Doubled(4, 2, 3).double(),
        Conv2d(4, 2, 3).double(),
    )
    patched.forward = lambda activation: activation.value[:, :1]
    for conv in (doubled, patched):
        assert torch.equal(conv.after(bn, images()), conv(bn(images())))


def test_text_of_a_layer_names_its_codec_and_backend() -> None:
    assert "codec=Codec(bits=4, clip=3.0), kernels=auto" in repr(BatchNormReLU(4, codec=Codec(4)))


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_convolution_that_ours_does_not_stand_for_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"bias = .*, padding = .* \(.*\): must be False, a number"):
        Conv2d(4, 2, 3, **options)


def test_a_residual_sum_is_made_by_whoever_reads_it_first_and_lets_its_shortcut_go() -> None:
    conv = Conv2d(4, 2, 1).double()
    readers: list[Callable[[nn.BatchNorm2d, ResidualSum], object]] = [
        lambda bn, total: bn(total),
        lambda bn, total: conv.after_with_shortcut(bn, total),
        lambda bn, total: total.value(),
    ]
    for read in readers:
        for bn in (BatchNormReLU(4, codec=Codec(4)).double(), StockBatchNormReLU(4).double()):
            x, shortcut = (images(seed).contiguous(memory_format=torch.channels_last) for seed in (0, 1))
            expected, alive = x + shortcut, weakref.ref(shortcut)
            total = conv.add_shortcut(x, shortcut)
            assert total.shape == x.shape
            del shortcut
            if isinstance(bn, BatchNormReLU) or read is not readers[0]:
                read(bn, total)
                assert alive() is None
            assert torch.equal(total.value(), expected)
            assert torch.equal(total.value(), expected)  # it is made once


def test_a_batch_norm_counts_from_zero_wherever_it_is_moved_to() -> None:
    def counter(bn: BatchNormReLU) -> Tensor | None:
        return bn._batch_norm(bn.weight.device, overwrite_x=False).counter

    bn = BatchNormReLU(4, codec=Codec(4))
    first = counter(bn)
    assert first is not None
    assert torch.equal(first, torch.zeros(4, dtype=torch.int32))
    assert counter(bn) is first
    bn.to("meta")
    assert counter(bn) is not first
    bn.to_empty(device="cpu").load_state_dict(BatchNormReLU(4, codec=Codec(4)).state_dict())
    again = counter(bn)
    assert again is not None
    assert not again.any()


# ---- of stock layers ------------------------------------------------------------------------------------------------


def test_defaults_are_the_stock_layers() -> None:
    stock, ours = nn.BatchNorm2d(4), BatchNormReLU(4)
    assert (ours.eps, ours.momentum, ours.codec) == (stock.eps, stock.momentum, Codec(4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_from_a_stock_batch_norm_it_is_the_same_one(training: bool, tracks: bool) -> None:
    stock = nn.BatchNorm2d(4, eps=0.1, momentum=0.3, track_running_stats=tracks, dtype=torch.float64).train(training)
    nn.init.normal_(stock.weight)
    stock.bias.requires_grad_(False)
    ours = BatchNormReLU.from_stock(stock, codec=None)
    assert type(ours) is BatchNormReLU
    assert (ours.eps, ours.momentum, ours.training, ours.codec) == (0.1, 0.3, training, None)
    shared = list(stock.named_parameters()) + list(stock.named_buffers())
    assert shared == list(ours.named_parameters()) + list(ours.named_buffers())
    assert not ours.bias.requires_grad
    twin = nn.BatchNorm2d(4, eps=0.1, momentum=0.3, track_running_stats=tracks, dtype=torch.float64).train(training)
    twin.load_state_dict(stock.state_dict())
    for step in range(2):
        expected = F.relu(twin(images(step)))
        torch.testing.assert_close(ours(images(step)).value, expected, rtol=0, atol=1e-12)  # float64, values of 1
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(stock.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_from_a_stock_batch_norm_takes_a_codec_and_a_backend() -> None:
    stock = nn.BatchNorm2d(4)
    assert BatchNormReLU.from_stock(stock).codec == Codec(4)
    ours = BatchNormReLU.from_stock(stock, codec=Codec(8), kernels=COMPILED)
    assert (ours.codec, ours.kernels) == (Codec(8), COMPILED)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}], ids=str)
def test_from_a_stock_convolution_it_is_the_same_one(options: dict[str, int]) -> None:
    stock = nn.Conv2d(4, 2, (3, 2), bias=False, dtype=torch.float64, **options).eval()
    state = torch.get_rng_state()
    ours = Conv2d.from_stock(stock)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is Conv2d
    assert list(ours.parameters()) == [stock.weight]
    assert not ours.training
    activation = BatchNormReLU(4).double()(images())
    assert torch.equal(ours(activation), stock(activation.value))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_layers_of_stock_layers_stay_on_their_device(device: str) -> None:
    bn, conv = nn.BatchNorm2d(4, device=device), nn.Conv2d(4, 2, 3, bias=False, device=device)
    out = Conv2d.from_stock(conv).after(BatchNormReLU.from_stock(bn), torch.empty(2, 4, 5, 5, device=device))
    assert out.device.type == device


def hooked() -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(4)
    bn.register_forward_hook(lambda *_: None)
    return bn


@pytest.mark.parametrize(
    ("bn", "message"),
    [
        (StockBatchNormReLU(4), r"^layer is a StockBatchNormReLU: must be a BatchNorm2d, and no subclass of it$"),
        (nn.BatchNorm1d(4), r"^layer is a BatchNorm1d: must be a BatchNorm2d, and no subclass of it$"),
        (hooked(), r"^BatchNorm2d has hooks or a forward of its own: remove them first$"),
    ],
)
def test_stock_batch_norm_that_ours_does_not_stand_for_is_refused(bn: nn.BatchNorm2d, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchNormReLU.from_stock(bn)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 2, 3), r"^bias = True, padding = \(0, 0\) \(zeros\): must be False, a number of zeros$"),
        (nn.Conv2d(4, 2, 3, bias=False, padding="same"), r"^bias = False, padding = 'same' \(zeros\): must be"),
        (nn.Conv2d(4, 2, 3, bias=False, padding=1, padding_mode="circular"), r"\(circular\): must be"),
        (StockConv2d(4, 2, 3), r"^layer is a StockConv2d: must be a Conv2d, and no subclass of it$"),
    ],
)
def test_stock_convolution_that_ours_does_not_stand_for_is_refused(conv: nn.Conv2d, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv2d.from_stock(conv)


# ---- factories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers", [StockLayers(eps=0.1), CodedLayers(eps=0.1)], ids=lambda layers: type(layers).__name__
)
def test_factories_make_layers_of_their_kind(layers: Layers) -> None:
    coded = isinstance(layers, CodedLayers)
    for bn in (layers.batch_norm_relu(8), layers.last_batch_norm_relu(8)):
        assert type(bn) is (BatchNormReLU if coded else StockBatchNormReLU)
        assert (bn.num_features, bn.eps, bn.momentum) == (8, 0.1, 0.1)
    conv = layers.conv2d(8, 4, 3, stride=2)
    assert type(conv) is (Conv2d if coded else StockConv2d)
    assert (conv.in_channels, conv.out_channels, conv.stride, conv.padding) == (8, 4, (2, 2), (1, 1))
    assert conv.bias is None


@pytest.mark.parametrize("codec", [Codec(8), Codec(2, clip=1.7), None], ids=str)
def test_last_batch_norm_saves_no_code(codec: Codec | None) -> None:
    """No convolution reads its activation: its code would be made only to be decoded at once."""
    layers = CodedLayers(codec=codec, kernels=COMPILED)
    assert layers.batch_norm_relu(8).codec == codec
    assert layers.last_batch_norm_relu(8).codec is None
    assert layers.batch_norm_relu(8).kernels is layers.last_batch_norm_relu(8).kernels is COMPILED


def test_last_batch_norm_of_the_naive_baseline_is_naive_too() -> None:
    last = CodedLayers(codec=Codec(8), forward_from_code=True).last_batch_norm_relu(8)
    assert last.codec == Codec(8)
    assert last.forward_from_code
