"""blpa/runners/max_batch.py and memory.py, from the command line to the record; and the table of largest batches."""

import csv
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_records import RECORD
from test_tables import rows_of

from blpa import records
from blpa.config import Config
from blpa.records import Record
from blpa.runners import cli, max_batch, paper, tables

TINY = ["dataset=digits", "depth=11", "width=0.25", "mode=4bit"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record_of(run: str) -> list[Record]:
    return records.read(Path("results/runs") / run / "records.json")


def test_largest_batch_is_recorded_as_predicted_and_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.6", "run=a", *TINY]) == 0
    (record,) = record_of("a-max-batch-0.6gib-auto")
    assert (record.metric, record.unit, record.predicted, record.device) == ("largest_batch", "samples", True, "none")
    assert record.note == "0.6 GiB less 512 MiB"
    out, _ = capsys.readouterr()
    assert out.startswith(f"4bit, depth 11, width 0.25: largest batch {record.value:.0f} in 0.6 GiB (predicted); GiB: ")
    assert out.count("\n") == 1
    (config,) = cells(["task=max-batch", "gpu.memory_gib=0.6", "run=a", *TINY])
    budget = int(0.6 * 2**30) - 512 * 2**20
    at = [training_total(config, int(record.value) + more) for more in (0, 1)]
    assert at[0] <= budget < at[1]


def cells(arguments: list[str]) -> list[Config]:
    with cli.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return list(cli._cells(arguments, multirun=False))


def training_total(config: Config, batch: int) -> int:
    return max_batch.training_bytes(config, max_batch.kernels.choose("inductor", max_batch.META), batch).total_bytes


def test_a_network_that_does_not_fit_is_recorded_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.5", "run=a", *TINY]) == 0
    (record,) = record_of("a-max-batch-0.5gib-auto")
    assert record.value == 0
    assert "does not fit 0.5 GiB even at batch 1 (predicted)" in capsys.readouterr().out
    assert cli.main(["task=tables"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gpu.memory_gib=null is not allowed for max-batch: name a card, gpu=gtx1080ti, or its GiB"),
        (["gpu.memory_gib=0"], "gpu.memory_gib=0.0 is not allowed: it is a number above 0"),
        (["gpu.memory_gib=-11"], "gpu.memory_gib=-11.0 is not allowed: it is a number above 0"),
        (["gpu=gtx1080ti", "gpu.allowance_mib=-1"], "gpu.allowance_mib=-1 is not allowed: it is a whole number, at"),
    ],
)
def test_a_budget_without_meaning_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["task=max-batch", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"blpa-run: error: {message}")
    assert list(Path.cwd().iterdir()) == []


def test_memory_shows_kinds_blocks_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=memory", "run=a", "dataset.batch_size=4", *TINY]) == 0
    out, _ = capsys.readouterr()
    name = "a-memory-batch4-auto"
    exact, coded = record_of(name)
    assert [exact.mode, coded.mode, exact.predicted] == ["exact", "4bit", True]
    assert coded.value < exact.value
    assert f"| peak of a step {'':34}"[:18] in out
    with (Path("results/runs") / name / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert [block["block"] for block in blocks] == ["block 1", "block 2", "block 3"]
    assert all(block["kept"] == block["formula"] for block in blocks)
    total = sum(int(block["kept"]) for block in blocks)
    assert f"kept by the blocks: {total} bytes counted, {total} by the formula" in out
    lines = pd.read_csv(f"results/memory/{name}.csv")
    assert {mode: line["mib"].max() for mode, line in lines.groupby("mode")} == pytest.approx(
        {"exact": exact.value, "4bit": coded.value},
        rel=0.2,  # the peak may lie inside an operation
    )
    picture = Path(f"results/figures/{name}.png")
    drawn = picture.read_bytes()
    picture.unlink()
    assert cli.main(["task=plots"]) == 0
    assert picture.read_bytes() == drawn


def test_memory_of_stock_layers_has_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=memory", "run=a", "dataset.batch_size=4", *TINY, "mode=checkpoint"]) == 0
    assert "formula" not in capsys.readouterr().out


# ---- the table of largest batches -----------------------------------------------------------------------------------

BATCH = replace(
    RECORD, task="max-batch", metric="largest_batch", dataset="cifar10", depth=164, value=6290.0, predicted=True,
    batch_size=0, note="11 GiB less 512 MiB", commit="0123456789abcdef",
)  # fmt: skip
TITLE = "CIFAR-10-size images, fp32, 11 GiB less 512 MiB"


def test_the_papers_largest_batches_stand_beside_ours_at_its_own_budget() -> None:
    other = replace(BATCH, note="80 GiB less 512 MiB", value=99.0)
    text = tables.batches_markdown(tables.largest_batches([BATCH, other]))
    rows = rows_of(text, TITLE)
    assert rows[""] == ["1001 (4x)", "1001", "488", "254", "164"]
    assert rows["proposed 4-bit"] == ["not run"] * 4 + ["6290 (predicted)"]
    assert "| - in the paper          | 182       | 876     | 1468    | 2154    | 2522             |" in text
    assert "| - in the paper          | 26        | 134     | 264     | 474     | 688              |" in text
    assert rows_of(text, TITLE.replace("11", "80"))["proposed 4-bit"] == ["99 (predicted)"]


def test_the_newer_answer_counts() -> None:
    newer = replace(BATCH, value=7.0, predicted=False, date="2027-01-01T00:00:00+00:00")
    rows = rows_of(tables.batches_markdown(tables.largest_batches([newer, BATCH])), TITLE)
    assert rows["proposed 4-bit"][-1] == "7"


def test_paper_figures_are_looked_up_for_its_own_card_alone() -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti"])
    assert paper.largest_batch(config) == 2522
    config.gpu.memory_gib = 80
    assert paper.largest_batch(config) is None
