"""Two measurements of different things: both stay, in every file, and neither is called finished for the other."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from support import GRADIENTS, TINY, composed, make

from blpa.kernels.reference import REFERENCE
from runners import cli, compose, records
from runners.cells import command, folder_name, recipe_changes, table_name, task_module, weights_name
from runners.reporting import curves, networks
from runners.reporting.labels import read_labels
from runners.run import is_finished
from runners.tasks import kernels, max_batch
from runners.training import network

ALONE = [argument for argument in TINY if argument != "-m"]
RESULTS = Path("results")
SOURCE = {
    "torch": "2.11.0", "triton": None, "cuda": None, "commit": "0123abc", "is_dirty": False, "kernels": "torch",
    "date": "2026-01-01T00:00:00+00:00", "precision": "fp32", "command": "",
}  # fmt: skip
RECORD = records.Record(
    experiment="single", task="train", metric="test_error_percent", unit="%", value=1.0, low=1.0, high=1.0, n=1,
    dataset="digits", mode="4bit", bits=4, depth=29, width=1.0, seed=0, batch_size=64, iterations=300, predicted=False,
    device="a machine", **SOURCE,
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_weights(file: str, seed: int) -> str:
    """Write a checkpoint of the tiny network; return the first digits of its content's digest."""
    (config,) = composed([*ALONE, f"seed={seed}"])
    Path(file).parent.mkdir(exist_ok=True)
    torch.save({"model": network.build(config, REFERENCE).state_dict()}, file)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]


def made(folder: str) -> list[str]:
    return sorted(file.name for file in (RESULTS / folder).iterdir())


def test_two_checkpoints_of_one_file_name() -> None:
    digits = [write_weights(f"{seed}/last.pt", seed) for seed in range(2)]
    assert cli.main([*GRADIENTS, "task.checkpoint=0/last.pt,1/last.pt"]) == 0
    assert cli.main([*ALONE, "task=thresholds", "task.checkpoint=0/last.pt"]) == 0
    assert cli.main([*ALONE, "task=thresholds", "task.checkpoint=1/last.pt"]) == 0
    names = sorted(f"digits-4bit-depth11-width0.25-seed0-gradient-error-batch4-last-{d}" for d in digits)
    histograms = sorted(f"digits-4bit-depth11-width0.25-seed0-thresholds-last-{d}" for d in digits)
    assert made("runs") == names + histograms
    assert made("gradients") == [f"{name}.csv" for name in names]
    assert made("thresholds") == [f"{name}.csv" for name in histograms]
    assert made("figures") == [f"{name}.png" for name in names + histograms]
    found = records.collect(RESULTS)
    assert {record.settings["checkpoint"] for record in found} == {f"last-{d}" for d in digits}
    assert len(found) == 2 * 3 + 2 * 4
    errors = {record.value for record in found if record.metric == "gradient_error"}
    assert len(errors) == 2


def test_a_checkpoint_was_overwritten_between_two_sweeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_module("gradient-error").figures, "draw_gradients", no_figure)
    measuring = [*GRADIENTS, "task.checkpoint=last.pt"]
    digits = []
    for seed in range(2):
        digits.append(write_weights("last.pt", seed))
        assert cli.main(measuring) == 0
        assert "1 cells: 1 done, 0 finished before" in capsys.readouterr().err
    assert cli.main(measuring) == 0
    assert "1 cells: 0 done, 1 finished before" in capsys.readouterr().err
    assert len(made("gradients")) == len(made("runs")) == 2
    assert {r.settings["checkpoint"] for r in records.collect(RESULTS)} == {f"last-{d}" for d in digits}


@pytest.mark.parametrize("task", ["gradient-error", "thresholds"])
def test_a_checkpoint_was_overwritten_while_it_was_read(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights("last.pt", 0)
    whole = network.build

    def build(*arguments: object) -> object:
        with Path("last.pt").open("ab") as file:
            file.write(b"more")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "build", build)
    assert cli.main([*ALONE, f"task={task}", "gpu.kernels=torch", "task.checkpoint=last.pt"]) == 1
    line = "blpa-run: error: task.checkpoint=last.pt was written to while it was read: run it again"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not list(RESULTS.glob("*/*.csv"))
    assert not list(RESULTS.glob("runs/*/records.json"))


def test_a_checkpoint_of_a_run_is_named_by_its_content_already() -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    names = {f"checkpoint-4-{digest[:16]}": "", f"checkpoint-4-{digest[1:17]}": f"-{digest[:8]}"}
    for stem, end in names.items():
        Path(f"{stem}.pt").write_bytes(content)
        assert weights_name(make(task="gradient-error", task__checkpoint=f"{stem}.pt")) == f"{stem}{end}"
    assert weights_name(make(task="gradient-error", task__checkpoint="no/such-file.pt")) == "such-file"
    assert weights_name(make(task="gradient-error")) is None


def test_an_older_row_that_names_the_file_alone_is_shown_beside_the_new_one() -> None:
    older = replace(
        RECORD, task="gradient-error", metric="gradient_error", iterations=8, settings={"checkpoint": "last"}
    )
    rows = [replace(older, metric=metric) for metric in ("gradient_error", "gradient_cosine")]
    newer = [replace(row, settings={"checkpoint": "last-76d6ca72"}, date="2026-01-02T00:00:00+00:00") for row in rows]
    records.write(rows, RESULTS / "runs" / "a")
    records.write(newer, RESULTS / "runs" / "b")
    found, labels = records.collect(RESULTS), read_labels()
    assert set(found) == {*rows, *newer}
    (table,) = (table for table in networks.TABLES if table.name == "gradients")
    titles = [section.title for section in networks.page(table, networks.cells(table, found, labels), labels).sections]
    assert titles == [f"digits, fp32, batch 64, at {name}" for name in ("last", "last-76d6ca72")]


def test_two_runs_of_the_same_settings_were_named_by_run() -> None:
    commands = ["dataset=digits seed=0", "dataset=digits seed=0 run=a", "dataset=digits seed=0 run=b"]
    dates = [f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3)]
    written = [replace(RECORD, command=text, date=date) for text, date in zip(commands, dates, strict=True)]
    for record, folder in zip(written, ("digits", "a", "b"), strict=True):
        records.write([record], RESULTS / "runs" / folder)
        (RESULTS / "runs" / folder / "metrics.csv").write_text(
            "iteration,learning_rate,train_loss,train_error_percent,test_loss,test_error_percent\n"
            f"300,0.1,1.5,2.0,1.0,{record.date[9]}\n"
        )
    assert set(records.collect(RESULTS)) == set(written)
    assert list(curves.gather(RESULTS)["test_error_percent"]) == [3.0]  # a figure and a table show the newest
    shutil.rmtree(RESULTS / "runs")
    assert set(records.collect(RESULTS)) == set(written)
    curves.gather(RESULTS)
    assert sorted(pd.read_csv(RESULTS / "curves.csv")["test_error_percent"]) == [1, 2, 3]
    again = replace(written[1], value=7.0, date="2026-01-04T00:00:00+00:00")
    records.write([again], RESULTS / "runs" / "a")
    assert set(records.collect(RESULTS)) == {written[0], again, written[2]}


@pytest.mark.parametrize("task", ["gradient-error", "memory"])
def test_a_recipe_of_its_own_leaves_the_table_and_the_figure_of_the_usual_one(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, clipped, narrower = (make(task=task, mode__clip=clip) for clip in (3.0, 2.0, 1.0))
    assert table_name(usual) == folder_name(usual)
    assert len({table_name(usual), table_name(clipped), table_name(narrower)}) == 3
    written: list[str] = []
    module = task_module(task)
    monkeypatch.setattr(module, "write_csv", lambda file, rows: written.append(file.name))
    monkeypatch.setattr(module.figures, f"draw_{task.partition('-')[0]}{'s' if '-' in task else ''}", no_figure)
    changed = [*ALONE, f"task={task}", "gpu.kernels=torch", "mode.clip=2"]
    assert cli.main([*changed, "task.steps=1"] if task == "gradient-error" else changed) == 0
    (config,) = composed(changed)
    assert written[-1] == f"{table_name(config)}.csv"


def no_figure(*_: object) -> str:
    return ""


def own_option(group: str, text: str) -> None:
    Path("own", group).mkdir(parents=True, exist_ok=True)
    Path("own", group, "mine.yaml").write_text(text)


@pytest.mark.parametrize(
    ("group", "text", "change"),
    [
        ("mode", "name: mine\nlayers: coded\nbits: 4\nclip: 3.0\n", ("3.0", "2.0")),
        ("experiment", "# @package _global_\nexperiment: mine\nmode:\n  clip: 3.5\n", ("3.5", "2.0")),
        ("experiment", "# @package _global_\nexperiment: mine\ndataset:\n  iterations: 5\n", ("5", "6")),
    ],
)
def test_a_file_of_options_was_edited_between_two_sweeps(group: str, text: str, change: tuple[str, str]) -> None:
    own_option(group, text)
    arguments = ["dataset=digits", "gpu=cpu", f"{group}=mine"]
    before, after = composed_own(arguments), None
    records.write([replace(RECORD, command=command(before))], RESULTS / "runs" / str(folder_name(before)))
    assert is_finished(composed_own(arguments))
    own_option(group, text.replace(*change))
    after = composed_own(arguments)
    assert not is_finished(after)
    assert (recipe_changes(before), before.dataset.iterations) != (recipe_changes(after), after.dataset.iterations)


def composed_own(arguments: list[str]) -> compose.Config:
    with compose.session(str(Path("own").absolute())):
        given = [*arguments, f"config_dir={Path('own').absolute()}"]
        return compose.cells(given, multirun=False)[0].config


@pytest.mark.parametrize("task", ["train", "gradient-error", "runtime"])
def test_a_run_that_need_not_be_deterministic(task: str) -> None:
    settings_of = task_module(task).settings_of
    usual, changed = (settings_of(make(task=task, gpu__deterministic=value)) for value in (True, False))
    assert "gpu.deterministic" not in usual
    assert changed == {**usual, "gpu.deterministic": False}


def test_kernels_and_batches_that_need_not_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(task="max-batch", gpu__deterministic=False, gpu__memory_gib=1.0)
    measured, predicted = (max_batch._record(config, 1, 1, {**SOURCE, "device": name}) for name in ("a card", "none"))
    assert measured.settings == {**predicted.settings, "gpu.deterministic": False}
    config = make(task="kernels", gpu__deterministic=False, task__steps=1)
    monkeypatch.setattr(kernels, "shapes", lambda config: [])
    source = {**SOURCE, "device": "a card"}
    made = kernels._functions(config, [REFERENCE], 0, 4, 2, torch.device("cpu"), source, [])
    assert {records.canonical(record.settings) for record in made} == {
        '{"channels":2,"gpu.deterministic":false,"rows":4}'
    }
