"""The two gradients of a convolution, each by itself, against PyTorch's of both."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from blpa.convolution import Convolution, as_computed


@pytest.mark.parametrize("size", [(7, 7), (8, 9)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2},
        {"stride": (3, 2), "padding": 1},
        {"padding": (2, 0)},
        {"padding": (3, 4)},
        {"dilation": (2, 3)},
        {"stride": (2, 3), "padding": (2, 1), "dilation": (3, 2)},
        {"groups": 2},
        {"groups": 4, "stride": (2, 2), "padding": (1, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)], ids=str)
def test_every_geometry(geometry: dict[str, Any], kernel: tuple[int, int], size: tuple[int, int]) -> None:
    """To 1e-10: sums of a few hundred products of size up to 100, of which float64 rounds each by 1e-14."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, 4 // geometry.get("groups", 1), *kernel, generator=generator, dtype=torch.float64)
    convolution = Convolution(**geometry)
    expected = F.conv2d(a, weight.requires_grad_(), **geometry)
    assert torch.equal(convolution(a, weight), expected)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        gradients = [convolution.input_grad(grad, weight, a.shape), convolution.weight_grad(grad, a, weight)]
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, [a, weight], grad)), rtol=0, atol=1e-10)


def test_a_weight_is_cast_to_what_autocast_computes_in() -> None:
    weight = torch.ones(2, 2, 1, 1)
    assert as_computed(weight) is weight
    with torch.autocast("cpu", torch.bfloat16):
        assert as_computed(weight).dtype == torch.bfloat16 == Convolution()(torch.ones(1, 2, 3, 3), weight).dtype
        assert as_computed(weight.double()).dtype == torch.float64


def test_input_gradient_counts_as_much_on_the_meta_device() -> None:
    convolution, last = Convolution(stride=2, padding=1), torch.channels_last
    for device in ("cpu", "meta"):
        grad = torch.empty(2, 8, 4, 4, device=device).to(memory_format=last)
        weight = torch.empty(8, 4, 3, 3, device=device).to(memory_format=last)
        da = convolution.input_grad(grad, weight, torch.Size((2, 4, 8, 8)))
        assert da.shape == (2, 4, 8, 8)
        assert da.is_contiguous(memory_format=last)
