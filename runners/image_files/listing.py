"""List the images of a data set: which files, in which classes.

    root/train/<class>/*, root/val/<class>/*         a folder for each class: torchvision's layout, and most users'
    root/ILSVRC/Data/CLS-LOC/{train,val}             Kaggle's; its val/ has no class folders: root/LOC_val_solution.csv
    root/train.txt, root/val.txt                     the authors': "path,label" on each line, the path relative to root

The lists come first where there are several. The label of a class folder is its place in the sorted names of the
training folders. Names that begin with a point, and names of other than images, are left out.
"""

import csv
import itertools
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runners.errors import UserError
from runners.image_files import listing_cache

LISTS = ("train.txt", "val.txt")
KAGGLE_FOLDER, KAGGLE_LABELS = Path("ILSVRC", "Data", "CLS-LOC"), "LOC_val_solution.csv"
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
LABEL_DIGITS = 9
"""Digits of a label: as many as any number of images needs."""
SHOWN = 3
"""Names that a message lists."""


@dataclass(frozen=True)
class Files:
    """The files of a training or of a test set, and their labels."""

    folder: Path
    """The paths are relative to this folder."""
    paths: list[str]
    labels: list[int]


def find(root: Path, classes: int) -> tuple[Files, Files]:
    """List a data set, by the lists in its root or by its class folders.

    Args:
        root: the folder of the data set.
        classes: number of classes; where there are more, the first ones are taken.

    Returns:
        Training and test set.

    Raises:
        UserError: there is no data set, it has fewer classes, or it is not as one of the layouts.
    """
    if all((root / name).is_file() for name in LISTS):
        return _first(_of_list(root, LISTS[0]), _of_list(root, LISTS[1]), classes)
    kaggle = root / KAGGLE_FOLDER
    base = kaggle if (kaggle / "train").is_dir() else root
    if not ((base / "train").is_dir() and (base / "val").is_dir()):
        raise UserError(_nothing_found(root))
    train, test = _of_folders(root, base, classes)
    if not test.paths:
        raise UserError(f"{test.folder} has no images of the first {classes} classes")
    return train, test


def _of_folders(root: Path, base: Path, classes: int) -> tuple[Files, Files]:
    train, val = base / "train", base / "val"
    names = _folders(train)
    if not names:
        raise UserError(f"{train} has no class folders")
    test_names = _folders(val)
    if test_names and (odd := sorted(set(names) ^ set(test_names))):
        where, other = (train, val) if odd[0] in names else (val, train)
        raise UserError(f"{where} has a class {odd[0]}, and {other} has not: {len(odd)} classes are in one alone")
    _check_classes(len(names), classes)
    chosen = names[:classes]
    if test_names:
        return _in_folders(train, chosen), _in_folders(val, chosen)
    return _in_folders(train, chosen), _of_solution(val, root / KAGGLE_LABELS, names, classes)


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; a link to a folder is one."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _in_folders(folder: Path, names: Sequence[str]) -> Files:
    found = listing_cache.images(folder, names)
    if empty := next((name for name in names if not found[name]), None):
        raise UserError(f"{folder / empty} has no images: files of {', '.join(listing_cache.EXTENSIONS)}")
    paths = [f"{name}/{file}" for name in names for file in found[name]]
    return Files(folder, paths, [label for label, name in enumerate(names) for _ in found[name]])


def _of_solution(val: Path, table: Path, names: list[str], classes: int) -> Files:
    """List images without class folders by Kaggle's table: ImageId, PredictionString, which begins with a class."""
    if not table.is_file():
        raise UserError(
            f"{val} has no class folders, and there is no {table}: move each image into the folder of its class, "
            "val/<class>/, as in train/"
        )
    label_of = {name: label for label, name in enumerate(names)}
    labels: dict[str, int] = {}
    for line, row in _rows(table):
        words = row[1].split() if len(row) == 2 else []
        if line == 1 and row[:1] == ["ImageId"]:
            continue
        if not words or words[0] not in label_of or not row[0].isprintable():
            raise UserError(f"{table}, line {line}: {','.join(row)[:80]!r}, expected an image, a comma and a class")
        label = label_of[words[0]]
        if labels.setdefault(row[0], label) != label:
            before = names[labels[row[0]]]
            raise UserError(f"{table}, line {line}: {row[0][:80]} is of class {words[0]}, and of {before} before")
    files = listing_cache.images(val.parent, [val.name])[val.name]
    stems = {Path(file).stem for file in files}
    if odd := sorted(stems ^ labels.keys()):
        where, other = (val, table) if odd[0] in stems else (table, val)
        raise UserError(f"{where} has an image {odd[0]}, and {other} has not: {len(odd)} images are in one alone")
    chosen = [(file, labels[Path(file).stem]) for file in files if labels[Path(file).stem] < classes]
    return Files(val, [file for file, _ in chosen], [label for _, label in chosen])


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table, and the line at which each begins; blank ones are left out."""
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.reader(stream)
        line = 1
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{table}, line {line}: {error}") from error


def _of_list(root: Path, name: str) -> Files:
    paths, labels = [], []
    with (root / name).open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            path, comma, label = line.strip().rpartition(",")
            label = label.strip()
            if not line.strip():
                continue
            if not (comma and path and "\0" not in path and label.isdecimal() and len(label) <= LABEL_DIGITS):
                raise UserError(
                    f"{root / name}, line {number}: {line.strip()[:80]!r}, expected a path relative to {root}, a comma "
                    f"and a label of at most {LABEL_DIGITS} digits; without {' and '.join(LISTS)} the class folders "
                    "are read"
                )
            paths.append(path)
            labels.append(int(label))
    return Files(root, paths, labels)


def _first(train: Files, test: Files, classes: int) -> tuple[Files, Files]:
    """Take the images of the first classes."""
    found, in_test = set(train.labels), set(test.labels)
    if found != in_test or len(found) != max(found, default=0) + 1:
        missing = (label for label in range(max(found, default=0) + 1) if label not in found)
        odd = sorted(found ^ in_test) or [*itertools.islice(missing, SHOWN)]
        raise UserError(
            f"{train.folder / LISTS[0]} and {LISTS[1]} are to have the same labels, 0 to classes - 1: look at label "
            f"{', '.join(map(str, odd[:SHOWN]))}"
        )
    _check_classes(len(found), classes)
    chosen = []
    for files in (train, test):
        rows = [(path, label) for path, label in zip(files.paths, files.labels, strict=True) if label < classes]
        chosen.append(Files(files.folder, [path for path, _ in rows], [label for _, label in rows]))
    return chosen[0], chosen[1]


def _check_classes(found: int, wanted: int) -> None:
    if wanted > found:
        raise UserError(f"dataset.classes={wanted} is more than there are: {found}")


def _nothing_found(root: Path) -> str:
    """Say what to do where there is no data set: unpack the archives that are there, or put one there."""
    missing = {name: tar for name, tar in TARS.items() if not (root / name).is_dir()}
    if any((root / tar).is_file() for tar in missing.values()):
        return (
            f"{root} has archives that are not unpacked: {unpacking(root, missing)} (unpacking val needs {DEVKIT} "
            "there too, to move its images into class folders)"
        )
    what = f"has no folder {' and no folder '.join(missing)}" if root.is_dir() else "is no folder"
    return (
        f"{root} {what}: expected train/<class>/ and val/<class>/ with the images of each class, or Kaggle's "
        f"{KAGGLE_FOLDER}/ and {KAGGLE_LABELS}, or {' and '.join(LISTS)} with path,label on each line"
    )


def unpacking(root: Path, folders: Collection[str] = ("train", "val")) -> str:
    """Return the commands, on one line, that unpack ImageNet's archives into train/<class>/ and val/<class>/.

    Args:
        root: the folder of the archives.
        folders: train, which is an archive of 1000 archives, or val, or both.
    """
    commands = [f"cd {shlex.quote(str(root))}"]
    if "train" in folders:
        tar = TARS["train"]
        commands.append(f"mkdir train && tar -xf {tar} -C train")
        commands.append("for t in train/*.tar; do mkdir ${t%.tar} && tar -xf $t -C ${t%.tar} && rm $t; done")
    if "val" in folders:
        commands.append("python -c \"import torchvision; torchvision.datasets.ImageNet('.', 'val')\"")
    return " && ".join(commands)
