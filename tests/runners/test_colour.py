"""data/colour.py against other ways to write the same."""

import colorsys

import pytest
import torch

from runners.data import colour

GREY_AND_ENDS = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.2, 0.2, 0.7]]


def pixels() -> torch.Tensor:
    """[1, 3, 1, N]: noise, grey, and pixels with equal channels."""
    noise = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, torch.tensor(GREY_AND_ENDS)]).T[None, :, None].contiguous()


@pytest.mark.parametrize(
    ("saturation", "hue"), [(1.0, 0.0), (0.5, 0.0), (1.5, 0.0), (1.0, 0.2), (1.3, -0.2), (0.7, 0.1)]
)
def test_saturation_and_hue_are_those_of_colorsys(saturation: float, hue: float) -> None:
    given = pixels()
    expected = []
    for pixel in given[0, :, 0].T.tolist():
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v))
    factor, turn = (torch.tensor(value).reshape(1, 1, 1, 1) for value in (saturation, hue))
    found = colour.changed_in_hsv(given, factor, turn)[0, :, 0].T
    # float32 here, float64 there: a few units in the last place, times the 6 of a hue.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=5e-6)


def test_each_image_has_its_own_changes_in_their_order() -> None:
    """Brightness may leave [0, 1], and only the last step returns to it; contrast is about each channel's mean."""
    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    changes = torch.tensor([[0.1, 1.0, 0.0, 1.0], [-0.1, 1.0, 0.0, 1.5], [0.0, 1.0, 0.0, 0.5]])
    bright = images + changes[:, 0, None, None, None]
    bright = torch.where(bright.amax(1, keepdim=True) > 0, bright.maximum(torch.tensor(-1.0)), bright)
    bright[1] = saturated_once(bright[1])
    mean = bright.mean(dim=(2, 3), keepdim=True)
    expected = ((bright - mean) * changes[:, 3, None, None, None] + mean).clamp(0, 1)
    torch.testing.assert_close(colour.changed(images.clone(), changes), expected, rtol=0, atol=5e-6)


def saturated_once(image: torch.Tensor) -> torch.Tensor:
    """What the way to HSV makes of pixels with a channel below 0: saturation is at most 1, so their smallest is 0."""
    return torch.where(image.amax(0, keepdim=True) > 0, clipped(image), image.amax(0, keepdim=True).expand_as(image))


def clipped(image: torch.Tensor) -> torch.Tensor:
    value, smallest = image.amax(0, keepdim=True), image.amin(0, keepdim=True)
    scaled = value - (value - image) * value / (value - smallest).clamp_min(1e-12)
    return torch.where(smallest < 0, scaled, image)


def test_no_change_changes_nothing_but_the_last_places() -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    same = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(2, 1)
    torch.testing.assert_close(colour.changed(images.clone(), same), images, rtol=0, atol=5e-6)


def test_changes_are_drawn_over_the_whole_of_their_ranges() -> None:
    drawn = colour.draw_changes(20_000, generator=torch.Generator().manual_seed(0))
    assert (drawn.shape, drawn.dtype) == ((20_000, 4), torch.float32)
    for column, low, high in zip(drawn.T, (-32 / 255, 0.5, -0.2, 0.5), (32 / 255, 1.5, 0.2, 1.5), strict=True):
        assert low <= column.min() < low + 0.001 * (high - low)
        assert high >= column.max() > high - 0.001 * (high - low)
        # The standard error of the mean is 0.29 / sqrt(20000) = 0.002 of the range: five of them.
        assert abs(column.mean() - (low + high) / 2) < 0.01 * (high - low)


def test_channels_are_standardised_and_stay_channels_last() -> None:
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images - mean[:, None, None]) / deviation[:, None, None]
    found = colour.standardised(images)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
