"""Sweeps from the command line: what is skipped, what fails, what is left behind; and many writers at once."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_records import RECORD

from blpa import records
from blpa.config import CONF, Config
from blpa.runners import cli, train

TINY = ["dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "dataset.iterations=1", "gpu=cpu", "-m"]
GRADIENTS = [*TINY, "task=gradient-error", "task.steps=1", "gpu.kernels=torch"]
RUN = "digits-{}-depth11-width0.25-seed0"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record_files() -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in Path("results/runs").glob("*/records.json")}


def test_finished_cells_are_skipped_and_resume_false_does_them_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0
    first = record_files()
    assert cli.main([*TINY, "mode=exact,4bit,8bit"]) == 0
    assert {name: record_files()[name] for name in first} == first
    assert len(record_files()) == 3
    err = capsys.readouterr().err
    assert "[3/3] digits-8bit-depth11-width0.25-seed0 (2 finished before" in err
    assert "3 cells: 1 done, 2 finished before (resume=false does them again), 0 failed" in err
    assert cli.main([*TINY, "mode=exact,4bit,8bit", "resume=false"]) == 0
    assert all(record_files()[name] > first[name] for name in first)


def test_a_cell_of_another_configuration_is_not_finished(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRADIENTS, "mode=2bit,4bit"]) == 0
    first = record_files()
    assert cli.main([*GRADIENTS, "mode=2bit,4bit", "mode.clip=2"]) == 0
    assert all(record_files()[name] > first[name] for name in first)


def test_one_run_on_its_own_always_runs() -> None:
    alone = [argument for argument in GRADIENTS if argument != "-m"] + ["mode=4bit"]
    assert cli.main(alone) == 0
    first = record_files()
    assert cli.main(alone) == 0
    assert record_files() != first


def test_a_failed_cell_is_recorded_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRADIENTS, "mode=fewer-features,4bit"]) == 1
    folder = RUN.format("fewer-features") + "-gradient-error-batch4"
    (failed,) = records.read(Path("results/runs") / folder / "records.json")
    assert (failed.metric, failed.unit, failed.mode, failed.n) == ("failed", "s", "fewer-features", 1)
    assert failed.failure.startswith("mode=fewer-features: its layers are of another width than exact's")
    assert len(records.collect(Path("results"))) == 1 + 3
    assert "2 cells: 1 done, 0 finished before (resume=false does them again), 1 failed" in capsys.readouterr().err


def test_a_bug_in_one_cell_shows_its_traceback_and_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train.run

    def run(config: Config) -> list[records.Record]:
        if config.mode.name == "exact":
            raise ZeroDivisionError("of the test's own")
        return whole(config)

    monkeypatch.setattr(train, "run", run)
    assert cli.main([*TINY, "mode=exact,4bit"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "blpa-run: error: ZeroDivisionError: of the test's own" in err
    results = Path("results")
    assert {(r.mode, r.failure) for r in records.collect(results) if r.failure} == {
        ("exact", "ZeroDivisionError: of the test's own")
    }
    monkeypatch.setattr(train, "run", whole)
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0  # what failed is tried again
    assert not [record for record in records.collect(results) if record.failure]


def test_a_failure_does_not_take_the_place_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0
    before = records.collect(Path("results"))
    monkeypatch.setattr(train, "run", lambda config: 1 / 0)
    assert cli.main([*TINY, "mode=exact,4bit", "resume=false"]) == 1
    assert records.collect(Path("results")) == before


WRITER = """
import random, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_records import RECORD
from blpa import records
results, seed = Path("results"), int(sys.argv[2])
write_table = records.write_table
def slow(*table):  # between reading and writing, so that whoever does not wait writes a table that is out of date
    time.sleep(random.random() / 10)
    write_table(*table)
records.write_table = slow
for metric in ("first", "second", "third"):
    written = [replace(RECORD, seed=seed, metric=metric, note=str(k)) for k in range(50)]
    records.write(written, results / "runs" / f"{metric}-{seed}")
    found = records.collect(results)
    assert [r for r in found if r.seed == seed and r.metric == metric] == sorted(written, key=lambda r: r.note)
"""


def test_sixteen_processes_that_write_and_collect_at_once_lose_nothing() -> None:
    """Each writes three runs and merges the table after each; the table then holds every record of every process."""
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent)]
    environment = {"PYTHONPATH": str(CONF.parents[1])}
    writers = [
        subprocess.Popen([*command, str(seed)], env=environment, stderr=subprocess.PIPE, text=True)
        for seed in range(16)
    ]
    assert [writer.communicate()[1] for writer in writers] == [""] * 16
    assert [writer.returncode for writer in writers] == [0] * 16
    table = Path("results/records.csv").read_text().splitlines()
    assert len(table) == 1 + 16 * 3 * 50
    assert {(r.seed, r.metric) for r in records.merged(Path("results"))} == {
        (seed, metric) for seed in range(16) for metric in ("first", "second", "third")
    }
    assert replace(RECORD, seed=15, metric="third", note="49") in records.merged(Path("results"))


def test_the_largest_batch_that_was_found_is_what_runtime_takes(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["dataset=digits", "depth=11", "width=0.25", "gpu=cpu", "gpu.memory_gib=0.502"]
    timing = [*small, "task=runtime", "task.largest_batch=true", "task.steps=2", "gpu.kernels=torch", "mode=4bit"]
    assert cli.main(timing) == 1
    assert capsys.readouterr().err.endswith(
        "none has been found yet; blpa-run task=max-batch mode=4bit depth=11 width=0.25 gpu=cpu finds it\n"
    )
    assert cli.main([*small, "task=max-batch", "mode=exact,4bit", "-m"]) == 0
    largest = {r.mode: r.value for r in records.merged(Path("results")) if r.metric == "largest_batch"}
    assert cli.main(timing) == 0
    timed = [r for r in records.merged(Path("results")) if r.task == "runtime"]
    assert {(r.metric, r.batch_size, r.note) for r in timed} == {
        (metric, largest["4bit"], "largest batch in 0.502 GiB less 512 MiB")
        for metric in ("seconds_per_sample", "ratio_to_exact")
    }
    assert "exact: " in (out := capsys.readouterr().out) and f"batch {largest['exact']:.0f}" in out
