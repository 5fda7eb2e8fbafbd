"""What the network is given, in what order, and what is said of a bad data folder."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cifar import publish, served
from support import make

from runners.config import DatasetConfig
from runners.data import Split, cifar, crop, digits, draw_crops, load, normalise

CPU = torch.device("cpu")
DIGITS = replace(make().dataset, iterations=7, batch_size=4, schedule=[[1.0, 0.1]], flip=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct_images(count: int, size: int = 5) -> torch.Tensor:
    """Images in which no two pixels are alike, so that an output says where it was cut out; none of them is zero."""
    return 1 + torch.arange(count * 2 * size * size, dtype=torch.float32).reshape(count, 2, size, size)


def crops(image: torch.Tensor, padding: int) -> dict[tuple[int, int, bool], torch.Tensor]:
    """Every crop of a zero-padded image, by (row, column, mirrored); one at a time, with numpy's own padding."""
    size = image.shape[-1]
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
    found = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = torch.from_numpy(padded[:, row : row + size, column : column + size].copy())
            found[row, column, False], found[row, column, True] = crop, crop.flip(2)
    return found


def augment(images: torch.Tensor, config: DatasetConfig, *, generator: torch.Generator) -> torch.Tensor:
    return crop(images, draw_crops(len(images), config, generator=generator), config)


def batches(split: Split, config: DatasetConfig, **options: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for iteration, drawn in split.inputs(config, **options):
        yield iteration, *split.batch(drawn, config)


def draws(images: torch.Tensor, config: DatasetConfig, seed: int = 0) -> list[tuple[int, int, bool]]:
    """Find out what was drawn for each image; fails where an output is no crop of its own image."""
    augmented = augment(images, config, generator=generator(seed))
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    found = []
    for image, output in zip(images, augmented, strict=True):
        (drawn,) = (key for key, crop in crops(image, config.crop_padding).items() if torch.equal(crop, output))
        found.append(drawn)
    return found


# ---- what the network is given


def test_an_image_is_scaled_and_loses_its_own_mean() -> None:
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator())
    scaled = images.double() / 255
    expected = torch.stack([image - image.mean() for image in scaled])
    result = normalise(images)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    # float32 values below 1, of which 192 are summed: a few units in the last place, 6e-8
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=5e-7)


def test_per_image_draws_every_crop_and_mirroring_alike() -> None:
    drawn = Counter(draws(distinct_images(1800), DIGITS))
    assert len(drawn) == 3 * 3 * 2
    # 100 expected of each of the 18; the binomial's standard deviation is 9.7
    assert all(50 <= count <= 150 for count in drawn.values())


def test_per_batch_draws_one_crop_and_mirrors_the_first_half() -> None:
    config = replace(DIGITS, augmentation="per-batch")
    corners = set()
    for seed in range(20):
        drawn = draws(distinct_images(7), config, seed)
        assert [mirrored for _, _, mirrored in drawn] == [True] * 3 + [False] * 4
        (corner,) = {(row, column) for row, column, _ in drawn}
        corners.add(corner)
    assert len(corners) > 1


@pytest.mark.parametrize("augmentation", ["per-image", "per-batch"])
def test_flip_false_never_mirrors(augmentation: str) -> None:
    drawn = draws(distinct_images(40), replace(DIGITS, augmentation=augmentation, flip=False))
    assert not any(mirrored for _, _, mirrored in drawn)


def test_without_padding_there_is_nothing_to_crop() -> None:
    images = distinct_images(4)
    assert torch.equal(augment(images, replace(DIGITS, crop_padding=0, flip=False), generator=generator()), images)


def test_no_augmentation_returns_the_images() -> None:
    images = distinct_images(4)
    assert torch.equal(augment(images, replace(DIGITS, augmentation="none"), generator=generator()), images)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"augmentation=mixup: .* per-image, per-batch, none"):
        augment(distinct_images(4), replace(DIGITS, augmentation="mixup"), generator=generator())


# ---- the order


def ten_images() -> Split:
    """An image's label is its index."""
    return Split(torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8, generator=generator()), torch.arange(10))


def test_an_epoch_visits_no_image_twice_and_drops_the_partial_batch() -> None:
    labels = [batch.tolist() for _, _, batch in batches(ten_images(), DIGITS, seed=0)]
    assert [len(batch) for batch in labels] == [4] * 7
    epochs = [labels[start] + labels[start + 1] for start in (0, 2, 4)]  # 10 images: 2 batches of 4, 2 images dropped
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", range(1, 8))
def test_a_run_can_start_at_any_iteration(start: int) -> None:
    whole = list(batches(ten_images(), DIGITS, seed=3))
    torch.rand(start)  # the global generator has no say
    part = list(batches(ten_images(), DIGITS, seed=3, start=start))
    assert [iteration for iteration, _, _ in part] == list(range(start, 8))
    for (_, images, labels), (_, images_again, labels_again) in zip(whole[start - 1 :], part, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_the_seed_moves_the_order_and_the_augmentation() -> None:
    _, images, labels = next(batches(ten_images(), DIGITS, seed=0))
    _, other_images, other_labels = next(batches(ten_images(), DIGITS, seed=1))
    assert not torch.equal(labels, other_labels)
    assert not torch.equal(images, other_images)


# ---- digits


def test_digits_are_split_once_and_for_all() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    data = load(DIGITS, CPU)
    assert data.train.images.shape == (1297, 1, 8, 8)
    assert data.test.images.shape == (500, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert (int(data.train.images.min()), int(data.train.images.max())) == (0, 255)
    # A published error rests on these 500 images: another release of scikit-learn must not choose others unnoticed.
    content = data.test.images.numpy().tobytes() + data.test.labels.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "da2b3ef4e6c36754"


def test_digits_are_in_equal_parts_in_both_sets() -> None:
    (_, train), (_, test) = digits.read(DIGITS)
    expected = (train.bincount() + test.bincount()) * 500 / 1797
    assert (test.bincount() - expected).abs().max() < 1


# ---- load


@pytest.mark.parametrize(("key", "value", "has"), [("image_size", 32, 8), ("image_channels", 3, 1), ("classes", 9, 10)])
def test_images_other_than_the_configuration_says_are_refused(key: str, value: int, has: int) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\.{key}={value}: digits has {has}$"):
        load(DatasetConfig(**{**asdict(DIGITS), key: value}), CPU)


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^dataset\.batch_size=1298: the training set has 1297 images$"):
        load(replace(DIGITS, batch_size=1298), CPU)


def test_a_reader_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.reader=no_such_module: cannot be imported \(No module named "):
        load(replace(DIGITS, reader="no_such_module"), CPU)


# Older releases of torchvision unpack an archive (whose md5 they have checked) without naming tarfile's filter.
unpacks = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")


# ---- CIFAR: the real reader and the real download, on a folder of the same layout with few images


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with served(tmp_path, monkeypatch) as url:
        yield url


@pytest.fixture(params=["cifar10", "cifar100"])
def config(
    request: pytest.FixtureRequest, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> DatasetConfig:
    """A small data set under `root`, and an archive of it to download beside it."""
    root = tmp_path / "root"
    publish(request.param, root, tmp_path / "archive.tar.gz", server, monkeypatch)
    return replace(
        DIGITS,
        name=request.param,
        reader="runners.data.cifar",
        root=str(root),
        download=False,
        image_size=32,
        image_channels=3,
        classes=10,
    )


def source(config: DatasetConfig) -> Any:
    return cifar.SOURCES[config.name]


def folder(config: DatasetConfig) -> Path:
    return Path(config.root, source(config).base_folder)


def message(config: DatasetConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load(config, CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"dataset.root={config.root}: ")
    return text


def unreachable(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source(config), "url", "http://127.0.0.1:1/archive.tar.gz")  # nothing listens there


@pytest.mark.parametrize("is_train", [True, False])
def test_images_and_labels_are_those_of_torchvision(config: DatasetConfig, is_train: bool) -> None:
    data = load(config, CPU)
    split = data.train if is_train else data.test
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    reference = source(config)(config.root, train=is_train)
    assert len(split.labels) == len(reference)
    for (picture, label), image, our_label in zip(reference, split.images, split.labels, strict=True):
        assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())
        assert label == our_label


def test_a_good_folder_needs_no_network(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(config, monkeypatch)
    assert len(load(replace(config, download=True), CPU).test.labels) == 10


def test_a_missing_folder_is_named(config: DatasetConfig) -> None:
    config = replace(config, root=f"{config.root}-elsewhere")
    text = message(config)
    assert f"there is no folder {folder(config)}" in text
    assert "dataset.download=true" in text


def test_a_missing_file_is_named(config: DatasetConfig) -> None:
    file = folder(config) / source(config).test_list[0][0]
    file.unlink()
    assert f"{file} is missing" in message(config)


@pytest.mark.parametrize("which", ["train", "meta"])
def test_a_damaged_file_is_named(config: DatasetConfig, which: str) -> None:
    name = source(config).train_list[-1][0] if which == "train" else source(config).meta["filename"]
    file = folder(config) / name
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged or your own (its md5 is not" in message(config)


@unpacks
@pytest.mark.parametrize("harm", ["no folder", "missing", "missing meta"])
def test_what_is_missing_is_downloaded(config: DatasetConfig, harm: str) -> None:
    name = source(config).meta["filename"] if harm == "missing meta" else source(config).test_list[0][0]
    file = folder(config) / name
    expected = load(config, CPU)
    if harm == "no folder":
        config = replace(config, root=f"{config.root}-elsewhere")
    else:
        file.unlink()
    data = load(replace(config, download=True), CPU)
    assert torch.equal(data.train.images, expected.train.images)
    assert torch.equal(data.test.labels, expected.test.labels)


def test_a_download_that_fails_is_one_line(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(config, monkeypatch)
    file = folder(config) / source(config).test_list[0][0]
    file.unlink()
    text = message(replace(config, download=True))
    assert f"{file} is missing" in text
    assert "http://127.0.0.1:1/archive.tar.gz could not be downloaded" in text
    assert "refused" in text


def test_a_damaged_download_is_one_line(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source(config), "tgz_md5", "0" * 32)
    (folder(config) / source(config).test_list[0][0]).unlink()
    assert "could not be downloaded" in message(replace(config, download=True))


@unpacks
def test_an_archive_with_other_files_is_one_line(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = source(config).test_list[0][0]
    (folder(config) / name).unlink()
    monkeypatch.setattr(source(config), "test_list", [[name, "0" * 32]])
    assert "also after the download" in message(replace(config, download=True))


def test_of_runs_that_start_at_once_one_downloads(config: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder(config))
    download, downloads = cifar.download_and_extract_archive, []

    def counted(*arguments: Any, **options: Any) -> None:
        downloads.append(arguments)
        download(*arguments, **options)

    monkeypatch.setattr(cifar, "download_and_extract_archive", counted)
    with ThreadPoolExecutor(8) as runs:
        found = list(runs.map(lambda _: len(load(replace(config, download=True), CPU).test.labels), range(8)))
    assert found == [10] * 8
    assert len(downloads) == 1
