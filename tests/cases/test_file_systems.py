"""File systems that cannot lock, sync or set permissions, and names that are too long for them."""

import errno
import fcntl
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLock
from support import TINY, make

from runners import cli, locks, records
from runners.data import cifar
from runners.errors import Busy, CannotWrite, UserError
from runners.files import write_whole
from runners.run import locked
from runners.training.checkpoints import RunFolder

ALONE = [argument for argument in TINY if argument != "-m"] + ["mode=exact", "gpu.kernels=torch"]
OWNER = Path("results/runs/digits-exact-depth11-width0.25-seed0/lock.owner")
ANOTHER_HOST = "4242\nnode7\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file system without flock answers with this error."""
    number: int = getattr(request, "param", errno.ENOLCK)

    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    return number


@pytest.fixture
def dead() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def owner_of(file: Path, pid: int) -> None:
    """Write what filelock writes into a lock of this host, with another pid."""
    with SoftFileLock(file):
        _, *rest = file.read_text().splitlines()
    file.write_text("\n".join([str(pid), *rest[:1], ""]))


@pytest.mark.parametrize("no_flock", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], indirect=True, ids=os.strerror)
def test_trained_on_a_file_system_without_flock(no_flock: int, capsys: pytest.CaptureFixture[str]) -> None:
    OWNER.parent.mkdir(parents=True)
    OWNER.with_name("lock").touch()  # what a system with flock leaves, copied from there
    assert cli.main(ALONE) == 0
    assert cli.main(["task=tables"]) == 0
    assert records.merge(Path("results"))
    assert not list(Path("results").rglob("*.owner"))
    assert "error:" not in capsys.readouterr().err


@pytest.mark.usefixtures("no_flock")
def test_a_second_process_without_flock() -> None:
    with locked(OWNER.parent):
        message = (
            rf"name another folder by run=; {OWNER} names process {os.getpid()} on \S*{socket.gethostname()}\S* since"
        )
        with pytest.raises(Busy, match=message), locked(OWNER.parent):
            pass


@pytest.mark.usefixtures("no_flock")
def test_killed_without_flock_and_started_again(dead: int) -> None:
    OWNER.parent.mkdir(parents=True)
    owner_of(OWNER, dead)
    assert cli.main(ALONE) == 0
    assert not OWNER.exists()


@pytest.mark.usefixtures("no_flock")
def test_killed_on_another_host_without_flock(capsys: pytest.CaptureFixture[str]) -> None:
    OWNER.parent.mkdir(parents=True)
    OWNER.write_text(ANOTHER_HOST)
    since = time.mktime((2026, 11, 20, 10, 0, 0, 0, 0, -1))
    os.utime(OWNER, (since, since))
    told = f"{OWNER} names process 4242 on node7 since 2026-11-20 10:00:00: remove it if that process has ended\n"
    assert cli.main(ALONE) == Busy.exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"blpa-run: error: another process is working on {OWNER.parent}: name another folder by ")
    assert error.endswith(told)
    assert error.count("\n") == 1
    assert cli.main([*ALONE, "-m"]) == 0
    assert told in (error := capsys.readouterr().err)
    assert "1 under way in other processes" in error
    assert [*OWNER.parent.iterdir()] == [OWNER]
    OWNER.unlink()
    assert cli.main(ALONE) == 0


@pytest.mark.usefixtures("no_flock")
def test_tables_whose_writer_was_killed_on_another_host() -> None:
    file = Path("lock.owner")
    file.write_text(ANOTHER_HOST)
    with (
        pytest.raises(Busy, match=r"^x; lock\.owner names process 4242 on node7"),
        locks.held(Path("lock"), seconds=0.1, busy="x"),
    ):
        pass
    assert file.read_text() == ANOTHER_HOST


@pytest.mark.usefixtures("no_flock")
def test_a_lock_that_passes_from_host_to_host_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("lock.owner")
    file.write_text(ANOTHER_HOST)
    owners: Iterator[str] = iter(["7\nnode8\n", "7\nnode9\n", ""])
    acquire = SoftFileLock.acquire

    def acquired_late(self: SoftFileLock, **options: Any) -> object:
        if owner := next(owners, ""):
            file.write_text(owner)
        else:
            file.unlink(missing_ok=True)
        return acquire(self, timeout=0)

    monkeypatch.setattr(SoftFileLock, "acquire", acquired_late)
    with locks.held(Path("lock"), seconds=60, busy="x"):
        assert file.read_text().startswith(f"{os.getpid()}\n")


@pytest.mark.usefixtures("no_flock")
def test_a_download_that_another_host_began(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".cifar10.lock.owner").write_text(ANOTHER_HOST)
    acquire = SoftFileLock.acquire
    monkeypatch.setattr(SoftFileLock, "acquire", lambda self, **options: acquire(self, timeout=0))
    config = make(dataset__name="cifar10", dataset__root=".", dataset__download=True).dataset
    with pytest.raises(
        UserError, match=r"another process is downloading into .*; .*/\.cifar10\.lock\.owner names proc"
    ):
        cifar.read(config)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF], ids=os.strerror)
def test_a_file_system_that_cannot_sync_folders(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_for_folders(os.fsync, number))
    assert cli.main(ALONE) == 0


def test_a_disk_that_fails_at_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_for_folders(os.fsync, errno.EIO))
    with pytest.raises(CannotWrite, match="Input/output error; there is no checkpoint yet"):
        RunFolder(tmp_path, {}).save(1, {})


def failing_for_folders(fsync: Any, number: int) -> Any:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return sync


def test_a_file_system_without_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", chmod)
    monkeypatch.setattr(os, "fchmod", chmod)
    assert cli.main(ALONE) == 0


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_results_have_the_permissions_that_the_user_s_other_files_have(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", "content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_name_that_is_too_long_for_the_file_system(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 300
    for arguments in (
        [*ALONE, f"results={name}"],
        [*ALONE, f"results={name}", "-m"],
        ["task=tables", f"results={name}"],
        [f"--config-dir={name}", "task=tables"],
    ):
        assert cli.main(arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("blpa-run: error: ")
        assert name in last
        assert "File name too long" in last


def test_a_results_folder_that_was_removed_during_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    write = records.write

    def after_removal(written: Any, run_dir: Path) -> None:
        for file in run_dir.iterdir():
            file.unlink()
        run_dir.rmdir()
        write(written, run_dir)

    monkeypatch.setattr(records, "write", after_removal)
    assert cli.main(ALONE) == 0
    assert [file.name for file in OWNER.parent.iterdir()] == ["records.json"]
