"""The Makefile's recipes that no other test runs."""

import subprocess
from pathlib import Path

import pytest

from blpa.config import CONF


@pytest.mark.parametrize(
    ("of_benches", "of_card", "said"),
    [(0, 0, 0), (1, 0, 1), (1, 3, 1), (0, 1, 1), (0, 3, 0), (3, 0, 0), (130, 0, 130)],
)
def test_make_gpu_bench_comes_to_the_card_after_a_failed_cell_and_tells_of_it(
    of_benches: int, of_card: int, said: int, tmp_path: Path
) -> None:
    """A stand-in for Python logs its arguments, and ends the two sweeps as it is told to."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/log
mkdir -p results/runs && touch results/records.csv
case "$*" in *bench-card*) exit {of_card};; *bench-kernels*) exit {of_benches};; esac
""")
    python.chmod(0o755)
    command = ["make", "-f", CONF.parents[1] / "Makefile", "gpu-bench", f"PYTHON={python}", "OUT=out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode != 0) == (said != 0), done.stderr
    assert f"Error {said}" in done.stderr or not said
    assert ("experiment=bench-card" in (tmp_path / "log").read_text()) == (of_benches <= 1)
    assert (tmp_path / "out/records.csv").exists()
    assert (tmp_path / "out/runs.tgz").exists()
