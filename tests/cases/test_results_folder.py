"""results/ as its users leave it: what does not read back whole is named, and not a byte of it is written over."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from fuzz import record
from support import TINY, refusal

from runners import cli, records
from runners.records import Record
from runners.reporting import curves, figures
from runners.tasks import train

HEADER = ",".join(curves.METRICS)
RESULTS = Path("results")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Of a picture its name is enough here; to write it takes most of the time.
    monkeypatch.setattr(figures, "save", lambda figure, results, name: _drawn(results / "figures" / f"{name}.png"))


def _drawn(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.touch()
    return file


def finished_run(name: str, made: Record, *rows: str) -> Path:
    run_dir = RESULTS / "runs" / name
    records.write([made], run_dir)
    (run_dir / "metrics.csv").write_text("\n".join([HEADER, *rows, ""]))
    return run_dir


def content() -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in RESULTS.rglob("*") if file.is_file() and "lock" not in file.name}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that leaves every file as it is."""
    capsys.readouterr()
    before = content()
    (line,) = refusal(arguments, capsys).splitlines()
    assert content() == before
    return line


# ---- tables


def test_a_spreadsheet_saved_curves_with_semicolons(capsys: pytest.CaptureFixture[str]) -> None:
    finished_run("a", record(), "300,0.1,1.5,50.0,1.0,2.5")
    gone = finished_run("b", record(seed=1), "300,0.1,1.5,50.0,1.0,3.5")
    assert cli.main(["task=plots"]) == 0
    shutil.rmtree(gone)
    table = RESULTS / "curves.csv"
    table.write_text(table.read_text().replace(",", ";"))
    line = refused(["task=plots"], capsys)
    assert "results/curves.csv, line 1: its columns are not those of curves: unknown dataset;depth;" in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: "",
            "line 1: its columns are not those of records: unknown none; missing all; expected experiment, ",
        ),
        (lambda text: text[:-1], "line 3: expected a line break at the end: the line may be cut short"),
        (lambda text: text.replace("\n", "\n<<<<<<< HEAD\n", 1), "line 2: '<<<<<<< HEAD' is 1 cells, expected 30"),
        (lambda text: text.replace(",2.5,", ',"2,5",', 1), "line 2: value is '2,5', expected a finite number"),
        (lambda text: text.replace(",2.5,", ",nan,", 1), "line 2: value is 'nan', expected a finite number"),
        (lambda text: text.replace(",29,", ",29.5,", 1), "line 2: depth is '29.5', expected a whole number"),
        (lambda text: text.replace(",False,", ",0,", 1), "line 2: predicted is '0', expected True or False"),
        (
            lambda text: text.replace("2026-01-01T", "01/01/2026 ", 1),
            "line 2: date is '01/01/2026 00:00:00+00:00', exp",
        ),
        (lambda text: text.replace(",{},", ',"{""a"":1,""a"":2}",', 1), 'line 2: settings is \'{"a":1,"a":2}\', exp'),
        (lambda text: text.replace("metric,unit", "metric,unit,unit"), "unknown none; missing none; twice unit; expec"),
        (lambda text: text.replace("single,train", ",train", 1), "line 2: experiment is '', expected a text that is n"),
        (lambda text: text.replace(",%,", ",\x00,", 1), r"line 2: the character '\x00', expected text"),
        (lambda text: text.replace(",%,", ',"%,', 1), "line 2: ',' expected after '\"'"),
        (
            lambda text: text.replace("experiment", "note,experiment", 1),
            "line 1: its columns are not those of records:",
        ),
    ],
)
def test_a_table_of_records_was_damaged(
    damage: Callable[[str], str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write([record(), record(seed=1)], RESULTS / "runs" / "a")
    records.collect(RESULTS)
    table = RESULTS / "records.csv"
    assert damage(table.read_text()) != table.read_text()
    table.write_text(damage(table.read_text()))
    for task in ("tables", "plots", "report"):
        line = refused([f"task={task}"], capsys)
        assert line.startswith("blpa-run: error: results/records.csv, line ")
        assert message in line


def test_an_editor_saved_a_table_as_on_windows() -> None:
    records.write([record(device="Prozessor für alles"), record(seed=1, triton="3.6.0")], RESULTS / "runs" / "a")
    before = records.collect(RESULTS)
    shutil.rmtree(RESULTS / "runs")
    table = RESULTS / "records.csv"
    text = table.read_text(encoding="utf-8")
    kind = text.replace("False", "FALSE").replace("+00:00", "Z").replace("\n", "\r\n\r\n") + "," * 29 + "\r\n"
    table.write_bytes(b"\xef\xbb\xbf" + kind.encode())
    assert records.collect(RESULTS) == before
    assert table.read_text(encoding="utf-8") == text


def test_a_table_was_saved_in_latin_1(capsys: pytest.CaptureFixture[str]) -> None:
    records.write([record(device="Prozessor für alles")], RESULTS / "runs" / "a")
    records.collect(RESULTS)
    table = RESULTS / "records.csv"
    table.write_bytes(table.read_text(encoding="utf-8").encode("latin-1"))
    assert "records.csv, line 2: the byte 0xfc, expected UTF-8" in refused(["task=tables"], capsys)


def test_a_row_of_a_curve_was_edited(capsys: pytest.CaptureFixture[str]) -> None:
    """Its date makes it the newest: the rest of the curve would go."""
    finished_run("a", record(), "100,0.1,1.5,50.0,1.0,9.5", "300,0.1,1.5,50.0,1.0,2.5")
    assert cli.main(["task=plots"]) == 0
    table = RESULTS / "curves.csv"
    table.write_text(table.read_text().replace("2026-01-01", "2026-01-02", 1))
    line = refused(["task=plots"], capsys)
    assert line.endswith("results/curves.csv, line 2: the curve ends at iteration 100, expected 300")
    table.write_text(table.read_text().replace("2026-01-02", "2026-01-01").replace("100,0.1", "300,0.1"))
    assert "line 3: iteration is 300, which is there before with other values" in refused(["task=plots"], capsys)


def test_a_row_of_the_metrics_was_lost_after_they_were_gathered(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "100,0.1,1.5,50.0,1.0,9.5", "200,0.1,1.5,50.0,nan,5.5", "300,0.1,1.5,50.0,1.0,2.5"
    finished_run("a", record(), *rows)
    for _ in range(2):
        assert cli.main(["task=plots"]) == 0
    finished_run("a", record(), rows[0], rows[2])
    assert refused(["task=plots"], capsys).endswith(
        "results/runs/a/metrics.csv, iteration 200: expected what results/curves.csv has of the same run; mend either"
    )


def test_a_test_loss_that_is_not_finite_stays() -> None:
    run_dir = finished_run("a", record(), "300,0.1,1.5,50.0,nan,90.0")
    finished_run("b", record(seed=1), "300,0.1,1.5,50.0,inf,90.0")
    curves.gather(RESULTS)
    before = (RESULTS / "curves.csv").read_bytes()
    shutil.rmtree(run_dir)
    assert curves.gather(RESULTS)["test_loss"].isna().tolist() == [True, False]
    assert (RESULTS / "curves.csv").read_bytes() == before


def test_two_processes_gather_curves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run("a", record(), "300,0.1,1.5,50.0,1.0,2.5")
    tried = []

    def write(*_: object) -> None:
        with pytest.raises(Timeout):
            FileLock(RESULTS / ".lock").acquire(blocking=False)
        tried.append(True)

    monkeypatch.setattr(curves, "write_csv", write)
    curves.gather(RESULTS)
    assert tried


# ---- files of one run


def test_the_metrics_of_one_run_of_two_were_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    finished_run("a", record(), "300,0.1,1.5,50.0,1.0,2.5")
    damaged = finished_run("b", record(depth=56), "300,0.1,1.5,50.0,1.0,3.5") / "metrics.csv"
    damaged.write_bytes(before := damaged.read_bytes().removesuffix(b",3.5\n"))
    assert refusal(["task=plots"], capsys) == (
        "blpa-run: error: results/runs/b/metrics.csv, line 2: '300,0.1,1.5,50.0,1.0' is 5 cells, expected 6\n"
    )
    assert damaged.read_bytes() == before
    assert [file.stem for file in (RESULTS / "figures").iterdir()] == ["error-digits-depth29-width1-300x64-fp32"]
    assert (RESULTS / "curves.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("kind", ["memory", "gradients", "thresholds"])
def test_the_table_of_one_figure_is_empty(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        "memory": "mode,done,mib\nexact,0.5,1.5\nexact,1.0,0.5\n",
        "gradients": ",".join(figures.GRADIENTS) + "\n4bit,stem" + ",1.0" * 9 + "\n4bit,classifier" + ",nan" * 9 + "\n",
        "thresholds": "part,low,high,percent\nfirst third,-6.0,6.0,100.0\n",
    }
    for folder, text in whole.items():
        (RESULTS / folder).mkdir(parents=True)
        (RESULTS / folder / f"{folder}.csv").write_text(text)
    for content, message in (
        ("", "line 1: its columns are not those of its folder: unknown none; missing "),
        (whole[kind].splitlines()[0] + "\n", "line 2: no row, expected one or more"),
        (whole[kind].replace(",1", ",one", 1), "is 'one"),
    ):
        (RESULTS / kind / f"{kind}.csv").write_text(content)
        (line,) = refusal(["task=plots"], capsys).splitlines()
        assert line.startswith(f"blpa-run: error: results/{kind}/{kind}.csv, line ")
        assert message in line
        drawn = {file.stem for file in (RESULTS / "figures").iterdir()}
        assert drawn == set(whole) - {kind}


def test_records_of_a_run_hold_what_no_record_has(capsys: pytest.CaptureFixture[str]) -> None:
    file = RESULTS / "runs" / "a" / "records.json"
    records.write([record(), record(seed=1)], file.parent)
    records.write([record(seed=2)], RESULTS / "runs" / "b")
    records.collect(RESULTS)
    rows = json.loads(file.read_text())
    texts = {
        json.dumps([rows[0], rows[1] | {name: value}]): f"record 2: {name} is {shown}, expected {expected}"
        for name, value, shown, expected in (
            ("value", "2.5", "'2.5'", "a finite number"),
            ("value", None, "None", "a finite number"),
            ("value", float("nan"), "nan", "a finite number"),
            ("value", 10**400, f"1{'0' * 76}...", "a finite number"),
            ("n", True, "True", "a whole number"),
            ("n", 1.5, "1.5", "a whole number"),
            ("seed", -1, "-1", "a whole number"),
            ("bits", "4", "'4'", "a whole number from 0 to 2**63 - 1, or nothing"),
            ("predicted", 0, "0", "True or False"),
            ("device", "\ud800", r"'\ud800'", "a text"),
            ("settings", [1], "[1]", "a JSON object"),
            ("settings", {"a": float("inf")}, "an object", "a JSON object"),
            ("date", "yesterday", "'yesterday'", "a time in ISO 8601"),
            ("date", "2026-13-01T00:00:00+00:00", "'2026-13-01T00:00:00+00:00'", "a time in ISO 8601"),
        )
    }
    texts |= {
        json.dumps(rows[0]): "an object, expected a list",
        json.dumps([1]): "record 1: 1, expected an object",
        json.dumps(
            [rows[0], rows[1] | {"failure": "of nothing"}]
        ): "record 2: metric is 'test_error_percent' with fail",
        json.dumps(rows).replace('"n": 1', '"n": 1, "n": 2', 1): "twice n; ",
        "[" * 100_000: "maximum recursion depth",
        json.dumps(rows, indent=0).replace("\n", "\n<<<<<<< HEAD\n", 1): "line 2 column 1",
    }
    for text, message in texts.items():
        file.write_text(text)
        line = refused(["task=tables"], capsys)
        assert line.startswith(f"blpa-run: error: {file} is not a run's records: ")
        assert message in line


def test_a_run_whose_records_were_damaged_is_begun_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before it trains; the other cell of the sweep is not."""
    ran = []
    monkeypatch.setattr(train, "run", lambda config: ran.append(config.mode.name))
    for name in records.FILES:
        file = RESULTS / "runs" / "digits-exact-depth11-width0.25-seed0" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[{")
        alone = [argument for argument in TINY if argument != "-m"]
        for resumes in ("true", "false"):
            assert f"blpa-run: error: {file} is not a run's records: " in refused(
                [*alone, "mode=exact", f"resume={resumes}"], capsys
            )
        assert cli.main([*TINY, "mode=exact,4bit", f"run={name}-${{mode.name}}", "resume=false"]) == 0
        assert cli.main([*TINY, "mode=exact,4bit"]) == 1
        assert f"error: {file} is not a run's records: " in capsys.readouterr().err
        assert ran == ["exact", "4bit", "4bit"]
        assert [other.name for other in file.parent.iterdir() if other.name != "lock"] == [name]
        assert file.read_text() == "[{"
        file.unlink()
        ran.clear()


def test_another_command_ran_in_the_folder_while_a_table_was_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured is written all the same, and so is what the first command measured, wherever it is killed."""
    run_dir, first = RESULTS / "runs" / "a", record(command="first")
    (RESULTS / "records.csv").parent.mkdir()
    (RESULTS / "records.csv").write_text("<<<<<<< HEAD\n")
    records.write([first], run_dir)
    second = replace(first, seed=1, command="second")
    write_json = records._write_json
    with monkeypatch.context() as killed:
        killed.setattr(records, "_write_json", lambda made, file: file.name == "records.json" or write_json(made, file))
        records.write([second], run_dir)
    assert [json.loads((run_dir / name).read_text()) for name in ("earlier.json", "records.json")] == [
        json.loads(json.dumps([asdict(first)]))
    ] * 2
    records.write([second], run_dir)
    third = replace(first, seed=2, command="third")
    records.write([third], run_dir)
    (RESULTS / "records.csv").unlink()
    assert records.collect(RESULTS) == [first, second, third]


def test_the_failure_of_one_run_of_two_was_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    records.write([record()], RESULTS / "runs" / "a")
    (RESULTS / "runs" / "b").mkdir()
    (RESULTS / "runs" / "b" / "failure.json").write_text("")
    assert cli.main(["task=progress"]) == 1
    out, err = capsys.readouterr()
    assert "| a   | 300 " in out
    assert err.startswith("blpa-run: error: results/runs/b/failure.json is not a run's records: Expecting value")
    refused(["task=tables"], capsys)
