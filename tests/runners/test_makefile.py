"""The Makefile's recipes that no other test runs."""

import subprocess
import sys
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
    assert all(bench.endswith("-fp32") for bench in benches[-3:])
    assert not any(bench.endswith("-fp32") for bench in benches[:-3])


def test_make_gpu_check_runs_the_check(tmp_path: Path) -> None:
    assert make(tmp_path, "gpu-check", f"PYTHON={stand_in(tmp_path)}", "OUT=out").returncode == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "-m runners.gpu_check --out out"


@pytest.mark.parametrize(("of_quick", "of_others", "is_good"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_make_gpu_test_runs_quick_tests_first_and_the_others_all_the_same(
    of_quick: int, of_others: int, is_good: bool, tmp_path: Path
) -> None:
    python = stand_in(
        tmp_path, f'case "$*" in *"not ("*) exit {of_others};; *gpu-test-quick.xml*) exit {of_quick};; esac\n'
    )
    done = make(tmp_path, "gpu-test", f"PYTHON={python}", "OUT=out")
    assert (done.returncode == 0) == is_good
    quick, others = (line for line in (tmp_path / "log").read_text().splitlines() if "-m pytest" in line)
    assert "-k captured_run or" in quick
    assert "-k not (captured_run or" in others


def test_quick_tests_are_some_of_those_for_a_gpu() -> None:
    files = variable("GPU_TESTS").split()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files, "-k"]
    counts = []
    for words in (variable("GPU_QUICK"), f"not ({variable('GPU_QUICK')})"):
        done = subprocess.run([*command, words], cwd=MAKEFILE.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        counts.append(done.stdout.count("::test_"))
    assert 0 < 4 * counts[0] < counts[1]


def test_make_train_table_names_the_experiment_and_leaves_its_jobs_unless_told(tmp_path: Path) -> None:
    python = stand_in(tmp_path)
    assert make(tmp_path, "train-table", f"PYTHON={python}", "OUT=out").returncode == 0
    assert make(tmp_path, "train-table", f"PYTHON={python}", "EXPERIMENT=table1-quarter", "JOBS=3").returncode == 0
    sweeps = [line for line in (tmp_path / "log").read_text().splitlines() if " -m budget_minutes" in line]
    assert [line.split("-m runners.cli ")[1].split() for line in sweeps] == [
        ["results=out", "experiment=table1", "-m", "budget_minutes=8.5"],
        ["results=gpu-out", "experiment=table1-quarter", "-m", "budget_minutes=8.5", "jobs=3"],
    ]


@pytest.mark.parametrize(
    ("of_benches", "of_card", "said"),
    [(0, 0, 0), (1, 0, 1), (1, 3, 1), (0, 1, 1), (0, 3, 0), (3, 0, 0), (130, 0, 130)],
)
def test_make_gpu_bench_comes_to_the_card_after_a_failed_cell_and_tells_of_it(
    of_benches: int, of_card: int, said: int, tmp_path: Path
) -> None:
    """The stand-in ends the two sweeps as it is told to."""
    python = stand_in(
        tmp_path,
        f"""\
mkdir -p results/runs && touch results/records.csv
case "$*" in *bench-card*) exit {of_card};; *bench-kernels*) exit {of_benches};; esac
""",
    )
    done = make(tmp_path, "gpu-bench", f"PYTHON={python}", "OUT=out")
    assert (done.returncode != 0) == (said != 0), done.stderr
    assert f"Error {said}" in done.stderr or not said
    assert ("experiment=bench-card" in (tmp_path / "log").read_text()) == (of_benches <= 1)
    assert (tmp_path / "out/records.csv").exists()
    assert (tmp_path / "out/runs.tgz").exists()
