"""image_files/listing.py: every layout that users have, and one line for what is none."""

import os
import re
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from small_files import TRAIN, VAL, config, write, write_folders
from torchvision.datasets import ImageFolder

from runners.data import imagenet
from runners.errors import UserError
from runners.image_files import listing, listing_cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "blpa"


def refused(root: Path, classes: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        listing.find(root, classes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def listed(files: listing.Files) -> list[tuple[str, int]]:
    return list(zip(files.paths, files.labels, strict=True))


# ---- layouts


def test_class_folders_are_listed_as_torchvision_lists_them(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "root")
    write(root / "train" / "bee" / "UPPER.PNG", 99)
    for other in ("train/bee/notes.txt", "train/bee/.hidden.png", "train/README.md", "meta.bin"):
        (root / other).write_text("")
    for split, files in zip(("train", "val"), listing.find(root, 3), strict=True):
        theirs = ImageFolder(str(root / split)).samples
        ours = [(str(files.folder / path), label) for path, label in listed(files)]
        assert ours == [sample for sample in theirs if "hidden" not in sample[0]]
    assert len(ours) == sum(VAL.values())
    (root / "train" / ".cache").mkdir()
    assert len(listing.find(root, 3)[0].paths) == sum(TRAIN.values()) + 1


def test_fewer_classes_are_the_first_ones(tmp_path: Path) -> None:
    train, val = listing.find(write_folders(tmp_path), 2)
    assert {path.split("/")[0] for path in train.paths} == {"ant", "bee"}
    assert (len(train.paths), len(val.paths)) == (7, 4)


def test_more_classes_than_there_are_are_refused(tmp_path: Path) -> None:
    assert "dataset.classes=4 is more than there are: 3" in refused(write_folders(tmp_path), 4)


def test_kaggle_s_layout(tmp_path: Path) -> None:
    """Its images for testing lie in one folder, and a table has their classes, and boxes around what they show."""
    whole = listing.find(write_folders(tmp_path / "whole"), 3)
    base = write_folders(tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC")
    rows = ["ImageId,PredictionString"]
    for file in sorted(base.glob("val/*/*")):
        file.rename(base / "val" / file.name)
        rows.append(f"{file.stem},{file.parent.name} 1 2 3 4 {file.parent.name} 5 6 7 8")
        file.parent.rmdir() if not any(file.parent.iterdir()) else None
    table = tmp_path / "kaggle" / "LOC_val_solution.csv"
    table.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    train, val = listing.find(tmp_path / "kaggle", 3)
    assert listed(train) == listed(whole[0])
    assert [(Path(path).name, label) for path, label in listed(whole[1])] == listed(val)
    assert len(listing.find(tmp_path / "kaggle", 1)[1].paths) == VAL["ant"]

    table.write_text("\n".join(rows[:-1]) + "\n")
    assert "1 images are in one alone" in refused(tmp_path / "kaggle")
    table.write_text("\n".join([*rows, "odd,wasp 1 2 3 4"]))
    assert f"{table}, line 9: 'odd,wasp 1 2 3 4', expected an image, a comma and a class" in refused(
        tmp_path / "kaggle"
    )
    table.write_text("\ufeff" + "\n".join([*rows, rows[1], "", " "]) + "\n\n")  # as an editor may leave it
    assert listing.find(tmp_path / "kaggle", 3)[1] == val
    for row, message in (
        ("ant_0,cat 1 2 3 4", "line 10: ant_0 is of class cat, and of ant before"),
        ("a\0b,cat 1 2 3 4", r"line 10: 'a\x00b,cat 1 2 3 4', expected an image, a comma and a class"),
        ('"' + "x" * 200_000, "line 10: field larger than field limit"),
    ):
        table.write_text("\n".join([*rows, "", row]))
        assert f"{table}, {message}" in refused(tmp_path / "kaggle")
    table.unlink()
    assert "has no class folders, and there is no" in refused(tmp_path / "kaggle")


def test_the_authors_lists(tmp_path: Path) -> None:
    train, val = listing.find(write_folders(tmp_path), 3)
    for name, files in (("train", train), ("val", val)):
        lines = [f"{name}/{path},{label}\n" for path, label in reversed(listed(files))]
        (tmp_path / f"{name}.txt").write_text("".join(lines) + "\n")
    again = listing.find(tmp_path, 3)
    assert [(f"train/{path}", label) for path, label in reversed(listed(train))] == listed(again[0])
    assert [label for _, label in listed(listing.find(tmp_path, 2)[1])] == [1, 1, 0, 0]
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert listing.find(tmp_path, 3) == again
    for line in ("val/ant/ant_1.png," + "1" * 5000, "val/a\0.png,0"):
        (tmp_path / "val.txt").write_text(f"val/ant/ant_0.png,0\n{line}\n")
        assert f"{tmp_path / 'val.txt'}, line 2: {line[:80]!r}, expected a path relative to" in refused(tmp_path)
    (tmp_path / "val.txt").write_text("val/ant/ant_0.png,0\nval/bee/bee_0.png 1\n")
    assert f"{tmp_path / 'val.txt'}, line 2: 'val/bee/bee_0.png 1', expected a path relative to" in refused(tmp_path)
    (tmp_path / "val.txt").write_text("val/ant/ant_0.png,0\nval/cat/cat_0.png,2\n")
    assert "the same labels, 0 to classes - 1: look at label 1" in refused(tmp_path)
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("val/ant/ant_0.png,0\nval/cat/cat_0.png,999999999\n")
    assert refused(tmp_path).endswith("look at label 1, 2, 3")


def test_what_is_no_data_set_is_one_line_that_names_the_layouts(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for root, what in ((tmp_path, "has no folder val"), (tmp_path / "nowhere", "is no folder")):
        text = refused(root)
        assert text.startswith(f"{root} {what}: expected train/<class>/ and val/<class>/ with the images")
        assert "LOC_val_solution.csv" in text and "train.txt and val.txt" in text
    (tmp_path / "val").mkdir()
    assert refused(tmp_path) == f"{tmp_path / 'train'} has no class folders"


def test_classes_that_one_split_lacks_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, val={**VAL, "wasp": 1})
    assert refused(tmp_path).startswith(f"{tmp_path / 'val'} has a class wasp, and {tmp_path / 'train'} has not")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path, train={**TRAIN, "bee": 0})
    (tmp_path / "train" / "bee").mkdir()
    assert refused(tmp_path).startswith(f"{tmp_path / 'train' / 'bee'} has no images: files of .jpg")


def test_archives_come_with_the_commands_that_unpack_them(tmp_path: Path) -> None:
    """The commands for the training images are run; those for the others are torchvision's, which checks the md5."""
    root = tmp_path / "a root"
    root.mkdir()
    whole = write_folders(tmp_path / "whole")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in (whole / "train").iterdir():
            inner = tmp_path / f"{folder.name}.tar"
            with tarfile.open(inner, "w") as tar:
                for file in folder.iterdir():
                    tar.add(file, file.name)
            outer.add(inner, inner.name)
    (root / "ILSVRC2012_img_val.tar").touch()
    text = refused(root)
    assert "archives that are not unpacked" in text and "torchvision.datasets.ImageNet('.', 'val')" in text
    subprocess.run(["sh", "-c", listing.unpacking(root, ["train"])], check=True)
    (whole / "val").rename(root / "val")
    assert listing.find(root, 3)[0].labels == [0] * 4 + [1] * 3 + [2] * 5
    assert not list(root.glob("train/*.tar"))


# ---- reading


def test_a_number_of_images_other_than_the_published_one_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(write_folders(tmp_path))
    imagenet.read(given)
    assert capsys.readouterr().err == ""  # three classes are not all of ImageNet's
    monkeypatch.setattr(imagenet, "PUBLISHED_CLASSES", 3)
    imagenet.read(given)
    assert capsys.readouterr().err == ("imagenet: 12 training and 7 test images; 1,281,167 and 50,000 were published\n")
    given.version = "mine"
    imagenet.read(given)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"root": "nowhere"}, r"dataset\.root=nowhere: nowhere is no folder: expected train/<class>/"),
        ({"train_sides": None}, r"dataset\.train_sides=null: a data set of image files gives it"),
        ({"decoder": "torchcodec"}, r"dataset\.decoder=torchcodec is not installed: pip install 'torchcodec >= 0\.16'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{message}"):
        imagenet.read(config(write_folders(tmp_path), **values))


# ---- the cache


def settle(root: Path) -> None:
    """Let the folders have changed a minute ago."""
    then = time.time() - 60
    for folder in (root, *root.glob("**/")):
        os.utime(folder, (then, then))


def listed_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that a listing looks into."""
    looked: list[str] = []
    really = listing_cache._listed

    def look(folder: Path) -> tuple[list[str], bool]:
        looked.append(f"{folder.parent.name}/{folder.name}")
        return really(folder)

    with monkeypatch.context() as patch:
        patch.setattr(listing_cache, "_listed", look)
        listing.find(root, 3)
    return looked


ALL = [f"{split}/{name}" for split in ("train", "val") for name in sorted(TRAIN)]


def test_folders_are_listed_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    root = write_folders(tmp_path / "root")
    assert listed_anew(root, monkeypatch) == ALL
    assert listed_anew(root, monkeypatch) == ALL  # they have changed just now, and may change again at the same time
    settle(root)
    expected = listing.find(root, 3)
    assert len(list(cache.iterdir())) == 2
    assert listed_anew(root, monkeypatch) == []
    assert listing.find(root, 3) == expected
    write(root / "train" / "bee" / "new.png", 99)
    assert listed_anew(root, monkeypatch) == ["train/bee"]
    assert "bee/new.png" in listing.find(root, 3)[0].paths
    (root / "train" / "bee" / "new.png").unlink()
    assert listing.find(root, 3) == expected


def test_the_cache_of_a_subset_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "root")
    settle(root)
    listing.find(root, 2)
    assert listed_anew(root, monkeypatch) == ["train/cat", "val/cat"]
    assert listed_anew(root, monkeypatch) == []


def test_links_to_a_disk_that_is_not_mounted_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, disk = write_folders(tmp_path / "root"), tmp_path / "disk"
    for name, moved in (("ant", "*"), ("bee", "bee_1.png")):  # all of them, and one of some
        for file in (root / "train" / name).glob(moved):
            file.rename(disk.with_name(file.name))
            file.symlink_to(disk / file.name)
    settle(root)
    assert refused(root).startswith(f"{root / 'train' / 'ant'} has no images")
    disk.mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(disk / file.name)
    assert listed_anew(root, monkeypatch)[:2] == ALL[:2]
    assert len(listing.find(root, 3)[0].paths) == sum(TRAIN.values())
    assert listed_anew(root, monkeypatch) == []


@pytest.mark.parametrize("harm", [b"", b"\n", b"0\n{}", None], ids=["empty", "a line", "another digest", "a bit"])
def test_a_damaged_cache_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, harm: bytes | None
) -> None:
    root = write_folders(tmp_path / "root")
    settle(root)
    expected = listing.find(root, 3)
    for file in cache.iterdir():
        content = file.read_bytes()
        file.write_bytes(content.replace(b"ant_1", b"ant_9") if harm is None else harm)
    assert listed_anew(root, monkeypatch) == ALL
    assert listing.find(root, 3) == expected
    assert listed_anew(root, monkeypatch) == []  # written again


def test_without_a_cache_everything_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "root")
    settle(root)
    expected = listing.find(root, 3)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert listing.find(root, 3) == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # there is no home
    assert listing.find(root, 3) == expected
    assert not re.search("~", " ".join(os.listdir()))
