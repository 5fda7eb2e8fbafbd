"""runners/reporting/errors.py: what stands in a cell, which cells there are, and what is said about them.

The records are made up; only the shape and the arithmetic of the tables are under test.
"""

import csv
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from test_records import RECORD

from runners import cli, records
from runners.records import Record
from runners.reporting import errors as tables
from runners.reporting import pages, paper
from runners.reporting.labels import read_labels

DIGITS = replace(RECORD, device="a CPU, 2 threads", commit="0123456789abcdef", is_dirty=False)
LABELS = read_labels()


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their label."""
    section = text.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned, so that it reads as text too
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def table(*found: Record) -> str:
    return pages.markdown(tables.page(tables.summarise(list(found), LABELS), LABELS))


def test_before_anything_has_run_the_papers_figures_stand_beside_not_run() -> None:
    rows = rows_of(table(), "The paper's cells")
    assert [label for label in rows if label.strip("-")] == [
        "exact", "exact, fewer features", "naive 8-bit", "proposed 8-bit", "proposed 4-bit", "2-bit (ours)",
    ]  # fmt: skip
    assert rows[""] == ["alpha", "CIFAR-10", "paper", "CIFAR-100", "paper", "ImageNet top-5", "paper"]
    assert rows["exact"] == ["1", "not run", "5.36 ± 0.15", "not run", "23.44 ± 0.26", "not run", "7.20"]
    assert rows["exact, fewer features"] == ["1/4", "not run", "9.49 ± 0.12", "not run", "33.47 ± 0.50", "not run", "-"]
    assert rows["naive 8-bit"] == ["1/4", "not run", "75.49 ± 9.09", "not run", "95.41 ± 2.16", "not run", "-"]
    assert rows["proposed 8-bit"] == ["1/4", "not run", "5.48 ± 0.13", "not run", "23.63 ± 0.32", "not run", "7.70"]
    assert rows["proposed 4-bit"] == ["1/8", "not run", "5.49 ± 0.16", "not run", "23.58 ± 0.30", "not run", "7.72"]
    assert rows["2-bit (ours)"] == ["1/16", "not run", "-", "not run", "-", "not run", "-"]


def test_top_5_errors_stand_in_the_papers_column_and_beside_top_1_in_a_table_of_their_own() -> None:
    imagenet = replace(DIGITS, dataset="imagenet", depth=152, iterations=640000, batch_size=256, value=25.1)
    top5 = replace(imagenet, metric="test_top5_error_percent", value=7.5)
    shallow = [replace(record, depth=26, value=record.value + 10) for record in (imagenet, top5)]
    text = table(imagenet, top5, replace(imagenet, mode="exact", bits=None), *shallow)
    papers = rows_of(text, "The paper's cells")
    assert papers[""][-2:] == ["ImageNet top-5, fp32", "paper"]
    assert papers["proposed 4-bit"][-2:] == ["7.50 (n=1)", "7.72"]
    assert papers["exact"][-2:] == ["not run", "7.20"]  # run without its top-5 error
    assert "- ImageNet top-5: depth 152, width 1, 640,000 iterations of batch 256, fp32; seeds 0" in text
    for depth, iterations, errors in ((152, "640,000", ["25.10 (n=1)", "7.50 (n=1)"]),
                                      (26, "640,000", ["35.10 (n=1)", "17.50 (n=1)"])):  # fmt: skip
        rows = rows_of(text, f"ImageNet, depth {depth}, {iterations} iterations, fp32")
        assert rows[""] == ["alpha", "ImageNet top-1", "ImageNet top-5"]
        assert rows["proposed 4-bit"] == ["1/8", *errors]
        assert rows["naive 8-bit"] == ["1/4", "not run", "not run"]


def test_a_papers_top_5_error_is_no_top_1_error_in_the_file() -> None:
    cells = tables.summarise([], LABELS)
    (imagenet,) = cells[(cells["dataset"] == "imagenet") & (cells["mode"] == "exact")].to_dict("records")
    assert imagenet["paper_top5_error_percent"] == 7.20
    assert np.isnan(imagenet["paper_error_percent"])


def test_a_cell_is_the_mean_over_seeds_with_the_sample_deviation() -> None:
    errors = [2.0, 2.5, 4.1]
    found = [replace(DIGITS, seed=seed, value=value) for seed, value in enumerate(errors)]
    rows = rows_of(table(*found), "digits, depth 29, 300 iterations, fp32")
    assert rows["proposed 4-bit"] == ["1/8", f"{mean(errors):.2f} ± {stdev(errors):.2f} (n=3)"]
    assert rows["exact"] == ["1", "not run"]


def test_one_run_has_no_deviation() -> None:
    rows = rows_of(table(replace(DIGITS, value=2.0)), "digits, depth 29, 300 iterations, fp32")
    assert rows["proposed 4-bit"] == ["1/8", "2.00 (n=1)"]


def test_the_newer_run_of_a_seed_counts_whatever_the_machine_and_the_experiment() -> None:
    older = replace(DIGITS, value=9.0)
    newer = replace(DIGITS, value=2.0, date="2026-02-01T00:00:00+00:00", device="another CPU", experiment="demo")
    text = table(newer, older)
    assert rows_of(text, "digits, depth 29, 300 iterations, fp32")["proposed 4-bit"] == ["1/8", "2.00 (n=1)"]
    assert "another CPU" in text
    assert "a CPU, 2 threads" not in text


def test_the_papers_cell_takes_our_run_and_other_recipes_have_tables_of_their_own() -> None:
    cell = replace(DIGITS, dataset="cifar10", depth=164, iterations=64000, batch_size=128, value=5.5)
    shallow = replace(cell, depth=29, iterations=2000, value=20.0)
    text = table(cell, shallow, replace(cell, settings={"mode.clip": 2.0}, value=6.0))
    rows = rows_of(text, "The paper's cells")
    assert rows[""][1:4] == ["CIFAR-10, fp32", "paper", "CIFAR-100"]
    assert rows["proposed 4-bit"][1:3] == ["5.50 (n=1)", "5.49 ± 0.16"]
    assert rows_of(text, "CIFAR-10, depth 29, 2,000 iterations, fp32")["proposed 4-bit"] == ["1/8", "20.00 (n=1)"]
    assert rows_of(text, "CIFAR-10, depth 164, 64,000 iterations, fp32")["proposed 4-bit"] == ["1/8", "6.00 (n=1)"]
    assert "fp32, mode.clip=2.0; seeds 0;" in text


def test_the_papers_figure_stands_beside_every_precision_and_its_own_recipe_alone() -> None:
    cell = replace(DIGITS, dataset="cifar10", depth=164, iterations=64000, batch_size=128)
    for precision, papers in (("tf32", 5.49), ("bf16", 5.49), ("fp32", 5.49)):
        found = tables.summarise([replace(cell, precision=precision)], LABELS)
        (ours,) = found[found["n"] > 0].to_dict("records")
        assert (ours["precision"], ours["paper_error_percent"]) == (precision, papers)
    other = replace(cell, settings={"mode.clip": 2.0})
    found = tables.summarise([other], LABELS)
    (ours,) = found[found["n"] > 0].to_dict("records")
    assert ours["paper_error_percent"] is None or ours["paper_error_percent"] != ours["paper_error_percent"]
    assert paper.error_percent(records.key(other, records.GROUP), "4bit") == (None, None)


def test_precisions_of_a_cell_stand_side_by_side_and_the_papers_figure_after_them() -> None:
    cell = replace(DIGITS, dataset="cifar10", depth=164, iterations=64000, batch_size=128)
    values = {"fp32": 5.4, "bf16": 5.6, "tf32": 5.5}
    text = table(*(replace(cell, precision=precision, value=value) for precision, value in values.items()))
    rows = rows_of(text, "The paper's cells")
    assert rows[""][1:6] == ["CIFAR-10, tf32", "CIFAR-10, bf16", "CIFAR-10, fp32", "paper", "CIFAR-100"]
    assert rows["proposed 4-bit"][1:5] == ["5.50 (n=1)", "5.60 (n=1)", "5.40 (n=1)", "5.49 ± 0.16"]


def test_digits_come_last_and_conditions_are_said() -> None:
    text = table(DIGITS, replace(DIGITS, dataset="cifar10", depth=29))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    titles = (
        "The paper's cells",
        "CIFAR-10, depth 29, 300 iterations, fp32",
        "digits, depth 29, 300 iterations, fp32",
        "What ran where",
    )
    assert headings == [f"## {title}" for title in titles]
    assert (
        "\n- digits: depth 29, width 1, 300 iterations of batch 64, fp32; seeds 0; a CPU, 2 threads; torch 2.11.0; "
        "commit 012345678.\n"
    ) in text
    assert "- CIFAR-100: depth 164, width 1, 64,000 iterations of batch 128; not run." in text


def test_a_source_that_differed_from_its_commit_or_had_none_is_said() -> None:
    assert "commit 012345678 with changes." in table(replace(DIGITS, is_dirty=True))
    assert "commit unknown." in table(replace(DIGITS, commit=None, is_dirty=None))


@pytest.mark.parametrize(("mode", "label"), [("exact-one-copy", "exact, one copy"), ("checkpoint", "checkpoint")])
def test_rows_of_the_baselines_come_only_once_they_are_run(mode: str, label: str) -> None:
    assert label not in table(DIGITS).split("## digits")[1]
    rows = rows_of(table(replace(DIGITS, mode=mode, bits=None, value=3.0)), "digits, depth 29, 300 iterations, fp32")
    (row,) = [row for name, row in rows.items() if name.startswith(label)]
    assert row[1] == "3.00 (n=1)"


def test_a_mode_of_the_users_own_gets_a_row() -> None:
    rows = rows_of(
        table(DIGITS, replace(DIGITS, mode="4bit-narrow", value=3.0)), "digits, depth 29, 300 iterations, fp32"
    )
    assert list(rows)[-1] == "4bit-narrow"
    assert rows["4bit-narrow"] == ["-", "3.00 (n=1)"]


def test_a_training_that_failed_says_how_unless_another_seed_was_measured() -> None:
    failed = replace(DIGITS, metric="failed", failure="does not fit: CUDA out of memory", seed=1)
    assert rows_of(table(failed), "digits, depth 29, 300 iterations, fp32")["proposed 4-bit"] == ["1/8", "does not fit"]
    rows = rows_of(table(failed, replace(DIGITS, value=2.0)), "digits, depth 29, 300 iterations, fp32")
    assert rows["proposed 4-bit"] == ["1/8", "2.00 (n=1)"]


def test_a_seed_that_diverged_is_told_beside_the_mean_of_the_others() -> None:
    diverged = replace(DIGITS, metric="failed", failure="diverged: the loss is nan at iteration 7", seed=1)
    assert rows_of(table(diverged), "digits, depth 29, 300 iterations, fp32")["proposed 4-bit"] == ["1/8", "diverged"]
    rows = rows_of(table(diverged, replace(DIGITS, value=2.0)), "digits, depth 29, 300 iterations, fp32")
    assert rows["proposed 4-bit"] == ["1/8", "2.00 (n=1, 1 diverged)"]


def test_other_metrics_do_not_count() -> None:
    assert "## digits" not in table(replace(DIGITS, metric="train_seconds"))


def test_a_papers_value_in_a_record_is_the_one_of_its_row() -> None:
    assert paper.ERROR_PERCENT[paper.CIFAR10]["4bit"] == (5.49, 0.16)
    assert paper.ERROR_PERCENT[paper.CIFAR100]["4bit"] == (23.58, 0.30)
    assert {mode for row in paper.ERROR_PERCENT.values() for mode in row} <= set(LABELS.modes)


def test_the_task_writes_its_files_and_prints_the_readable_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records.write([replace(DIGITS, value=2.0)], Path("results/runs/a"))
    records.write([replace(DIGITS, value=2.5, seed=1)], Path("results/runs/b"))
    assert cli.main(["task=tables"]) == 0
    text = Path("results/tables/errors.md").read_text(encoding="utf-8")
    names = (
        "memory",
        "batches",
        "times",
        "gradients",
        "converted",
        "kernels",
        "errors",
    )  # errors last, where the reader of a demo looks
    texts = [Path(f"results/tables/{name}.md").read_text(encoding="utf-8") for name in names]
    assert capsys.readouterr().out == "\n".join(texts)
    assert cli.main(["task=tables", "task.tables=[errors,times]"]) == 0
    assert capsys.readouterr().out == "\n".join([texts[-1], texts[2]])
    assert texts[-1] == text
    with Path("results/tables/errors.csv").open(newline="") as file:
        rows = {(row["dataset"], row["mode"]): row for row in csv.DictReader(file)}
    cell = rows["digits", "4bit"]
    assert float(cell["error_percent"]) == 2.25
    assert float(cell["error_percent_std"]) == pytest.approx(stdev([2.0, 2.5]), rel=1e-12)  # one rounding or two
    assert (cell["n"], cell["seeds"], cell["alpha"]) == ("2", "0, 1", "1/8")
    assert rows["digits", "exact"]["n"] == "0"
    assert rows["digits", "exact"]["error_percent"] == ""
    assert rows["cifar10", "exact"]["paper_error_percent"] == "5.36"
    assert len(records.collect(Path("results"))) == 2


def test_a_fresh_clone_shows_the_same_tables_without_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records.write([DIGITS], Path("results/runs/a"))
    assert cli.main(["task=tables"]) == 0
    first = capsys.readouterr().out
    Path("results/runs/a/records.json").unlink()
    assert cli.main(["task=tables"]) == 0
    assert capsys.readouterr().out == first


def test_every_cell_that_ran_tells_how_long_where_and_when() -> None:
    runs = [replace(DIGITS, seed=seed, date=f"2026-11-2{seed}T09:00:00+00:00") for seed in (0, 1)]
    times = [
        replace(run, metric="train_seconds", unit="s", value=seconds)
        for run, seconds in zip(runs, (60, 90), strict=True)
    ]
    rows = rows_of(table(*runs, *times, replace(DIGITS, mode="exact", seed=7)), "What ran where")
    assert rows[""] == ["images", "depth", "iterations", "precision", "n", "minutes", "on", "dates"]
    assert rows["proposed 4-bit"] == [
        "digits",
        "29",
        "300",
        "fp32",
        "2",
        "1.2",
        "a CPU, 2 threads",
        "2026-11-20, 2026-11-21",
    ]
    assert rows["exact"][5] == "-"
    assert "What ran where" not in table()
