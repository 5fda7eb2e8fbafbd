"""Checkpoints are whole or absent, whatever happens to the process, the disk or the files."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import make

from runners import CONF
from runners.cells import overrides, task_settings
from runners.config import IMAGE_FILES, Config, DatasetConfig, GpuConfig, ModeConfig
from runners.errors import Busy, CannotWrite
from runners.run import locked
from runners.training.checkpoints import RunFolder, deciding_fields

CONFIGURATION = {"seed": 0, "dataset.schedule": [[0.5, 0.1], [1.0, 0.01]], "mode.bits": None}


def open_folder(path: Path) -> RunFolder:
    return RunFolder(path, CONFIGURATION)


def state(iteration: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1000,), float(iteration))}


def saved(path: Path, *iterations: int) -> list[Path]:
    folder = open_folder(path)
    return [folder.save(iteration, state(iteration)) for iteration in iterations]


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write fails half-way, as it does on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_checkpoint_is_read_back(tmp_path: Path) -> None:
    _, newest = saved(tmp_path, 9, 10)  # as text, 9 would come after 10
    found = open_folder(tmp_path).newest()
    assert found is not None
    file, content = found
    assert file == newest
    assert torch.equal(content["weight"], state(10)["weight"])


def test_an_empty_folder_has_no_checkpoint_and_nothing_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_folder(tmp_path / "new" / "folder").newest() is None
    assert capsys.readouterr().err == ""


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    files = saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == {file.name for file in files[1:]}
    resumed = open_folder(tmp_path)
    resumed.newest()
    fourth = resumed.save(4, state(4))
    assert names(tmp_path) == {files[2].name, fourth.name}


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    before, newest = saved(tmp_path, 5, 10)
    damage(newest)
    folder = open_folder(tmp_path)
    found = folder.newest()
    assert found is not None
    assert found[0] == before
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is damaged" in line
    again = folder.save(10, state(10))  # the damaged one goes when a good one has taken its place, not before
    assert names(tmp_path) == {before.name, again.name}


def test_where_none_is_good_the_run_starts_from_the_beginning_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in saved(tmp_path, 5, 10):
        truncate(file)
    assert open_folder(tmp_path).newest() is None
    *damaged, last = capsys.readouterr().err.splitlines()
    assert len(damaged) == 2
    assert "starting from the beginning" in last


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = saved(tmp_path, 5, 10)
    newest.unlink()
    newest.mkdir()  # the one way to make a file unreadable to root too
    found = open_folder(tmp_path).newest()
    assert found is not None
    assert found[0] == before
    assert f"{newest} cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration_is_refused_naming_the_fields(tmp_path: Path) -> None:
    (file,) = saved(tmp_path, 1)
    other = {"seed": 1, "dataset.schedule": [[0.5, 0.1], [1.0, 0.01]], "mode.bits": 4}
    with pytest.raises(ValueError) as caught:
        RunFolder(tmp_path, other).newest()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{file} belongs to another configuration: ")
    assert "seed is 0 there and 1 here, mode.bits is None there and 4 here; " in text
    assert "resume=false" in text
    assert "run=" in text


def test_removing_the_checkpoints_leaves_other_files(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint-notes.txt").touch()
    open_folder(tmp_path).remove_checkpoints()
    assert names(tmp_path) == {"checkpoint-notes.txt"}


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7-0123456789abcdef.pt.x1y2.part").touch()
    (tmp_path / "metrics.csv.x1y2.part").touch()
    (tmp_path / "other.part").touch()
    assert open_folder(tmp_path).newest() is None
    assert names(tmp_path) == {"other.part"}


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    before = folder.save(1, state(1))
    size = before.stat().st_size
    with full_disk(free_bytes=size // 2), pytest.raises(CannotWrite) as caught:
        folder.save(2, state(2))
    assert names(tmp_path) == {before.name}
    assert caught.value.exit_code != 0
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"cannot write {tmp_path}/checkpoint-2-")
    assert os.strerror(errno.EFBIG) in text
    assert f"{before.name} is kept" in text
    found = open_folder(tmp_path).newest()
    assert found is not None
    assert found[0] == before


def test_metrics_are_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write_metrics(("iteration", "loss"), [[1, 0.1 + 0.2]])
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "iteration,loss\n1,0.30000000000000004\n"
    with full_disk(free_bytes=10), pytest.raises(CannotWrite, match=r"metrics\.csv: .*; there is no checkpoint yet$"):
        folder.write_metrics(("iteration", "loss"), [[2, 0.5]])
    assert (tmp_path / "metrics.csv").read_text() == text
    assert names(tmp_path) == {"metrics.csv"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=rf"^cannot write into {tmp_path}/file/run: Not a directory$"):
        open_folder(tmp_path / "file" / "run")


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from runners.run import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        message = rf"^another process is working on {tmp_path}: name another folder by run=$"
        with pytest.raises(Busy, match=message), locked(tmp_path):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path):
            assert names(tmp_path) == {"lock"}
    with locked(tmp_path):  # and one that has left
        pass


def test_every_field_that_decides_the_result_is_listed_and_no_other() -> None:
    config = Config(
        dataset=DatasetConfig(
            name="digits", classes=10, image_size=8, image_channels=1, iterations=1, batch_size=1, schedule=[[1.0, 0.1]]
        ),
        mode=ModeConfig(name="4bit", layers="coded", bits=4),
        gpu=GpuConfig(name="cpu", kernels="torch"),
        task=task_settings("train"),
    )
    fields = deciding_fields(config)
    assert fields["dataset.schedule"] == [[1.0, 0.1]]
    assert fields["mode.bits"] == 4
    assert fields["gpu.kernels"] == "torch"
    elsewhere = {"dataset.root", "dataset.download", "gpu.name", "task.name", "task.checkpoint_every"}
    assert not elsewhere & fields.keys()
    others = {
        "gpu.device",
        "gpu.precision",
        "gpu.deterministic",
        "task.evaluate_every",
        "depth",
        "width",
        "seed",
        "mode.clip",
    }
    assert others <= fields.keys()


def test_checkpoints_from_before_image_files_belong_to_the_same_runs(tmp_path: Path) -> None:
    """The settings of image files are null for data sets in memory, as what is not there reads."""
    settings = deciding_fields(make())
    older = {key: value for key, value in settings.items() if key.removeprefix("dataset.") not in IMAGE_FILES}
    assert len(settings) - len(older) == len(IMAGE_FILES)
    RunFolder(tmp_path, older).save(1, {})
    assert RunFolder(tmp_path, settings).newest() is not None


def test_the_number_of_workers_decides_nothing() -> None:
    assert deciding_fields(make(dataset__workers=3)) == deciding_fields(make())
    assert overrides(make(dataset__workers=3)) == overrides(make())
