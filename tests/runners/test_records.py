"""runners/records.py: columns, files, and which record of a cell stands."""

import csv
import json
import subprocess
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runners import files, provenance, records
from runners.errors import UserError
from runners.records import COLUMNS, Record, collect, read, write

RECORD = Record(
    experiment="single",
    task="train",
    metric="test_error_percent",
    unit="%",
    value=0.1 + 0.2,  # 0.30000000000000004: a number that must survive the CSV to the last bit
    low=0.1,
    high=1e-300,
    n=1,
    dataset="digits",
    mode="4bit",
    bits=4,
    depth=29,
    width=1.0,
    seed=0,
    batch_size=64,
    precision="fp32",
    kernels="torch",
    iterations=300,
    predicted=False,
    device='A "quoted" machine, with a comma',
    torch="2.11.0",
    triton=None,
    cuda=None,
    commit="0123abc",
    is_dirty=True,
    date="2026-01-01T00:00:00+00:00",
)


def test_columns_are_the_design_in_its_order() -> None:
    design = (
        "experiment, task, metric, unit, value, low, high, n, dataset, mode, bits, depth, width, seed, batch_size, "
        "precision, kernels, iterations, predicted, device, torch, triton, cuda, commit, is_dirty, date, settings, "
        "command, failure, segments"
    )
    assert ", ".join(COLUMNS) == design


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [RECORD, replace(RECORD, metric="train_seconds", bits=None, is_dirty=None, commit=None)]
    write(written, tmp_path)
    assert read(tmp_path / "records.json") == written


def test_records_come_back_from_the_csv_to_the_last_bit(tmp_path: Path) -> None:
    settings = {"b": [0.1 + 0.2, None], "a": {"text": 'a\nb, "c"', "flag": True}}
    bare = replace(RECORD, seed=1, bits=None, is_dirty=None, commit=None, cuda="13.2", settings=settings)
    write([RECORD, bare], tmp_path / "runs" / "a")
    first = collect(tmp_path)
    (tmp_path / "runs" / "a" / "records.json").unlink()
    assert set(first) == {RECORD, bare}
    assert collect(tmp_path) == first


def test_the_newer_record_of_a_cell_stands_wherever_it_is(tmp_path: Path) -> None:
    newer = replace(RECORD, value=2.0, date="2026-01-02T00:00:00+00:00", torch="2.12.0")
    write([newer], tmp_path / "runs" / "a")
    assert collect(tmp_path) == [newer]
    write([RECORD], tmp_path / "runs" / "a")
    assert collect(tmp_path) == [newer]


@pytest.mark.parametrize("column", records.CELL)
def test_records_that_differ_in_one_field_of_the_cell_both_stand(tmp_path: Path, column: str) -> None:
    value = getattr(RECORD, column)
    other_value = (
        {"memory_gib": 11.0} if column == "settings" else f"other {value}" if isinstance(value, str) else value + 1
    )
    changed: dict[str, Any] = {column: other_value}
    other = replace(RECORD, **changed)
    write([RECORD], tmp_path / "runs" / "a")
    write([other], tmp_path / "runs" / "b")
    assert set(collect(tmp_path)) == {RECORD, other}


def test_settings_in_another_order_are_the_same_cell(tmp_path: Path) -> None:
    older = replace(RECORD, settings={"allowance_mib": 512, "memory_gib": 11.0})
    newer = replace(older, settings={"memory_gib": 11.0, "allowance_mib": 512}, date="2026-01-02T00:00:00+00:00")
    write([older], tmp_path / "runs" / "a")
    write([newer], tmp_path / "runs" / "b")
    assert collect(tmp_path) == [newer]
    with (tmp_path / "records.csv").open(newline="") as file:
        assert [row["settings"] for row in csv.DictReader(file)] == ['{"allowance_mib":512,"memory_gib":11.0}']


def test_records_with_older_columns_are_refused_on_one_line(tmp_path: Path) -> None:
    write([RECORD], tmp_path / "runs" / "a")
    file = tmp_path / "runs" / "a" / "records.json"
    older = [{("note" if name == "settings" else name): value for name, value in asdict(RECORD).items()}]
    file.write_text(json.dumps(older))
    with pytest.raises(
        UserError, match=r"records\.json .*unknown note; missing settings; expected experiment, "
    ) as json_error:
        collect(tmp_path)
    file.unlink()
    (tmp_path / "records.csv").write_text("experiment,note,paper_value\n")
    with pytest.raises(
        UserError, match=r"records\.csv, line 1: .*unknown note, paper_value; missing task, "
    ) as csv_error:
        collect(tmp_path)
    assert "\n" not in f"{json_error.value}{csv_error.value}"


def test_the_csv_does_not_depend_on_the_order_of_the_runs(tmp_path: Path) -> None:
    for order, folder in ((range(5), "up"), (reversed(range(5)), "down")):
        for position, seed in enumerate(order):
            record = replace(RECORD, seed=seed, bits=None if seed % 2 else 4)
            write([record], tmp_path / folder / "runs" / f"run{position}")
        collect(tmp_path / folder)
    assert (tmp_path / "up" / "records.csv").read_bytes() == (tmp_path / "down" / "records.csv").read_bytes()


def test_nothing_recorded_writes_nothing(tmp_path: Path) -> None:
    assert collect(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[", "{}x", '[{"value": 1}]', '[{"unknown": 1}]', "[1]"])
def test_a_damaged_run_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "runs" / "a" / "records.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"records\.json is not a run's records"):
        collect(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("experiment,task", "experiment,tusk"),
            "line 1: its columns are not those of records: unknown tusk; missing task",
        ),
        ((",digits,4bit,4,", ",digits,4bit,four,"), "records.csv, line 2: "),
        ((",digits,4bit,4,", ",digits,4bit,"), "records.csv, line 2: "),
        ((",False,", ",maybe,"), "records.csv, line 2: "),
        ((",{}", ",{"), "records.csv, line 2: "),
    ],
)
def test_a_damaged_csv_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    write([RECORD], tmp_path / "runs" / "a")
    collect(tmp_path)
    table = tmp_path / "records.csv"
    text = table.read_text()
    assert change[0] in text
    table.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        collect(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write([RECORD], tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write([replace(RECORD, value=float("nan"))], tmp_path)
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(tmp_path / "records.json", "half of it, then \udc80")
    assert read(tmp_path / "records.json") == [RECORD]
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


def test_a_reader_sees_whole_files_while_others_write(tmp_path: Path) -> None:
    def rewrite() -> None:
        for value in range(50):
            write([replace(RECORD, value=float(value))] * 20, tmp_path)

    write([RECORD] * 20, tmp_path)
    writers = [threading.Thread(target=rewrite) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(json.loads((tmp_path / "records.json").read_text())) == 20
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


def test_provenance_fills_the_fields_that_tell_where_and_when() -> None:
    source = provenance.provenance(torch.device("cpu"))
    assert set(source) == {"device", "torch", "triton", "cuda", "commit", "is_dirty", "date"}
    assert source["torch"] == torch.__version__
    assert source["cuda"] is None
    assert f", {torch.get_num_threads()} thread" in source["device"]
    assert replace(RECORD, **source).device == source["device"]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_changes_are_those_of_the_source(tmp_path: Path) -> None:
    assert provenance._commit(tmp_path) == (None, None)  # no checkout
    git(tmp_path, "init")
    for folder in provenance.SOURCES:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("")
        # A checkout that does not track it all, as around a virtual environment.
        assert provenance._commit(tmp_path) == (None, None)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance._commit(tmp_path) == (commit, False)
    (tmp_path / "results.csv").write_text("generated")
    assert provenance._commit(tmp_path) == (commit, False)
    for folder in provenance.SOURCES:
        (tmp_path / folder / "file").write_text("changed")
        assert provenance._commit(tmp_path) == (commit, True)
        (tmp_path / folder / "file").write_text("")
    assert provenance._commit(tmp_path) == (commit, False)


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commit(Path(records.__file__).parent.parent) == (None, None)


def test_what_was_made_in_parts_names_every_machine_once() -> None:
    one = {"device": "a", "torch": "2.11", "triton": None, "cuda": None, "commit": "c", "is_dirty": False, "date": "1"}
    other = {**one, "device": "b", "cuda": "13.0", "is_dirty": True, "date": "2"}
    assert provenance.merge_provenance([one, other, one]) == {
        "device": "a; b", "torch": "2.11", "triton": None, "cuda": "13.0", "commit": "c", "is_dirty": True
    }  # fmt: skip
    assert provenance.merge_provenance([{**one, "commit": None, "is_dirty": None}])["is_dirty"] is None
