"""image_files/decoding.py: files of every kind, and where a crop comes from."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_files import image
from torchvision.transforms import TenCrop

from runners.data import image_files
from runners.errors import UserError
from runners.image_files import decoding


def decoded(file: Path) -> np.ndarray:
    return np.asarray(decoding.decode(str(file), "pillow"))


# ---- files


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("LA", "a.png"),
     ("RGB", "a.JPEG"), ("L", "a.JPEG"), ("CMYK", "a.JPEG"), ("RGB", "a.webp"), ("RGB", "a.bmp"), ("RGB", "a.ppm"),
     ("RGB", "a.tiff")],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, name: str) -> None:
    file = tmp_path / name
    image(0).convert(mode).save(file)
    expected = np.asarray(Image.open(file).convert("RGB"))
    found = decoded(file)
    assert found.shape == (12, 15, 3)
    assert np.array_equal(found, expected)


def test_the_extension_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "n02105855_2933.JPEG"  # one of ImageNet's is a PNG too
    image(0).save(file, format="PNG")
    assert np.array_equal(decoded(file), np.asarray(image(0)))


def test_the_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image(0).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decoded(tmp_path / "turned.png"), np.asarray(image(0)))


def test_grey_of_16_bits_is_not_white(tmp_path: Path) -> None:
    grey = np.arange(15 * 12, dtype=np.uint16).reshape(12, 15) * 300
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(decoded(tmp_path / "grey.png"), np.repeat(grey[:, :, None] >> 8, 3, axis=2))


def test_a_camera_s_file_of_several_images_is_its_first(tmp_path: Path) -> None:
    image(0).save(tmp_path / "several.jpg", format="MPO", save_all=True, append_images=[image(1)])
    image(0).save(tmp_path / "one.jpg")
    with Image.open(tmp_path / "several.jpg") as several:
        assert several.format == "MPO"
    assert np.array_equal(decoded(tmp_path / "several.jpg"), decoded(tmp_path / "one.jpg"))


def encoded(name: str) -> bytes:
    stream = io.BytesIO()
    image(0, 64, 48).save(stream, format=name)
    return stream.getvalue()


def jpeg() -> bytes:
    return encoded("JPEG")


def bomb() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, format="PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    checksum = __import__("zlib").crc32(content[12:29])
    content[29:33] = checksum.to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be decoded: it is empty"),
        (b"<html>not found</html>", "cannot be decoded: it is no image of JPEG, PNG, WEBP, BMP, PPM, TIFF"),
        (encoded("EPS"), "cannot be decoded: it is no image of JPEG"),
        (jpeg()[:-200], "cannot be decoded: image file is truncated"),
        (jpeg()[:100], "cannot be decoded: "),
        (bomb(), "cannot be decoded: Image size (400000000 pixels) exceeds limit"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["empty", "text", "EPS", "truncated", "header", "bomb", "missing"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "bad.JPEG"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        decoding.training_crops([str(file)], [(9, 0, 0)], size=8, decoder="pillow")
    assert str(caught.value).startswith(f"{file} {reason}")
    assert "\n" not in str(caught.value)


def test_an_image_too_long_to_be_resized_is_one_line_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "line.png"
    Image.new("RGB", (1, 2000)).save(file)
    with pytest.raises(UserError, match=r"line\.png cannot be used: 1x2000 pixels would become 256x512000$"):
        decoding.test_crops([str(file)], side=256, size=8, count=6, decoder="pillow")


# ---- crops


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((500, 375), 256, (341, 256)), ((375, 500), 256, (256, 341)), ((500, 333), 368, (553, 368)), ((9, 9), 9, (9, 9)),
     ((512, 333), 256, (394, 256))],
)  # fmt: skip
def test_the_long_side_is_rounded(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    """As in the authors' code; torchvision drops the fraction: of 393.6 it makes 393."""
    assert decoding.resized_size("a.png", size, side) == expected


@pytest.mark.parametrize("size", [(50, 37), (36, 52)])
def test_ten_crops_are_torchvision_s(tmp_path: Path, size: tuple[int, int]) -> None:
    file = tmp_path / "a.png"
    image(0, *size).save(file)
    crops = torch.from_numpy(decoding.test_crops([str(file)], side=25, size=16, count=6, decoder="pillow"))
    resized = image(0, *size).resize(decoding.resized_size("", size, 25), Image.Resampling.BILINEAR)
    theirs = [np.asarray(crop) for crop in TenCrop(16)(resized)]
    ours = image_files.views(crops.movedim(-1, -3))
    assert all(np.array_equal(our[0].permute(1, 2, 0), their) for our, their in zip(ours, theirs, strict=True))
    (centre,) = decoding.test_crops([str(file)], side=25, size=16, count=1, decoder="pillow")[0]
    assert np.array_equal(centre, theirs[4])


@pytest.mark.parametrize("size", [(50, 37), (36, 52), (9, 11)])
def test_a_training_crop_is_one_of_the_resized_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """All places are reached, both ends included; a pixel may be rounded twice, to 1 or 2 of 255 away."""
    file = tmp_path / "a.png"
    image(0, *size).save(file)
    side, cropped, largest = 19, 16, (1 << 24) - 1
    width, height = decoding.resized_size("", size, side)
    whole = np.asarray(image(0, *size).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    rows, columns = height - cropped + 1, width - cropped + 1
    places = [(row, column) for row in range(rows) for column in range(columns)]
    drawn = [(side, -(-row * (1 << 24) // rows), -(-column * (1 << 24) // columns)) for row, column in places]
    drawn[-1] = side, largest, largest
    crops = decoding.training_crops([str(file)] * len(drawn), drawn, size=cropped, decoder="pillow").astype(int)
    for crop, (row, column) in zip(crops, places, strict=True):
        difference = np.abs(crop - whole[row : row + cropped, column : column + cropped])
        assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    """A departure from the authors' TensorFlow 1, which takes four source pixels whatever the size."""
    file = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(256, size=(48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    (crop,) = decoding.test_crops([str(file)], side=16, size=16, count=1, decoder="pillow")[0]
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    apart = {
        antialias: (
            F.interpolate(source, size=16, mode="bilinear", antialias=antialias)[0].permute(1, 2, 0)
            - torch.from_numpy(crop.astype(np.float32))
        ).abs().max()
        for antialias in (True, False)
    }  # fmt: skip
    assert apart[True] < 1.5  # rounded after each direction
    assert apart[False] > 30
