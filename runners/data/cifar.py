"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read and downloaded by torchvision, which checks the md5 of every file.

torchvision has one message for every bad folder, and a traceback without a network. Here the folder is checked first,
so that the message names the file and the remedy.
"""

import os
import tarfile
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_md5, download_and_extract_archive

from runners.config import DatasetConfig
from runners.errors import UserError

SOURCES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def read(config: DatasetConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read CIFAR-10 or CIFAR-100, after a download if needed and allowed; a good folder needs no network.

    Args:
        config: `name` is cifar10 or cifar100; `root` is the folder of cifar-10-batches-py or cifar-100-python;
            `download` allows fetching missing or damaged files.

    Returns:
        Training (50,000) and test set (10,000): images uint8 [N, 3, 32, 32], labels int64 [N]; CIFAR-100's fine labels.

    Raises:
        UserError: the folder is missing, incomplete or damaged, and the download failed or was not allowed.
    """
    name, root = config.name, config.root
    source = SOURCES[name]
    folder = Path(root) / source.base_folder
    problem = find_problem(source, folder)
    advice = f"set dataset.root to the folder that holds {source.base_folder}"
    if problem and not config.download:
        raise UserError(f"dataset.root={root}: {problem}; {advice}, or dataset.download=true to fetch it")
    if problem:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{name}.lock"):  # one run of a sweep downloads for all
                if find_problem(source, folder):
                    download_and_extract_archive(
                        source.url, str(folder.parent), filename=source.filename, md5=source.tgz_md5
                    )
        except (OSError, RuntimeError, HTTPException, tarfile.TarError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"dataset.root={root}: {problem}, and {source.url} could not be downloaded into it ({reason}); "
                f"{advice}, or try again with dataset.download=true where there is a network"
            ) from None
        if problem := find_problem(source, folder):
            raise UserError(f"dataset.root={root}: {problem}, also after the download; {advice}")

    train, test = (source(folder.parent, train=train) for train in (True, False))
    return _tensors(train), _tensors(test)


def find_problem(source: type[datasets.CIFAR10], folder: Path) -> str | None:
    """Check a folder for missing and damaged files.

    Args:
        source: torchvision's class, which has the names and md5s of the files.
        folder: the folder of the files.

    Returns:
        The first problem, naming the folder or the file; None where the folder is good.
    """
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    for name, md5 in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
        file = folder / name
        if not os.path.isfile(file):
            return f"{file} is missing"
        try:
            good = check_md5(file, md5)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if not good:
            return f"{file} is damaged (its md5 is not {md5})"
    return None


def _tensors(split: datasets.CIFAR10) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)
