"""Colours of training images, changed at random on the device: each image by its own four factors.

In this order, with TensorFlow's meaning of each (tf.image.random_brightness, _saturation, _hue, _contrast):

    brightness    x + b                        b within 32 / 255
    saturation    s -> min(f s, 1)             f from 0.5 to 1.5
    hue           h -> h + d mod 1             d within 0.2 of a turn
    contrast      (x - mean) f + mean          f from 0.5 to 1.5; the mean of each channel of the image
    clip          to [0, 1]

h, s and v are the image's hue, saturation and value (HSV). Saturation and hue leave v alone, and each other, so one way
to HSV and back does both. From them a channel is

    v - v s max(0, min(k, 4 - k, 1))    with k = n + 6 h mod 6, and n = 5, 3, 1 for red, green, blue

Source: the authors' imgnet code for order and ranges; Smith 1978, Color gamut transform pairs, for HSV.
"""

import torch
from torch import Tensor

BRIGHTNESS, HUE = 32 / 255, 0.2
FACTORS = 0.5, 1.5
"""Smallest and largest factor of saturation, and of contrast."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet's images: every image is normalised by them."""

SMALLEST = 1e-12
"""In place of a divisor of 0, where the dividend is 0 or the quotient is not used; others are above 1e-9."""


def draw_changes(count: int, *, generator: torch.Generator) -> Tensor:
    """Draw the changes of each image.

    Returns:
        float32 [count, 4]: brightness, saturation, hue and contrast, as `changed` takes them.
    """
    low, high = FACTORS
    uniform = torch.rand(4, count, generator=generator)
    smallest = torch.tensor([-BRIGHTNESS, low, -HUE, low])[:, None]
    largest = torch.tensor([BRIGHTNESS, high, HUE, high])[:, None]
    return (smallest + uniform * (largest - smallest)).T


def changed(images: Tensor, changes: Tensor) -> Tensor:
    """Change the colours of each image.

    Args:
        images: float32 [N, 3, H, W] from 0 to 1; written over.
        changes: float32 [N, 4], on the same device: as `draw_changes` returns them.

    Returns:
        float32 [N, 3, H, W] from 0 to 1, in the memory format of the images.
    """
    brightness, saturation, hue, contrast = changes[:, :, None, None, None].unbind(1)
    images = changed_in_hsv(images.add_(brightness), saturation, hue)
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1)


def changed_in_hsv(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Multiply the saturation of images and turn their hue.

    Args:
        images: float32 [N, 3, H, W]; a pixel whose channels are all below 0 has saturation 0, and becomes grey.
        saturation: factor of each image, float32 [N, 1, 1, 1].
        hue: turns, likewise.
    """
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    is_red, is_green = value == red, value == green
    # The largest channel tells which third of a turn the hue is in, and the difference of the others where in it.
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sixths = difference.div_(chroma.clamp_min(SMALLEST)).add_(6 * hue)
    sixths += (4 - 2 * is_green.float()).masked_fill_(is_red, 0)
    scaled = (saturation * chroma / value.clamp_min(SMALLEST)).clamp_(0, 1)
    changed_chroma = value.clamp_min(0) * scaled
    for channel, first in enumerate((5, 3, 1)):
        place = (sixths + first).remainder_(6)
        images[:, channel : channel + 1] = value - changed_chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
    return images


def standardised(images: Tensor) -> Tensor:
    """Subtract the mean of each channel, and divide by its deviation.

    Args:
        images: float32 [N, 3, H, W] from 0 to 1; written over.
    """
    for channel, mean, deviation in zip(images.unbind(1), MEAN, DEVIATION, strict=True):
        channel.sub_(mean).div_(deviation)  # a tensor of the three would be copied to the device, which waits for it
    return images
