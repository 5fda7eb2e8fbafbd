"""The wheel and the source distribution: what is in them, and that they run in an empty folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from runners import CONF

CHECKOUT = CONF.parent
OURS = {file.relative_to(CHECKOUT) for room in ("blpa", "runners", "conf") for file in CHECKOUT.glob(f"{room}/**/*")}


def run(*command: str | Path, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; Python finds packages in `path` before any other place."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(checkout: Path, target: str, out: Path) -> Path:
    """Build a distribution by the backend that pyproject.toml names, which needs no network."""
    done = run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, folder=checkout)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_both_packages_and_the_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path for path in OURS if path.suffix in (".py", ".cpp", ".h", ".yaml", ".typed", ".j2")}
    assert {"runners/" + str(path) if path.parts[0] == "conf" else str(path) for path in expected} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"blpa", "runners"}


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build(CHECKOUT, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    again = build(tmp_path / archive.name.removesuffix(".tar.gz"), "wheel", tmp_path / "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_installed_command_finds_its_configuration_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    assert run(sys.executable, *install, folder=tmp_path).returncode == 0
    command = [sys.executable, site / "bin" / "blpa-run", "mode=exact", "depth=1001", "--cfg", "job"]
    done = run(*command, folder=empty, path=site)
    assert "run: cifar10-exact-depth1001-width1-seed0" in done.stdout, done.stderr
    where = "import runners; from importlib.util import find_spec; print(runners.CONF, find_spec('blpa').origin)"
    done = run(sys.executable, "-c", where, folder=empty, path=site)
    assert done.stdout.split() == [str(site / "runners" / "conf"), str(site / "blpa" / "__init__.py")]
    assert list(empty.iterdir()) == []
