"""The Makefile's recipes that no other test runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from runners import CONF
from runners.config import options

MAKEFILE = CONF.parent / "Makefile"


def stand_in(tmp_path: Path, body: str = "") -> Path:
    """A Python that logs its arguments, a line a call."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n{body}')
    python.chmod(0o755)
    return python


def make(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-f", MAKEFILE, *arguments], cwd=tmp_path, capture_output=True, text=True)


def environment(tmp_path: Path) -> None:
    """What a target takes for an installed environment."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "installed").touch()


def variable(name: str) -> str:
    """What the Makefile makes of one of its variables."""
    done = subprocess.run(
        ["make", "-s", "-f", MAKEFILE, "-f", "-", "print"], input=f"print:\n\t@echo '$({name})'\n", cwd=CONF,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["BENCHES", "EXPERIMENTS_demo", "EXPERIMENTS_paper"])
def test_every_experiment_that_is_named_is_there(name: str) -> None:
    assert set(variable(name).split(",")) <= set(options("experiment"))


def test_strict_fp32_comes_last() -> None:
    benches = variable("BENCHES").split(",")
    assert all(bench.endswith("-fp32") for bench in benches[-4:])
    assert not any(bench.endswith("-fp32") for bench in benches[:-4])


def test_make_gpu_check_runs_the_check(tmp_path: Path) -> None:
    assert make(tmp_path, "gpu-check", f"PYTHON={stand_in(tmp_path)}").returncode == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "-m runners.gpu_check --out gpu-check"


def test_every_target_is_explained() -> None:
    targets = re.findall(r"^([a-z-]+):", MAKEFILE.read_text(), re.MULTILINE)
    done = subprocess.run(["make", "-s", "-f", MAKEFILE, "help"], cwd=CONF, capture_output=True, text=True, check=True)
    explained = [line.split()[1] for line in done.stdout.splitlines()]
    assert set(targets) - set(explained) == {"gpu-python"}


def test_an_unknown_profile_is_one_line(tmp_path: Path) -> None:
    done = make(tmp_path, "reproduce-tables", "PROFILE=papre", "-n")
    assert done.returncode == 2
    assert "PROFILE=papre is not allowed: choose demo or paper" in done.stderr


def test_imagenet_is_trained_on_only_where_its_folder_is_given(tmp_path: Path) -> None:
    environment(tmp_path)
    without = make(tmp_path, "reproduce-tables", "PROFILE=paper", "-n").stdout
    assert "imagenet-batches" in without and "table1-imagenet" not in without
    given = make(tmp_path, "reproduce-tables", "PROFILE=paper", "IMAGENET=/a b", "-n").stdout
    assert 'blpa-run experiment=table1-imagenet -m "dataset.root=/a b" || code=$?;' in given
    refused = make(tmp_path, "reproduce-tables", "IMAGENET=/a", "-n")
    assert "IMAGENET=/a needs PROFILE=paper" in refused.stderr


def test_image_files_are_written_once(tmp_path: Path) -> None:
    environment(tmp_path)
    assert "runners.examples.cifar_as_files --root data" in make(tmp_path, "image-files", "-n").stdout
    (tmp_path / "data" / "cifar10-files").mkdir(parents=True)
    os.utime(tmp_path / "data" / "cifar10-files", (0, 0))  # older than the environment
    again = make(tmp_path, "image-files", "-n").stdout
    assert "cifar_as_files" not in again and "experiment=image-files -m" in again


@pytest.mark.parametrize(
    ("target", "of_sweep"), [("gpu-bench", 0), ("gpu-bench", 3), ("train-table", 0), ("train-table", 3)]
)
def test_tables_are_printed_after_a_sweep_whatever_became_of_it(target: str, of_sweep: int, tmp_path: Path) -> None:
    python = stand_in(tmp_path, f'case "$*" in *experiment=*) exit {of_sweep};; esac\n')
    done = make(tmp_path, target, f"PYTHON={python}", "BUDGET_MINUTES=9")
    assert ("Error 3" in done.stderr) == (done.returncode != 0) == (of_sweep != 0)
    log = (tmp_path / "log").read_text()
    assert log.index("experiment=") < log.index("task=tables")
    assert ("budget_minutes=9" in log) == (target == "train-table")
