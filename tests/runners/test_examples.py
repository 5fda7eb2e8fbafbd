"""The examples run as they are printed, on fewer and smaller images."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_cifar import publish

import runners
from runners import cli
from runners.data import cifar
from runners.errors import UserError
from runners.examples import cifar_as_files

EXAMPLES = Path(runners.__file__).parent / "examples"


def test_fine_tuning_without_a_network_starts_from_random_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    source = (EXAMPLES / "finetune_resnet50.py").read_text()
    assert len(source.splitlines()) < 40
    small = source.replace("STEPS, BATCH, SIZE = 60, 32, 64", "STEPS, BATCH, SIZE = 1, 8, 32")
    assert small != source
    torch.manual_seed(0)
    exec(compile(small, "finetune_resnet50.py", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert "random weights, since there is no network (no route to host)" in printed
    assert printed.count("ResNet, 4 bits, input [8, 3, 32, 32] float32") == 2
    assert "relative error of the gradient" in printed
    assert "test error" in printed


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a CIFAR-10 of 50 training and 10 test images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    publish("cifar10", tmp_path / "data", tmp_path / "archive.tar.gz", "", monkeypatch)
    return tmp_path / "data"


def test_cifar_becomes_files_with_its_pixels_and_labels(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "files"
    (tmp_path / ".files.killed.part").mkdir()
    cifar_as_files.write("cifar10", str(published), out, "png")
    splits = cifar.read(cifar_as_files.recipe("cifar10", str(published)))
    for split, (images, labels) in zip(("train", "val"), splits, strict=True):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            with Image.open(out / split / str(int(label)) / f"{number:05}.png") as found:
                assert np.array_equal(np.asarray(found), image.permute(1, 2, 0))
        assert len(list((out / split).glob("*/*"))) == len(labels)
    assert not list(tmp_path.glob(".files.*"))
    with pytest.raises(UserError, match=rf"^--out={out} is there already: remove it"):
        cifar_as_files.write("cifar10", str(published), out, "png")


def test_cifar_as_files_is_whole_or_not_there(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar_as_files.write("cifar10", str(published), tmp_path / "files", "jpg")
    assert not list(tmp_path.glob("*files*"))


def test_cifar_as_files_trains_from_the_command_line(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "files"
    given = ["cifar_as_files", "--root", str(published), "--out", str(out)]
    monkeypatch.setattr("sys.argv", given)
    cifar_as_files.main()
    assert "train: 100%" in capsys.readouterr().err
    small = ["depth=11", "width=0.25", "dataset.iterations=3", "dataset.batch_size=20", "task.evaluate_every=2"]
    small += ["dataset.workers=0", "gpu=cpu", "mode=exact", f"results={tmp_path / 'results'}"]
    assert cli.main(["dataset=cifar10-files", f"dataset.root={out}", *small]) == 0
    assert re.search(r"samples/s, \d+ % of the time waiting for images", capsys.readouterr().err)
    (metrics,) = (tmp_path / "results").glob("runs/*/metrics.csv")
    assert len(metrics.read_text().splitlines()) == 3
    with pytest.raises(SystemExit, match=r"^error: --out=.* is there already"):
        cifar_as_files.main()
