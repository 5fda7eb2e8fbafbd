"""A small data set in CIFAR's layout, and an archive of it that this machine serves to itself."""

import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runners.data import cifar


def write_batch(file: Path, rng: np.random.Generator, count: int, key: str) -> None:
    entry = {"data": rng.integers(256, size=(count, 3072), dtype=np.uint8), key: rng.permutation(10)[:count].tolist()}
    file.write_bytes(pickle.dumps(entry))


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Leave stderr to the code under test."""

    def copyfile(self, *args: Any) -> None:
        """Send the file; torchvision also asks for it to see its address, and hangs up."""
        with suppress(ConnectionError):
            super().copyfile(*args)


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address under which this machine serves a folder to itself."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def publish(name: str, root: Path, archive: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ten images a file the published cifar10 or cifar100, with an archive; return their folder under `root`."""
    original: Any = cifar.SOURCES[name]
    rng, folder = np.random.default_rng(0), root / original.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for file, _ in [*original.train_list, *original.test_list]:
        write_batch(folder / file, rng, 10, key)
    (folder / original.meta["filename"]).write_bytes(pickle.dumps({original.meta["key"]: [str(i) for i in range(10)]}))
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=original.base_folder)

    attributes = {
        "train_list": [[file, md5(folder / file)] for file, _ in original.train_list],
        "test_list": [[file, md5(folder / file)] for file, _ in original.test_list],
        "meta": {**original.meta, "md5": md5(folder / original.meta["filename"])},
        "url": f"{url}/{archive.name}",
        "tgz_md5": md5(archive),
    }
    monkeypatch.setitem(cifar.SOURCES, name, type("Small", (original,), attributes))
    return folder
