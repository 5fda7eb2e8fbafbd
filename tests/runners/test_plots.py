"""runners/reporting/figures.py: which curves are kept, and what is drawn of them. The curves are made up."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_records import RECORD

from runners import cli, records
from runners.records import Record
from runners.reporting import curves, figures
from runners.reporting.labels import read_labels
from runners.reporting.networks import TABLES, cells

HEADER = "iteration,learning_rate,train_loss,train_error_percent,test_loss,test_error_percent\n"
RUN = replace(RECORD, iterations=300)
LABELS = read_labels()


def finished_run(results: Path, name: str, record: Record, errors: dict[int, float]) -> None:
    run_dir = results / "runs" / name
    records.write([replace(record, value=list(errors.values())[-1])], run_dir)
    rows = (f"{iteration},0.1,1.5,{error},{error / 50},{error}\n" for iteration, error in errors.items())
    (run_dir / "metrics.csv").write_text(HEADER + "".join(rows))


def test_curves_outlive_the_runs(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 0.1 + 0.2, 300: 2.5})
    gathered = curves.gather(tmp_path)
    assert list(gathered["test_error_percent"]) == [0.1 + 0.2, 2.5]
    kept = (tmp_path / "curves.csv").read_bytes()
    for file in (tmp_path / "runs" / "a").iterdir():
        file.unlink()
    pd.testing.assert_frame_equal(curves.gather(tmp_path).reset_index(drop=True), gathered.reset_index(drop=True))
    assert (tmp_path / "curves.csv").read_bytes() == kept


def test_top_5_errors_are_kept_beside_curves_without(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {300: 2.5})
    curves.gather(tmp_path)
    assert "top5" not in (tmp_path / "curves.csv").read_text()
    finished_run(tmp_path, "b", replace(RUN, seed=1), {300: 3.5})
    (tmp_path / "runs" / "b" / "metrics.csv").write_text(
        f"{HEADER.strip()},test_top5_error_percent\n300,0.1,1.5,3.5,0.07,3.5,0.5\n"
    )
    for _ in range(2):  # the second time from curves.csv too
        top5 = curves.gather(tmp_path)["test_top5_error_percent"]
        assert top5.iloc[1] == 0.5
        assert top5.isna().iloc[0]


def test_numbers_of_curves_come_back_to_the_last_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    errors = {k: float(value) for k, value in enumerate(generator.uniform(0, 100, 500) ** 3, start=1)}
    finished_run(tmp_path, "a", replace(RUN, iterations=500), errors)
    assert list(curves.gather(tmp_path)["test_error_percent"]) == list(errors.values())
    (tmp_path / "runs" / "a" / "records.json").unlink()
    assert list(curves.gather(tmp_path)["test_error_percent"]) == list(errors.values())  # from curves.csv


def test_the_newer_curve_of_a_cell_and_seed_replaces_the_older_whole(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 50.0, 200: 30.0, 300: 10.0})
    curves.gather(tmp_path)
    finished_run(tmp_path, "b", replace(RUN, date="2026-02-01T00:00:00+00:00", device="other"), {150: 40.0, 300: 5.0})
    finished_run(tmp_path, "c", replace(RUN, seed=1), {300: 7.0})
    gathered = curves.gather(tmp_path)
    assert list(gathered[gathered["seed"] == 0]["iteration"]) == [150, 300]
    assert list(gathered[gathered["seed"] == 1]["test_error_percent"]) == [7.0]


def test_a_run_that_is_not_finished_is_not_drawn(tmp_path: Path) -> None:
    finished_run(tmp_path, "started-anew", RUN, {100: 50.0})
    finished_run(tmp_path, "no-metrics", replace(RUN, seed=1), {300: 7.0})
    (tmp_path / "runs" / "no-metrics" / "metrics.csv").unlink()
    finished_run(tmp_path, "empty", replace(RUN, seed=2), {300: 7.0})
    (tmp_path / "runs" / "empty" / "metrics.csv").write_text(HEADER)
    assert curves.gather(tmp_path).empty
    assert not (tmp_path / "curves.csv").exists()


def drawn(tmp_path: Path) -> Figure:
    return figures.draw(curves.gather(tmp_path), LABELS)


def test_a_line_is_the_mean_over_seeds_and_carries_its_name(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 50.0, 300: 2.0})
    finished_run(tmp_path, "b", replace(RUN, seed=1), {100: 40.0, 300: 4.0})
    finished_run(tmp_path, "c", replace(RUN, mode="exact", bits=None), {100: 45.0, 300: 3.0})
    (axes,) = drawn(tmp_path).axes
    lines = {to_hex(line.get_color(), keep_alpha=False).upper(): line for line in axes.get_lines()}
    assert set(lines) == {LABELS.mode("4bit").colour, LABELS.mode("exact").colour}
    assert np.asarray(lines[LABELS.mode("4bit").colour].get_ydata()).tolist() == [45.0, 3.0]
    assert np.asarray(lines[LABELS.mode("4bit").colour].get_xdata()).tolist() == [100, 300]
    assert len(axes.collections) == 1  # a band where there are several seeds, none where there is one
    assert {text.get_text() for text in axes.texts} == {"exact  3.00 %", "proposed 4-bit  3.00 %"}
    assert "n=1 to 2" in axes.get_title(loc="left")


def test_the_number_of_seeds_is_that_behind_each_point(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 50.0, 300: 2.0})
    finished_run(tmp_path, "b", replace(RUN, seed=1), {300: 4.0})
    (axes,) = drawn(tmp_path).axes
    assert "n=1 to 2" in axes.get_title(loc="left")


def test_names_of_lines_that_end_together_do_not_overlap(tmp_path: Path) -> None:
    for mode in LABELS.modes:
        finished_run(tmp_path, mode, replace(RUN, mode=mode), {100: 50.0, 300: 2.0})
    figure = drawn(tmp_path)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == len(LABELS.modes)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


def test_an_error_of_zero_is_drawn_on_the_axis(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 50.0, 300: 0.0})
    (axes,) = drawn(tmp_path).axes
    assert np.min(axes.get_lines()[0].get_ydata()) == axes.get_ylim()[0] == figures.TICKS[0]
    assert axes.texts[0].get_text() == "proposed 4-bit  0.00 %"


def test_an_error_of_a_hundred_throughout_is_drawn_on_the_axis(tmp_path: Path) -> None:
    finished_run(tmp_path, "a", RUN, {100: 100.0, 300: 100.0})
    (axes,) = drawn(tmp_path).axes
    assert axes.get_ylim() == (50, 100)


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.45, 0.55, 1.0]),
        ([0.40, 0.45, 0.46], [0.3366667, 0.4366667, 0.5366667]),
    ],
)
def test_spread_keeps_a_gap_and_moves_as_little_as_it_can(wanted: list[float], placed: list[float]) -> None:
    assert figures.spread(wanted, 0.1) == pytest.approx(placed, abs=1e-6)  # the digits given above


def test_the_task_draws_a_file_a_group_the_same_from_a_fresh_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run(Path("results"), "a", RUN, {100: 50.0, 300: 2.0})
    finished_run(Path("results"), "b", replace(RUN, depth=56, width=0.25, settings={"mode.clip": 2.0}), {300: 3.0})
    assert cli.main(["task=plots"]) == 0
    groups = ("depth29-width1-300x64-fp32", "depth56-width0.25-300x64-fp32-mode.clip-2.0")
    files = [Path(f"results/figures/error-digits-{group}.png") for group in groups]
    assert sorted(Path("results/figures").iterdir()) == files
    assert capsys.readouterr().out == "".join(f"{file}\n" for file in files)
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    for file in (*Path("results/runs/a").iterdir(), *Path("results/runs/b").iterdir(), *files):
        file.unlink()
    assert cli.main(["task=plots"]) == 0
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before


def test_nothing_to_draw_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["task=plots"]) == 0
    assert "nothing to draw" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_over_depth_a_line_takes_what_was_measured_and_circles_are_the_papers() -> None:
    table = next(table for table in TABLES if table.name == "batches")
    batch = replace(
        RECORD,
        task="max-batch",
        metric="largest_batch",
        dataset="cifar10",
        predicted=True,
        settings={"memory_gib": 11.0, "allowance_mib": 512},
    )
    found = [replace(batch, depth=164, value=6290.0), replace(batch, depth=254, value=4246.0)]
    found += [replace(found[0], value=6200.0, predicted=False, device="a card")]
    found += [replace(batch, depth=254, mode="exact", value=0.0)]  # does not fit: nothing to draw but the paper's
    shown = cells(table, found, LABELS)
    (axes,) = figures.draw_over_depth(table, table.conditions(found[0]), shown, LABELS).axes
    ours, theirs = axes.lines
    assert list(ours.get_xdata()) == [164, 254]
    assert list(ours.get_ydata()) == [6200.0, 4246.0]
    assert sorted(zip(theirs.get_xdata(), theirs.get_ydata(), strict=True)) == [
        (164, 2522), (254, 2154), (488, 1468), (1001, 876),
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["proposed 4-bit  4246"]
    assert to_hex(ours.get_color()) == to_hex(theirs.get_color()) == LABELS.mode("4bit").colour.lower()


def test_the_task_draws_tables_over_two_depths_or_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    time = replace(RECORD, task="runtime", metric="seconds_per_sample", batch_size=64, device="a CPU")
    records.write([time, replace(time, batch_size=32)], Path("results/runs/a"))
    records.write([replace(time, depth=56)], Path("results/runs/b"))
    assert cli.main(["task=plots"]) == 0
    (figure,) = Path("results/figures").iterdir()
    assert figure.name == "times-digits-size-images-fp32-batch-64-a-CPU.png"
