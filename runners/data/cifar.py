"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the published files, by their md5, or a version of the user's own.

A file that is there is never changed. Missing ones are downloaded by torchvision into a temporary folder beside,
checked there and moved, so a download that fails or is killed leaves no half of them.
"""

import contextlib
import itertools
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, check_md5, download_and_extract_archive

from runners import locks
from runners.config import PUBLISHED, DatasetConfig
from runners.errors import UserError

SOURCES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
"""torchvision's classes, which have address, names and md5s of the files."""


def read(config: DatasetConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read CIFAR-10 or CIFAR-100, after a download if needed and allowed; a good folder needs no network.

    Args:
        config: `name` is cifar10 or cifar100; `root` is the folder of cifar-10-batches-py or cifar-100-python;
            `version` is published, or the name of the user's own files, which are unpickled as they are; `download`
            allows fetching missing files of the published version.

    Returns:
        Training (50,000) and test set (10,000): images uint8 [N, 3, 32, 32], labels int64 [N]; CIFAR-100's fine labels.

    Raises:
        UserError: a file differs from the published one, or is missing and was not downloaded, or cannot be read.
    """
    source = SOURCES.get(config.name)
    if source is None:
        raise UserError(f"dataset.name={config.name}: runners.data.cifar reads {' and '.join(SOURCES)}")
    folder = Path(config.root) / source.base_folder
    parts = [[name for name, _ in files] for files in (source.train_list, source.test_list)]
    try:
        if config.version == PUBLISHED:
            _check_published(source, folder, config)
        elif gap := find_gap(folder, itertools.chain(*parts)):
            raise UserError(f"{gap}; dataset.version={config.version} is your own: it is not downloaded")
        train, test = (_split(folder, names) for names in parts)
    except UserError as error:
        raise UserError(f"dataset.root={config.root}: {error}") from error.__cause__
    return train, test


def class_names(config: DatasetConfig) -> list[str]:
    """Return the names of the classes, in the order of their labels; `read` has read the files.

    Raises:
        UserError: the file of the names cannot be read.
    """
    source = SOURCES[config.name]
    file = Path(config.root, source.base_folder, source.meta["filename"])
    try:
        with file.open("rb") as stream:
            return list(pickle.load(stream, encoding="latin1")[source.meta["key"]])
    except Exception as error:  # as in _split
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def _check_published(source: type[datasets.CIFAR10], folder: Path, config: DatasetConfig) -> None:
    """Check that the files are those published, after a download of missing ones if that is allowed."""
    if difference := find_difference(source, folder):
        raise UserError(
            f"{difference}: remove it to have it downloaded, or give your own files a name of your choice, "
            "dataset.version=NAME, and they are used as they are"
        )
    if not (gap := find_gap(folder, _files(source))):
        return
    advice = f"set dataset.root to the folder that holds {source.base_folder}"
    if not config.download:
        raise UserError(f"{gap}; {advice}, or dataset.download=true to fetch it")
    try:
        place = folder.resolve()  # on one file system with what is moved there
        with _made(place.parent), _locked(place.parent / f".{config.name}.lock"):  # one run of a sweep downloads
            if find_gap(place, _files(source)):
                _download(source, place)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is a response, with its connection
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{gap}, and {source.url} could not be downloaded into it ({reason}); {advice}, or try again where there "
            "is a network"
        ) from error


def find_gap(folder: Path, names: Iterable[str]) -> str | None:
    """Return the first thing that is not there, in words; None where every file is."""
    if not os.path.lexists(folder):
        return f"there is no folder {folder}"
    missing = (folder / name for name in names if not os.path.lexists(folder / name))
    return next((f"{file} is missing" for file in missing), None)


def find_difference(source: type[datasets.CIFAR10], folder: Path) -> str | None:
    """Return the first thing that is there and is not as published, in words; None where there is no such thing."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return f"{folder} is not a folder"
    for name, md5 in _files(source).items():
        file = folder / name
        if not os.path.lexists(file):
            continue
        try:
            good = check_md5(file, md5)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if not good:
            return f"{file} is damaged or your own (its md5 is not {md5})"
    return None


def _files(source: type[datasets.CIFAR10]) -> dict[str, str]:
    """Return the md5 of each file by its name."""
    return dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])


def _download(source: type[datasets.CIFAR10], folder: Path) -> None:
    """Download the archive, unless it lies beside, and add the files that the folder lacks; the caller has the lock."""
    beside = f".{source.base_folder}."
    for left in folder.parent.glob(f"{beside}*.part"):  # by a killed process
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=beside, suffix=".part") as temporary:
        has_archive = check_integrity(folder.parent / source.filename, source.tgz_md5)
        archive_folder = folder.parent if has_archive else temporary
        download_and_extract_archive(source.url, archive_folder, temporary, source.filename, source.tgz_md5)
        unpacked = Path(temporary, source.base_folder)
        if problem := find_gap(unpacked, _files(source)) or find_difference(source, unpacked):
            raise RuntimeError(f"{problem}, also after the download")
        if not folder.exists():
            unpacked.rename(folder)
            return
        for name in _files(source):
            if not os.path.lexists(folder / name):
                (unpacked / name).rename(folder / name)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; what was made of it goes again where the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not made, or used by another process by now
                path.rmdir()
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    busy = f"another process is downloading into {file.parent}"
    with locks.held(file, seconds=3600, busy=busy):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps a file that another process waits for
                file.unlink()


def _split(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read the images and labels of some files.

    Raises:
        UserError: a file is not as the published ones are made.
    """
    images, labels = [], []
    for name in names:
        try:
            with open(folder / name, "rb") as stream:
                loaded = pickle.load(stream, encoding="latin1")
            # Python 3 programs that read the published files by encoding="bytes" write such keys.
            entry = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
            data = np.asarray(entry["data"])
            images.append(torch.from_numpy(data.reshape(-1, 3, 32, 32)))
            labels.append(torch.tensor(entry["labels" if "labels" in entry else "fine_labels"], dtype=torch.int64))
            if data.dtype != np.uint8 or labels[-1].shape != images[-1].shape[:1]:
                raise ValueError("data is not uint8 [N, 3072] with N labels")
        except Exception as error:  # unpickling raises whatever the bytes lead to
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / name} cannot be read ({type(error).__name__}: {reason})") from error
    return torch.cat(images), torch.cat(labels)
