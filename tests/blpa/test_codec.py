"""The codec: the rounding error of x_hat, the sign of y, which is always preserved, and packing."""

import math

import pytest
import torch
from torch import Tensor

from blpa.codec import ALLOWED_BITS, Codec

all_bits = pytest.mark.parametrize("bits", ALLOWED_BITS)
both_signs = pytest.mark.parametrize("sign", [1.0, -1.0])


def quantise(codec: Codec, x_hat: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat~ and relu_mask of x_hat [M, C] after encoding, packing, unpacking and decoding."""
    grid = codec.grid(gamma, beta)
    codes = unpack(codec, pack(codec, codec.encode(x_hat, gamma * x_hat + beta, grid)), len(x_hat), x_hat.dtype)
    decoded, sign = codec.decode(codes, grid)
    return decoded, sign > 0


def pack(codec: Codec, codes: Tensor) -> Tensor:
    packed = torch.empty(codec.packed_rows(len(codes)), codes.shape[1], dtype=torch.uint8)
    codec.pack(codec.row_blocks(codes.clone()), packed)
    return packed


def unpack(codec: Codec, packed: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    blocks = codec.row_blocks(torch.empty(rows, 0))
    return torch.cat([codec.unpack(packed, k, len(block), dtype) for k, block in enumerate(blocks)])


def edge_inside_the_range(codec: Codec, sign: float, *, edges: int = 41) -> tuple[Tensor, Tensor]:
    """Gamma and beta of channels whose y changes sign at least a bin inside the range: there `zero` is not clamped."""
    reach = codec.levels / 2 - 1
    gamma = sign * torch.logspace(-3, 3, edges, dtype=torch.float64)
    return gamma, torch.linspace(-reach, reach, edges, dtype=torch.float64) * codec.bin_width * gamma.abs()


def normal(count: int) -> Tensor:
    """The standard normal distribution as its `count` quantiles [count, 1]: no sampling error."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return math.sqrt(2) * torch.erfinv(2 * levels - 1).unsqueeze(1)


@all_bits
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65])
@pytest.mark.parametrize("channels", [1, 3, 257])
def test_every_code_survives_packing(bits: int, rows: int, channels: int) -> None:
    codec = Codec(bits)
    row, channel = torch.arange(rows).unsqueeze(1), torch.arange(channels)
    codes = ((row + channel) % codec.levels).float()  # every value in every row of 257 channels
    packed = pack(codec, codes)
    assert packed.shape == (math.ceil(rows * bits / 8), channels)
    assert torch.equal(unpack(codec, packed, rows, codes.dtype), codes)


@all_bits
@both_signs
def test_error_is_at_most_half_a_bin_inside_the_range(bits: int, sign: float) -> None:
    codec = Codec(bits)
    gamma, beta = edge_inside_the_range(codec, sign)
    inside = codec.clip - codec.bin_width / 2  # the grid is shifted by at most half a bin
    x_hat = torch.linspace(-inside, inside, 4001, dtype=torch.float64).unsqueeze(1).repeat(1, len(gamma))
    decoded, _ = quantise(codec, x_hat, gamma, beta)
    # x_hat / d + frac is at most 128 and rounds by 128 eps; times d, and a few more roundings of that size.
    assert (decoded - x_hat).abs().max() <= codec.bin_width / 2 + 1e-13


@all_bits
@both_signs
@pytest.mark.parametrize("ratio", [-1e6, -20.0, -3.0, 3.0, 20.0, 1e6])
def test_sign_change_out_of_the_range_costs_one_more_bin_at_most(bits: int, sign: float, ratio: float) -> None:
    codec = Codec(bits)
    inside = codec.clip - codec.bin_width / 2
    x_hat = torch.linspace(-inside, inside, 4001, dtype=torch.float64).unsqueeze(1)
    gamma = torch.tensor([sign], dtype=torch.float64)
    decoded, _ = quantise(codec, x_hat, gamma, ratio * gamma.abs())
    # One code is reserved for the sign that no value inside has, so an outermost bin merges with its neighbour.
    assert (decoded - x_hat).abs().max() <= 1.5 * codec.bin_width + 1e-13


@all_bits
@both_signs
def test_values_out_of_the_range_saturate(bits: int, sign: float) -> None:
    codec = Codec(bits)
    gamma, beta = edge_inside_the_range(codec, sign)
    end = codec.clip + codec.bin_width / 2  # out of the range of any shift of the grid
    x_hat = torch.tensor([-1e4, -end, end, 1e4], dtype=torch.float64).unsqueeze(1).repeat(1, len(gamma))
    decoded, _ = quantise(codec, x_hat, gamma, beta)
    outermost = x_hat.sign() * (codec.levels - 1) / 2 - codec.grid(gamma, beta).frac * sign
    torch.testing.assert_close(decoded, outermost * codec.bin_width, rtol=1e-14, atol=0)


MAGNITUDES = [0.0, 1e-45, 1e-38, 1e-6, 1e-3, 0.37, 1.0, 3.0, 1e6, 1e38]
"""In float32 1e-45 and 1e-38 are subnormal; the ratios run from 0 over every size to infinity, by overflow or by 0."""


@all_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_mask_is_the_sign_of_y_at_and_next_to_every_edge(bits: int, dtype: torch.dtype) -> None:
    codec = Codec(bits)
    signed = torch.tensor([sign * size for size in MAGNITUDES for sign in (1, -1)], dtype=dtype)
    gamma, beta = torch.cartesian_prod(signed, signed).T
    grid = codec.grid(gamma, beta)
    edges = (torch.arange(codec.levels + 1).unsqueeze(1) - codec.levels // 2 - grid.frac) * grid.bin_width
    sign_change = (-beta / gamma).nan_to_num(0.0).clamp(-1e4, 1e4)
    at = torch.cat([edges, sign_change.unsqueeze(0)])
    up, down = torch.tensor(torch.inf, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)
    x_hat = torch.cat([at, at.nextafter(up), at.nextafter(down)])
    _, relu_mask = quantise(codec, x_hat, gamma, beta)
    assert torch.equal(relu_mask, gamma * x_hat + beta > 0)


@all_bits
@both_signs
def test_relu_mask_is_the_sign_of_y_for_ratios_up_to_a_million(bits: int, sign: float) -> None:
    codec = Codec(bits)
    generator = torch.Generator().manual_seed(bits)
    sizes = 10 ** torch.empty(4000).uniform_(-6, 6, generator=generator)
    ratio = torch.cat([sizes, -sizes])
    gamma = sign * 10 ** torch.empty(8000).uniform_(-3, 3, generator=generator)
    x_hat = torch.randn(100, 8000, generator=generator)
    x_hat[::2] = (-ratio * sign).clamp(-10, 10) + 1e-6 * x_hat[::2]  # half of them close to the sign change
    beta = ratio * gamma.abs()
    _, relu_mask = quantise(codec, x_hat, gamma, beta)
    assert torch.equal(relu_mask, gamma * x_hat + beta > 0)


@all_bits
@pytest.mark.parametrize("y", [-1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0])
def test_relu_mask_is_the_sign_of_y_whatever_x_hat(bits: int, y: float) -> None:
    codec = Codec(bits)
    grid = codec.grid(torch.ones(7), torch.linspace(-4, 4, 7))
    x_hat = torch.linspace(-100, 100, 999).unsqueeze(1).repeat(1, 7)
    _, sign = codec.decode(codec.encode(x_hat, torch.full_like(x_hat, y), grid), grid)
    assert torch.equal(sign > 0, torch.full_like(sign > 0, y > 0))


@all_bits
@pytest.mark.parametrize("ratio", [-2.7, -2.99, -5.0])
def test_rare_positives_keep_their_gradient(bits: int, ratio: float) -> None:
    """Departure 1: the authors' code masks every one of them below -2.625 (4 bits) or overflows (8 bits)."""
    x_hat = torch.tensor([[-ratio - 0.01], [-ratio + 0.01]])
    _, relu_mask = quantise(Codec(bits), x_hat, torch.ones(1), torch.tensor([ratio]))
    assert relu_mask.tolist() == [[False], [True]]


@both_signs
@pytest.mark.parametrize(("bits", "bound"), [(4, 0.12), (8, 0.0225)])
def test_grid_stays_over_the_data(bits: int, bound: float, sign: float) -> None:
    """Departure 2: theirs moves with beta / gamma; its rms error at 4 bits is 0.19 at a ratio of 4, and grows."""
    ratio = torch.linspace(-10, 10, 201, dtype=torch.float64)
    gamma = torch.full_like(ratio, sign)
    x_hat = normal(10_001).repeat(1, len(ratio))
    decoded, _ = quantise(Codec(bits), x_hat, gamma, ratio)
    assert (decoded - x_hat).square().mean(0).sqrt().max() <= bound


@all_bits
@both_signs
def test_an_edge_lies_at_the_sign_change(bits: int, sign: float) -> None:
    codec = Codec(bits)
    gamma, beta = edge_inside_the_range(codec, sign)
    grid = codec.grid(gamma, beta)
    edge = (grid.zero - codec.levels // 2 - grid.frac) * grid.bin_width
    torch.testing.assert_close(gamma * edge, -beta, rtol=1e-14, atol=0)  # a handful of roundings, and nothing cancels


@all_bits
@both_signs
def test_grid_is_shifted_by_half_a_bin_at_most(bits: int, sign: float) -> None:
    """Departure 6: rounding down, as theirs, would shift it by up to a whole bin."""
    ratio = torch.linspace(-10, 10, 9999, dtype=torch.float64)
    frac = Codec(bits).grid(torch.full_like(ratio, sign), ratio).frac
    assert 0.49 < frac.abs().max() <= 0.5


@pytest.mark.parametrize("bits", [-4, 0, 1, 3, 5, 16, 32])
def test_bits_without_a_code_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits = {bits}: must be 8, 4 or 2"):
        Codec(bits)


@pytest.mark.parametrize("clip", [-1.0, 0.0, math.inf, math.nan])
def test_clip_that_is_no_width_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=rf"clip = {clip}: must be a positive number"):
        Codec(4, clip)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_a_gamma_of_minus_zero_is_one_of_zero(bits: int) -> None:
    codec, beta = Codec(bits), torch.tensor([1.0, -1.0, 0.0])
    for minus, plus in zip(codec.grid(torch.full((3,), -0.0), beta), codec.grid(torch.zeros(3), beta), strict=True):
        assert torch.equal(minus, plus)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_a_nan_leaves_the_other_codes_of_its_byte_alone(bits: int) -> None:
    codec, x_hat = Codec(bits), torch.randn(8, 3)
    gamma, beta = torch.ones(3), torch.zeros(3)
    expected = quantise(codec, x_hat, gamma, beta)
    x_hat[2, 1] = torch.nan
    for found, whole in zip(quantise(codec, x_hat, gamma, beta), expected, strict=True):
        found[2, 1] = whole[2, 1]
        assert torch.equal(found, whole)
