"""Sweeps from the command line: what is skipped, what fails, what is left behind; and many writers at once."""

import csv
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import GRADIENTS, TINY, composed
from test_records import RECORD

from runners import CONF, cli, records, sweep
from runners import run as run_module
from runners.cells import overrides
from runners.config import Config
from runners.errors import Busy, Diverged, OutOfTime
from runners.run import locked
from runners.tasks import train

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
    assert "[1/1] digits-8bit-depth11-width0.25-seed0 (" in err
    assert "3 cells: 1 done, 2 finished before (resume=false does them again), 0 failed" in err
    assert cli.main([*TINY, "mode=exact,4bit,8bit", "resume=false"]) == 0
    assert all(record_files()[name] > first[name] for name in first)


def test_a_sweep_of_one_cell_skips_it_too_whatever_was_asked_of_its_checkpoints() -> None:
    assert cli.main([*TINY, "mode=exact", "task.checkpoint_every=5"]) == 0
    first = record_files()
    assert cli.main([*TINY, "mode=exact", "task.checkpoint_every=7", "task.keep_every=1"]) == 0
    assert record_files() == first


def test_values_from_the_command_line_keep_the_experiment_s_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experiment=table1", "mode=exact,4bit", "seed=1,0", "width=1,2", "-m", "--cfg=job"]) == 0
    cells = yaml.safe_load_all(capsys.readouterr().out)
    order = [(cell["width"], cell["seed"], cell["dataset"]["name"], cell["mode"]["name"]) for cell in cells]
    assert order == [
        (width, seed, dataset, mode)
        for width in (1, 2)
        for seed in (1, 0)
        for dataset in ("cifar10", "cifar100")
        for mode in ("exact", "4bit")
    ]


def test_one_run_on_its_own_always_runs() -> None:
    alone = [argument for argument in GRADIENTS if argument != "-m"] + ["mode=4bit"]
    assert cli.main(alone) == 0
    first = record_files()
    assert cli.main(alone) == 0
    assert record_files() != first


def test_a_failed_cell_is_recorded_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRADIENTS, "mode=fewer-features,4bit"]) == 1
    folder = RUN.format("fewer-features") + "-gradient-error-batch4"
    (failed,) = records.read(Path("results/runs") / folder / "failure.json")
    assert (failed.metric, failed.unit, failed.mode, failed.n) == ("failed", "s", "fewer-features", 1)
    assert failed.failure.startswith("mode=fewer-features: its layers and gradients have another width than exact")
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


HOPELESS = [
    *TINY, "mode=exact", "dataset.iterations=4", "dataset.schedule=[[1.0,1e38]]", "task.checkpoint_every=1",
]  # fmt: skip


def test_a_run_that_diverged_is_finished_until_it_is_begun_anew(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path("results/runs", RUN.format("exact"))
    assert cli.main(HOPELESS) == 0
    err = capsys.readouterr().err
    assert "blpa-run: error: diverged: " in err
    assert "1 cells: 1 done (1 diverged), 0 finished before" in err
    assert cli.main(HOPELESS) == 0
    assert "1 cells: 0 done, 1 finished before (resume=false does them again), 0 failed" in capsys.readouterr().err
    assert cli.main(["task=progress"]) == 0
    assert "| digits-exact-depth11-width0.25-seed0 | diverged   | 4  | -  " in capsys.readouterr().out
    alone = [argument for argument in HOPELESS if argument != "-m"]
    assert cli.main(alone) == Diverged.exit_code  # by itself it is tried again, and told again
    assert records.read_divergence(run_dir)
    assert cli.main([*HOPELESS, "resume=false", "budget_minutes=0.001"]) == OutOfTime.exit_code
    assert not records.read_divergence(run_dir)


def test_another_command_in_the_folder_of_a_run_that_diverged_is_not_finished_and_takes_nothing_away() -> None:
    run_dir = Path("results/runs", RUN.format("exact"))
    assert cli.main(HOPELESS) == 0
    hopeful = [*HOPELESS, "dataset.schedule=[[1.0,0.1]]"]
    assert cli.main(hopeful) == 1  # its checkpoint is another's
    assert records.read_divergence(run_dir)
    for checkpoint in run_dir.glob("checkpoint-*"):
        checkpoint.unlink()
    assert cli.main(hopeful) == 0
    assert not records.read_divergence(run_dir)
    assert records.read_run(run_dir)


def test_a_failure_is_recorded_before_another_process_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def record_failure(*_: object) -> None:
        with pytest.raises(Busy), locked(Path("results/runs", RUN.format("exact"))):
            pass
        recorded.append(True)

    recorded: list[bool] = []
    monkeypatch.setattr(run_module, "_record_failure", record_failure)
    assert cli.main(HOPELESS) == 0
    assert recorded == [True]


def test_a_failure_does_not_take_the_place_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0
    for file in Path("results/runs").glob("*/records.json"):
        records.write([replace(record, date="2000-01-01T00:00:00+00:00") for record in records.read(file)], file.parent)
    before = records.collect(Path("results"))
    monkeypatch.setattr(train, "run", lambda config: 1 / 0)
    assert cli.main([*TINY, "mode=exact,4bit", "resume=false"]) == 1
    found = records.collect(Path("results"))
    assert [record for record in found if not record.failure] == before
    assert {record.mode for record in found if record.failure} == {"exact", "4bit"}


def test_a_cell_of_another_configuration_is_not_finished_and_both_are_kept_in_the_table() -> None:
    assert cli.main([*GRADIENTS, "mode=2bit,4bit"]) == 0
    first = record_files()
    assert cli.main([*GRADIENTS, "mode=2bit,4bit", "mode.clip=2"]) == 0
    assert all(record_files()[name] > first[name] for name in first)
    found = records.collect(Path("results"))
    assert {(record.mode, records.canonical(record.settings)) for record in found} == {
        (mode, f'{{"checkpoint":null{clip}}}') for mode in ("2bit", "4bit") for clip in ("", ',"mode.clip":2.0')
    }


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("CUDA error: device not ready")], ids=type
)
def test_a_failure_that_cannot_be_recorded_does_not_stop_the_rest(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(record: records.Record, run_dir: Path) -> None:
        raise error

    monkeypatch.setattr(records, "write_failure", full)
    assert cli.main([*GRADIENTS, "mode=fewer-features,4bit"]) == 1
    assert "the failure could not be recorded: " in (err := capsys.readouterr().err)
    assert error.args[-1] in err
    assert {record.mode for record in records.collect(Path("results"))} == {"4bit"}


def test_a_file_of_no_records_is_a_cell_to_be_run_and_a_torn_one_is_left_as_it_is() -> None:
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0
    file = Path("results/runs") / RUN.format("exact") / "records.json"
    file.write_text("[{")
    assert cli.main([*TINY, "mode=exact,4bit"]) == 1
    assert file.read_text() == "[{"
    file.write_text("[]")
    assert cli.main([*TINY, "mode=exact,4bit"]) == 0
    assert [record.mode for record in records.read(file)] == ["exact"] * 3


def test_what_was_measured_without_a_gpu_is_not_finished_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = composed([argument for argument in TINY if argument not in ("-m", "gpu=cpu")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run_dir = Path("results/runs") / config.run
    made_by = replace(RECORD, command=shlex.join(overrides(config)), cuda=None)
    records.write([made_by], run_dir)
    assert run_module.is_finished(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not run_module.is_finished(config)
    records.write([replace(made_by, cuda="13.0")], run_dir)
    assert run_module.is_finished(config)


def test_time_left_is_that_of_the_cells_that_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells: list[Config] = []

    def run_cell(config: Config, *, records_failure: bool) -> int:
        cells.append(config)
        return 0

    monkeypatch.setattr(sweep.time, "monotonic", lambda: 120.0 * len(cells))  # two minutes a cell
    monkeypatch.setattr(run_module, "run_cell", run_cell)
    assert cli.main([*TINY, "mode=exact,4bit,8bit,2bit"]) == 0
    told = re.findall(r"^\[\d/4\] .*\((.*)\)$", capsys.readouterr().err, re.MULTILINE)
    assert told == [
        "0 s done", "2 min done, about 6 min left", "4 min done, about 4 min left", "6 min done, about 2 min left",
    ]  # fmt: skip


def die_or_run(config: Config) -> int:
    """Of the mode exact the process dies, and of 8bit it is asked to stop while it is at it."""
    if config.mode.name == "exact":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.mode.name == "8bit":
        caller = multiprocessing.parent_process()
        assert caller is not None and caller.pid is not None
        os.kill(caller.pid, signal.SIGTERM)
    return run_module.run_cell(config, records_failure=True)


def test_on_a_gpu_a_cell_has_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process believes in a GPU; the cell's own, which finds none, runs on the CPU."""
    monkeypatch.setattr(run_module, "is_on_cuda", lambda config: True)
    monkeypatch.setattr(run_module, "_run_recording", die_or_run)
    cells = [*TINY, "gpu.kernels=torch", "dataset.iterations=3"]
    assert cli.main([*cells, "mode=exact,4bit"]) == 1
    err = capsys.readouterr().err
    assert "blpa-run: error: a process ended without an answer, by exit code -9" in err
    assert "2 cells: 1 done, 0 finished before (resume=false does them again), 1 failed" in err
    found = records.collect(Path("results"))
    assert {record.mode for record in found if record.failure} == {"exact"}
    assert {record.mode for record in found if not record.failure} == {"4bit"}
    assert cli.main([*cells, "mode=8bit,2bit"]) == 128 + signal.SIGTERM
    assert not list(Path("results").glob("runs/*-2bit-*"))


WRITER = """
import json, sys
from pathlib import Path
from runners import records
record, seed = json.loads(sys.argv[1]), int(sys.argv[2])
written = [records.Record(**(record | {"seed": seed, "settings": {"k": k}})) for k in range(9)]
records.write(written, Path(f"results/runs/{seed}"))
assert [record for record in records.collect(Path("results")) if record.seed == seed] == written
"""


def writer(seed: int) -> "subprocess.Popen[str]":
    """A process that writes nine records of a run and merges all into the table."""
    command = [sys.executable, "-c", WRITER, json.dumps(asdict(RECORD)), str(seed)]
    return subprocess.Popen(command, env={"PYTHONPATH": str(CONF.parent)}, stderr=subprocess.PIPE, text=True)


def table() -> set[tuple[int, str]]:
    with Path("results/records.csv").open(newline="") as file:
        return {(int(row["seed"]), row["settings"]) for row in csv.DictReader(file)}


def test_sixteen_processes_that_write_and_collect_at_once_lose_nothing() -> None:
    writers = [writer(seed) for seed in range(16)]
    assert [process.communicate()[1] for process in writers] == [""] * 16
    assert [process.returncode for process in writers] == [0] * 16
    assert table() == {(seed, f'{{"k":{k}}}') for seed in range(16) for k in range(9)}


def test_who_collects_meanwhile_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this process would write a table that it read before the other's records were there."""
    records.write([RECORD], Path("results/runs/own"))
    write_csv, others = records.write_csv, []

    def meanwhile(*arguments: Any) -> None:
        others.append(writer(1))
        with pytest.raises(subprocess.TimeoutExpired):
            others[0].wait(timeout=3)  # it needs a third of a second where nobody is in its way
        write_csv(*arguments)

    monkeypatch.setattr(records, "write_csv", meanwhile)
    records.collect(Path("results"))
    assert others[0].communicate()[1] == ""
    assert table() == {(RECORD.seed, "{}")} | {(1, f'{{"k":{k}}}') for k in range(9)}


def test_the_largest_batch_that_was_found_is_what_runtime_takes(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["dataset=digits", "depth=11", "width=0.25", "gpu=cpu", "gpu.kernels=torch", "gpu.memory_gib=0.502"]
    timing = [*small, "task=runtime", "task.largest_batch=true", "task.steps=2", "mode=4bit"]
    assert cli.main(timing) == 1
    advice = capsys.readouterr().err.rpartition("none has been found for 4bit yet: blpa-run ")[2]
    assert cli.main(shlex.split(advice)) == 0
    assert cli.main([*small, "task=max-batch", "mode=exact,4bit", "-m"]) == 0
    largest = {r.mode: r.value for r in records.merge(Path("results")) if r.metric == "largest_batch"}
    assert cli.main(timing) == 0
    timed = [r for r in records.merge(Path("results")) if r.task == "runtime"]
    assert {(r.metric, r.batch_size) for r in timed} == {
        (metric, largest["4bit"]) for metric in ("seconds_per_sample", "ratio_to_exact")
    }
    settings = {"largest_batch": True, "memory_gib": 0.502, "allowance_mib": 512, "gpu.kernels": "torch"}
    assert all(record.settings == settings for record in timed)
    assert re.search(rf"^exact: .*, batch {largest['exact']:.0f} ", capsys.readouterr().out, re.MULTILINE)
