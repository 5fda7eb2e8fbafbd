"""The functions for activations of any layout: codes, their errors, and independence of the parts they work in."""

import pytest
import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.coded.tensors import Coded
from blpa.kernels import any_layout
from blpa.kernels.order import Order

CODECS = [Codec(8, "range"), Codec(4, "range"), Codec(2, "range"), Codec(8, 3.9), Codec(4), Codec(2, 1.7)]
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "images": ((4, 6, 5, 7), 1),
    "one image": ((1, 6, 9, 9), 1),
    "three images": ((3, 6, 7, 7), 1),
    "tokens": ((3, 11, 6), -1),
    "sequences": ((5, 6, 13), 1),
    "volumes": ((2, 6, 3, 4, 5), 1),
    "matrix": ((37, 6), -1),
}


def activation(shape: tuple[int, ...], channel: int, *, rectified: bool = False) -> Tensor:
    """Channels of different means and deviations, one of them constant."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    channels = shape[channel]
    view = [1] * len(shape)
    view[channel] = channels
    scale = torch.logspace(-3, 3, channels).view(view)
    scale.view(-1)[2] = 0
    x = x * scale + torch.linspace(-4, 4, channels).view(view) * scale + 0.1
    return x.relu() if rectified else x


def vectors(coded: Coded) -> any_layout.Vectors:
    return any_layout.Vectors(*coded.vectors)


def along_channels(x: Tensor, channel: int) -> Tensor:
    return x.movedim(channel, -1)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_code_is_within_its_bin_and_keeps_the_sign(name: str, codec: Codec, rectified: bool) -> None:
    shape, channel = SHAPES[name]
    x = activation(shape, channel, rectified=rectified)
    coded = Coded.of(x, channel, codec)
    value = coded.value()
    assert (value.shape, value.dtype, value.stride()) == (x.shape, x.dtype, x.stride())
    assert torch.equal(value > 0, x > 0)
    flat, decoded = along_channels(x, channel).flatten(0, -2), along_channels(value, channel).flatten(0, -2)
    width = vectors(coded).width.abs()
    inside = torch.ones_like(flat, dtype=torch.bool)
    if codec.clip != "range":
        reach = codec.levels / 2 - 1.5  # bins on either side of the mean, less the shift of the grid and the last bin
        mean = vectors(coded).mean
        inside = torch.where(
            vectors(coded).floor == 0, flat <= width * (codec.levels - 1), (flat - mean).abs() < width * reach
        )
    # Half a bin, and the rounding of a large value in fp32.
    bound = 0.5 * width + 1e-6 * flat.abs().amax(0)
    assert ((decoded - flat).abs() <= bound)[inside].all()


@pytest.mark.parametrize("codec", [*CODECS, None])
@pytest.mark.parametrize("name", SHAPES)
def test_parts_of_any_size_give_the_same_codes(name: str, codec: Codec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, channel = SHAPES[name]
    x = activation(shape, channel)
    order, bits = Order.of(shape, channel, False), codec.bits if codec else 0
    vectors = any_layout.grid_vectors(any_layout.channel_stats(x, order), None, None, None, None, codec)

    def run() -> tuple[Tensor, Tensor]:
        values, out = any_layout.encode(x, x, vectors, order, bits, None, None), torch.empty_like(x)
        any_layout.decode(values, vectors, order, bits, None, out)
        return values, out

    values, out = run()
    monkeypatch.setattr(any_layout, "PART_BYTES", {"cpu": 1, "cuda": 1})
    assert len(list(any_layout.parts(order.rows(x, bits), codec))) > 1
    assert all(map(torch.equal, run(), (values, out)))
    for one, other in zip(any_layout.channel_stats(x, order), any_layout.channel_stats(x.double(), order), strict=True):
        # fp32 sums of a hundred terms, of deviations up to five times smaller than the mean
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_take_the_fewest_bytes_that_a_split_of_rows_allows(bits: int) -> None:
    codec = Codec(bits)
    for shape, expected in (((4, 6, 5, 7), 4), ((1, 6, 8, 8), 64), ((3, 6, 8, 8), 64), ((2, 6, 7, 7), None)):
        coded = Coded.of(torch.randn(shape), 1, codec)
        if expected is not None:
            assert coded.values.numel() == torch.Size(shape).numel() * bits // 8
        assert coded.values.numel() < 1.1 * torch.Size(shape).numel() * bits / 8 + 6


def test_vectors_of_a_normalised_tensor_are_those_of_its_values() -> None:
    x = activation((4, 6, 5, 7), 1).double()
    order = Order.of(x.shape, 1, False)
    stats = any_layout.channel_stats(x, order)
    centre, scale = stats[0] + 1, 1 / (stats[1] + 1e-3).sqrt()
    gamma, beta = torch.linspace(-2, 2, 6).double(), torch.linspace(1, -1, 6).double()
    of_z = any_layout.channel_stats(x, order, centre.unsqueeze(0), scale.unsqueeze(0))
    for codec in CODECS:
        found = any_layout.grid_vectors(stats, gamma, beta, centre, scale, codec)
        expected = any_layout.grid_vectors(of_z, gamma, beta, None, None, codec)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extreme", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("codec", CODECS)
def test_a_channel_with_a_value_of_no_size_leaves_the_others_alone(codec: Codec, extreme: float) -> None:
    x = activation((4, 6, 5, 7), 1)
    sound = Coded.of(x, 1, codec).value()
    x[0, 3, 0, 0] = extreme
    value = Coded.of(x, 1, codec).value()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(value[:, others], sound[:, others])


def test_every_elementwise_function_has_pytorch_s_gradient() -> None:
    y = torch.linspace(-4, 8, 1001, dtype=torch.float64, requires_grad=True)
    for function in (
        any_layout.Elementwise("relu"), any_layout.Elementwise("leaky_relu", (0.2,)), any_layout.Elementwise("silu"),
        any_layout.Elementwise("gelu"), any_layout.Elementwise("gelu_tanh"),
        any_layout.Elementwise("hardswish"),
    ):  # fmt: skip
        (expected,) = torch.autograd.grad(function(y).sum(), y)
        torch.testing.assert_close(function.grad(torch.ones_like(y), y.detach()), expected, rtol=1e-12, atol=1e-12)
