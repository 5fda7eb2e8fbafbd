"""A data folder is the user's: what is in it stays, whatever a download does, and other data have another name."""

import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cifar import publish, served
from support import composed, make

from blpa.kernels.reference import REFERENCE
from runners import cli
from runners.cells import command, recipe_changes, run_name
from runners.config import DatasetConfig
from runners.data import cifar, load
from runners.errors import UserError
from runners.tasks import max_batch, runtime
from runners.training.checkpoints import deciding_fields

# Older releases of torchvision unpack an archive (whose md5 they have checked) without naming tarfile's filter.
pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
CPU = torch.device("cpu")
BATCH = "data_batch_1"


@dataclass
class Published:
    """A small CIFAR-10: its folder, and an archive that can be downloaded."""

    folder: Path
    archive: Path

    @property
    def root(self) -> Path:
        return self.folder.parent

    def config(self, **values: Any) -> DatasetConfig:
        of_cifar = dict(name="cifar10", reader="runners.data.cifar", root=str(self.root), download=True)
        return DatasetConfig(
            **of_cifar | dict(classes=10, image_size=32, image_channels=3, iterations=7, batch_size=4,
                              schedule=[[1.0, 0.1]]) | values
        )  # fmt: skip


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    with served(tmp_path, monkeypatch) as url:
        archive = tmp_path / "archive.tar.gz"
        yield Published(publish("cifar10", tmp_path / "root", archive, url, monkeypatch), archive)


def files(folder: Path) -> dict[str, bytes | None]:
    """Every file, folder and link below a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(config: DatasetConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config, CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"dataset.root={config.root}: ")
    return text


def change_a_label(file: Path) -> int:
    """Change the first label of a file as somebody does who studies noisy labels, and return it."""
    entry = pickle.loads(file.read_bytes())
    entry["labels"][0] = (entry["labels"][0] + 1) % 10
    file.write_bytes(pickle.dumps(entry))
    return int(entry["labels"][0])


def test_a_label_changed_on_purpose(published: Published) -> None:
    change_a_label(published.folder / BATCH)
    before = files(published.root)
    text = refused(published.config())
    assert f"{published.folder / BATCH} is damaged or your own (its md5 is not " in text
    assert "dataset.version=NAME" in text
    assert files(published.root) == before


def test_a_label_changed_in_a_folder_that_lacks_a_file(published: Published) -> None:
    (published.folder / "data_batch_2").unlink()
    change_a_label(published.folder / "test_batch")
    before = files(published.root)
    assert f"{published.folder / 'test_batch'} is damaged or your own" in refused(published.config())
    assert files(published.root) == before


def test_own_files_are_used_as_they_are_where_they_have_a_name(published: Published) -> None:
    label = change_a_label(published.folder / BATCH)
    before = files(published.root)
    data = load(published.config(version="noisy"), CPU)
    assert data.train.labels[0] == label
    assert data.train.images.shape == (50, 3, 32, 32)
    assert files(published.root) == before


def test_results_of_own_files_have_their_name() -> None:
    own, other, usual = (
        composed(["depth=11", *version])[0] for version in (["dataset.version=noisy"], ["dataset.version=noisier"], [])
    )
    assert recipe_changes(own) == {"dataset.version": "noisy"}
    assert run_name(own) == "cifar10-noisy-4bit-depth11-width1-seed0"
    assert "dataset.version=noisy" in command(own)
    assert deciding_fields(own)["dataset.version"] == "noisy"
    assert len({run_name(own), run_name(other), run_name(usual)}) == 3
    assert not recipe_changes(usual)


def test_a_version_that_is_no_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset.version=my/own"]) in (1, 2)
    assert "dataset.version=my/own is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["noisy", "published"])
def test_own_files_without_the_names_of_the_classes(version: str, published: Published) -> None:
    """Only the published version has them, which nothing reads."""
    (published.folder / "batches.meta").unlink()
    config = published.config(version=version, download=False)
    if version == "published":
        assert f"{published.folder / 'batches.meta'} is missing" in refused(config)
    else:
        assert len(load(config, CPU).train.labels) == 50


def test_own_files_that_are_not_complete_are_not_downloaded(published: Published) -> None:
    (published.folder / BATCH).unlink()
    before = files(published.root)
    text = refused(published.config(version="noisy"))
    assert f"{published.folder / BATCH} is missing; dataset.version=noisy is your own: it is not downloaded" in text
    assert files(published.root) == before


@pytest.mark.parametrize(
    "content",
    [
        b"", b"labels,data\n1,2\n", pickle.dumps([1]), pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["cat", "dog"]}),
    ],
    ids=["empty", "text", "list", "no labels", "too few labels", "other size", "other type", "names"],
)  # fmt: skip
def test_own_files_that_are_made_otherwise_are_named(content: bytes, published: Published) -> None:
    (published.folder / BATCH).write_bytes(content)
    assert f"{published.folder / BATCH} cannot be read (" in refused(published.config(version="mine"))


def test_own_files_were_written_with_keys_of_bytes(published: Published) -> None:
    file = published.folder / BATCH
    entry = pickle.loads(file.read_bytes(), encoding="latin1")
    file.write_bytes(pickle.dumps({key.encode(): value for key, value in entry.items()}))
    found = load(published.config(version="mine"), CPU)
    assert found.train.labels[:10].tolist() == entry["labels"]


def test_own_labels_below_zero_are_named(published: Published) -> None:
    entry = pickle.loads((published.folder / BATCH).read_bytes())
    entry["labels"][0] = -1
    (published.folder / BATCH).write_bytes(pickle.dumps(entry))
    with pytest.raises(UserError, match=r"there are no images, or labels below 0"):
        load(published.config(version="mine"), CPU)


def test_the_digits_have_no_other_version() -> None:
    with pytest.raises(UserError, match=r"^dataset\.version=mine: the digits are scikit-learn's"):
        load(make(dataset__version="mine").dataset, CPU)


def test_a_data_set_of_another_name_with_the_reader_of_cifar(published: Published) -> None:
    with pytest.raises(UserError, match=r"dataset\.name=mine: runners\.data\.cifar reads cifar10 and cifar100$"):
        load(published.config(name="mine"), CPU)


# ---- downloads


def test_an_unpacking_that_was_interrupted_is_completed(published: Published) -> None:
    complete = files(published.root)
    present = published.folder / BATCH
    identity = present.stat().st_ino, present.stat().st_mtime_ns
    for name in ("data_batch_4", "test_batch", "batches.meta"):
        (published.folder / name).unlink()
    (published.folder / "notes.txt").write_text("mine")
    assert len(load(published.config(), CPU).train.labels) == 50
    assert files(published.root) == {**complete, "cifar-10-batches-py/notes.txt": b"mine"}
    assert (present.stat().st_ino, present.stat().st_mtime_ns) == identity


def test_a_download_leaves_the_data_and_nothing_else(published: Published, tmp_path: Path) -> None:
    complete = files(published.root)
    config = published.config(root=str(tmp_path / "new" / "folder"))
    assert len(load(config, CPU).train.labels) == 50
    assert files(tmp_path / "new" / "folder") == complete


def no_network(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar.SOURCES["cifar10"], "url", "http://127.0.0.1:1/archive.tar.gz")


def no_such_file(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.archive.unlink()


def half_an_archive(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.archive.write_bytes(published.archive.read_bytes()[:-500])


def half_an_archive_of_that_md5(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    half_an_archive(published, monkeypatch)
    monkeypatch.setattr(cifar.SOURCES["cifar10"], "tgz_md5", None)


def other_files(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar.SOURCES["cifar10"], "test_list", [["test_batch", "0" * 32]])


def an_interruption(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(url: str, folder: Path, *_: object) -> None:
        Path(folder, "cifar-10-python.tar.gz").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar, "download_and_extract_archive", interrupted)


@pytest.mark.parametrize(
    "failure", [no_network, no_such_file, half_an_archive, half_an_archive_of_that_md5, other_files, an_interruption]
)
@pytest.mark.parametrize("where", ["a new folder", "a folder that lacks a file"])
def test_a_download_that_fails_leaves_nothing_behind(
    failure: Callable[[Published, pytest.MonkeyPatch], None], where: str, published: Published, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (published.folder / "test_batch").unlink()
    failure(published, monkeypatch)
    before = files(tmp_path)
    root = published.root if where == "a folder that lacks a file" else tmp_path / "a" / "new" / "folder"
    if failure is an_interruption:
        with pytest.raises(KeyboardInterrupt):
            load(published.config(root=str(root)), CPU)
    else:
        assert "could not be downloaded" in refused(published.config(root=str(root)))
    assert files(tmp_path) == before


def test_an_archive_of_the_user_s_own_lies_there(published: Published) -> None:
    shutil.rmtree(published.folder)
    own = published.root / "cifar-10-python.tar.gz"
    own.write_bytes(b"my own")
    load(published.config(), CPU)
    assert own.read_bytes() == b"my own"


def test_the_published_archive_lies_there_and_there_is_no_network(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = files(published.root)
    shutil.rmtree(published.folder)
    no_network(published, monkeypatch)
    own = published.root / "cifar-10-python.tar.gz"
    own.write_bytes(published.archive.read_bytes())
    load(published.config(), CPU)
    assert files(published.root) == {**complete, own.name: published.archive.read_bytes()}


def test_a_folder_or_file_that_is_a_link_to_nothing(published: Published, tmp_path: Path) -> None:
    file = published.folder / BATCH
    file.unlink()
    file.symlink_to(tmp_path / "unmounted")
    assert f"{file} cannot be read (No such file or directory)" in refused(published.config())
    shutil.rmtree(published.folder)
    published.folder.symlink_to(tmp_path / "unmounted")
    assert f"{published.folder} is not a folder" in refused(published.config())
    assert published.folder.is_symlink()


def test_a_folder_that_is_a_link_is_completed_where_it_is(published: Published, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    published.folder.rename(elsewhere)
    published.folder.symlink_to(elsewhere)
    complete = files(elsewhere)
    (elsewhere / BATCH).unlink()
    load(published.config(), CPU)
    assert published.folder.is_symlink()
    assert files(elsewhere) == complete


def test_a_good_folder_is_only_read(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError

    for module, name in ((os, "mkdir"), (os, "unlink"), (cifar.tempfile, "TemporaryDirectory"), (cifar.locks, "held")):
        monkeypatch.setattr(module, name, forbidden)
    assert len(load(published.config(), CPU).test.labels) == 10


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_download_that_was_killed(published: Published, tmp_path: Path) -> None:
    """What it leaves is not taken for data, and the next download removes it."""

    def killed(url: str, archive_folder: str, unpacked: str, *_: object) -> None:
        half = Path(unpacked, "cifar-10-batches-py")
        half.mkdir()
        (half / BATCH).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    complete = files(published.root)
    root = tmp_path / "new"
    child = os.fork()
    if not child:
        cifar.download_and_extract_archive = killed
        cifar.read(published.config(root=str(root)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = files(root)
    assert any(name.endswith("/cifar-10-batches-py/data_batch_1") for name in left)
    assert "there is no folder" in refused(published.config(root=str(root), download=False))
    assert files(root) == left
    load(published.config(root=str(root)), CPU)
    assert files(root) == complete


# ---- batches beyond the data


@pytest.mark.parametrize(("gib", "remarks"), [(0.6, 0), (2, 1)])
def test_a_largest_batch_that_no_training_can_use(
    gib: float, remarks: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["dataset=digits", "depth=29", "mode=exact", "gpu=cpu", f"gpu.memory_gib={gib}"]
    assert cli.main([*arguments, "task=max-batch"]) == 0
    (config,) = composed([*arguments, "task=runtime", "task.largest_batch=true"])
    batch, _ = runtime._largest_batch(config, REFERENCE, CPU)
    said = [line for line in capsys.readouterr().err.splitlines() if "training images" in line]
    assert said == 2 * remarks * [f"batch {batch} is more than the 1297 training images of digits"]


def test_a_largest_batch_for_own_files_of_a_size_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    for version, remarks in (("published", 1), ("mine", 0)):
        max_batch.remark_on_data(make(dataset__version=version, dataset__train_images=100), 101)
        assert capsys.readouterr().err.count("\n") == remarks


def test_the_number_of_training_images_is_that_of_the_data() -> None:
    (config,) = composed(["dataset=digits", "depth=11"])
    assert config.dataset.train_images == len(load(config.dataset, CPU).train.labels)
