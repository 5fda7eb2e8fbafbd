"""Decode an image file, resize it and crop it, to bytes.

An image of height H and width W is resized so that its short side is s, and its long side the rounded long * s / short.
Every pixel is a weighted mean of the pixels around its own place (bilinear); where the image shrinks, the weights span
as many source pixels as fall into one (antialiased), and corners of pixels are aligned.

Departures from the authors' code (TensorFlow 1's resize): it takes four source pixels whatever the size, aligns the
centres of the first pixels only, and returns floats, where these are rounded to bytes.

Files are read as torchvision's loader reads them: converted to RGB, transparency dropped, the EXIF orientation ignored.
16-bit grey is an exception: Pillow's conversion would make nearly all of it white, so its high bytes are taken. A
JPEG of an image several times too large could be decoded at half its size (Pillow's `draft`). That would be another
filter, with pixels up to 9 of 255 apart; and an image of usual size, 500x375, is too small for it.

TorchCodec's decoder makes the same bytes of other files, but turns an image by its EXIF orientation, takes 16-bit grey
in another way, and reads no TIFF, BMP or PPM.
"""

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from runners.errors import UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""Formats that are read, told by the bytes of a file and not by its name. For EPS Pillow would start a program."""

LARGEST_PIXELS = 89_478_485
"""Pixels of an image before and after it is resized; Pillow's own limit, 256 MiB of three bytes and a third."""

DRAWN_BITS = 24
"""A place for a crop is drawn as a whole number below 2 ** 24, since the image's size is not known yet."""


def training_crops(
    files: Sequence[str], places: Sequence[tuple[int, int, int]], *, size: int, decoder: str
) -> np.ndarray[Any, Any]:
    """Make one crop of each file.

    The crop alone is computed: it is the same weighted mean as in the whole resized image. Pillow rounds the weights
    in other places then: in photographs a few pixels in a thousand differ by 1 or 2 of 255, in images of noise or of
    sharp edges more. It takes half the time.

    Args:
        files: paths.
        places: for each file the short side in pixels, and the place of the crop from the top and from the left, each
            in 2 ** -24 of the places there are.
        size: height and width of a crop, at most the short side.
        decoder: pillow or torchcodec.

    Returns:
        uint8 [files, size, size, 3].

    Raises:
        UserError: a file cannot be read; the message names it.
    """
    crops = np.empty((len(files), size, size, 3), np.uint8)
    for out, file, (side, drawn_top, drawn_left) in zip(crops, files, places, strict=True):
        image = decode(file, decoder)
        width, height = resized_size(file, image.size, side)
        left, top = drawn_left * (width - size + 1) >> DRAWN_BITS, drawn_top * (height - size + 1) >> DRAWN_BITS
        x, y = image.width, image.height  # the place of the crop in the image as it is: whole * x / width
        box = (left * x / width, top * y / height, (left + size) * x / width, (top + size) * y / height)
        out[:] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return crops


def test_crops(files: Sequence[str], *, side: int, size: int, count: int, decoder: str) -> np.ndarray[Any, Any]:
    """Resize each file and make the crops of an evaluation.

    Args:
        files: paths.
        side: short side of the resized image, in pixels.
        size: height and width of a crop, at most the short side.
        count: 1 takes the centre, 6 the corners (top left, top right, bottom left, bottom right), the centre, and the
            place that is the centre of the mirror image: a pixel aside where the margins are odd.
        decoder: pillow or torchcodec.

    Returns:
        uint8 [files, count, size, size, 3].

    Raises:
        UserError: a file cannot be read; the message names it.
    """
    crops = np.empty((len(files), count, size, size, 3), np.uint8)
    for out, file in zip(crops, files, strict=True):
        image = decode(file, decoder)
        image = image.resize(resized_size(file, image.size, side), Image.Resampling.BILINEAR)
        right, bottom = image.width - size, image.height - size
        left, top = round(right / 2), round(bottom / 2)
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        places = [(left, top)] if count == 1 else [*corners, (left, top), (right - left, top)]
        for crop, (left, top) in zip(out, places, strict=True):
            crop[:] = np.asarray(image.crop((left, top, left + size, top + size)))
    return crops


def resized_size(file: str, size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height after the resize to a short side.

    Raises:
        UserError: the long side would be too long; the message names the file.
    """
    width, height = (round(length * side / min(size)) for length in size)
    if width * height > LARGEST_PIXELS:
        raise UserError(f"{file} cannot be used: {size[0]}x{size[1]} pixels would become {width}x{height}")
    return width, height


def decode(file: str, decoder: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: it cannot be read; the message names it.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not content:
        raise UserError(f"{file} cannot be decoded: it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of transparency
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _by_torchcodec(content) if decoder == "torchcodec" else _as_rgb(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{file} cannot be decoded: it is no image of {', '.join(FORMATS)}") from error
    except Exception as error:  # a decoder raises whatever the bytes lead to
        raise UserError(f"{file} cannot be decoded: {first_line(error) or type(error).__name__}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of a range that it does not tell")
    return image.convert("RGB")


def _by_torchcodec(content: bytes) -> Image.Image:
    from torchcodec.decoders import decode_image  # an extra, and it imports torch

    return Image.fromarray(np.ascontiguousarray(decode_image(content).numpy().transpose(1, 2, 0)))


def check_decoder(decoder: str) -> None:
    """Check that a decoder is installed.

    Raises:
        UserError: it is not; the message tells how to install it.
    """
    if decoder == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        raise UserError("dataset.decoder=torchcodec is not installed: pip install 'torchcodec >= 0.16'")
