"""runners/reporting/networks.py: what stands in a cell, what where nothing was run, and what shares a table."""

from dataclasses import replace

import pytest
from test_records import RECORD
from test_tables import rows_of

from runners.records import Record
from runners.reporting.labels import read_labels
from runners.reporting.networks import TABLES, Table, cells, page
from runners.reporting.pages import markdown

MEMORY, BATCHES, TIMES, GRADIENTS = TABLES
LABELS = read_labels()
CARD = {"memory_gib": 11.0, "allowance_mib": 512}
OTHER_CARD = {"memory_gib": 80.0, "allowance_mib": 512}
BATCH = replace(
    RECORD, task="max-batch", metric="largest_batch", dataset="cifar10", depth=164, value=6290.0, predicted=True,
    batch_size=0, settings=CARD, commit="0123456789abcdef", device="none",
)  # fmt: skip
TIME = replace(
    RECORD, task="runtime", metric="seconds_per_sample", dataset="cifar10", depth=164, value=0.0043, batch_size=128,
    device="a card",
)  # fmt: skip
AT_LARGEST = {**CARD, "largest_batch": True}
AT_LARGEST_TEXT = "largest batch in 11 GiB less 512 MiB"
ERROR = replace(
    RECORD, task="gradient-error", metric="gradient_error", dataset="digits", depth=29, value=0.1612, batch_size=64,
    settings={"checkpoint": None},
)  # fmt: skip
TITLE = "CIFAR-10-size images, fp32, 11 GiB less 512 MiB"


def read(table: Table, found: list[Record]) -> str:
    return markdown(page(table, cells(table, found, LABELS), LABELS))


def batches(*found: Record) -> str:
    return read(BATCHES, list(found))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_where_nothing_was_measured_the_command_is_named(table: object) -> None:
    text = read(table, [])
    assert f"Nothing has been measured yet: `blpa-run task={table.task}" in text


def test_the_papers_largest_batches_stand_beside_ours_at_its_own_budget() -> None:
    text = batches(BATCH, replace(BATCH, settings=OTHER_CARD, value=99.0))
    rows = rows_of(text, TITLE)
    assert rows[""] == ["1001 (4x)", "1001", "488", "254", "164"]
    assert rows["proposed 4-bit"] == ["not run"] * 4 + ["6290 (predicted)"]
    assert rows["checkpoint (recomputed)"] == ["not run"] * 5
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["- in the paper", "182", "876", "1468", "2154", "2522"] in lines
    assert ["- in the paper", "26", "134", "264", "474", "688"] in lines
    assert list(rows_of(text, TITLE.replace("11", "80"))) == ["", "-" * 16, "proposed 4-bit"]


def test_images_of_imagenets_size_have_tables_of_their_own_for_each_card() -> None:
    imagenet = replace(BATCH, dataset="imagenet", depth=152, mode="4bit-pool", value=685.0)
    text = batches(BATCH, imagenet, replace(imagenet, settings=OTHER_CARD, value=5380.0))
    for gib, value in ((11, "685 (predicted)"), (80, "5380 (predicted)")):
        rows = rows_of(text, f"ImageNet-size images, fp32, {gib} GiB less 512 MiB")
        assert rows[""] == ["152"]
        assert rows["4-bit, max pool too (ours)"] == [value]
        assert "- in the paper" not in rows


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp32"])
def test_the_papers_figures_stand_beside_every_precision(precision: str) -> None:
    rows = rows_of(batches(replace(BATCH, precision=precision)), TITLE.replace("fp32", precision))
    assert rows["- in the paper"] == ["182", "876", "1468", "2154", "2522"]
    timed = replace(TIME, precision=precision, settings=AT_LARGEST)
    rows = rows_of(read(TIMES, [timed]), f"CIFAR-10-size images, {precision}, {AT_LARGEST_TEXT}, a card")
    assert rows["- in the paper"][-1] == "4.3 ms"


def test_a_prediction_in_fp32_stands_beside_what_was_measured_in_tf32() -> None:
    """Their tensors have as many bytes. Where nothing was measured in tf32, it has no table."""
    tf32 = replace(BATCH, value=6210.0, predicted=False, device="a card", precision="tf32")
    text = batches(tf32, BATCH)
    assert rows_of(text, TITLE.replace("fp32", "tf32"))["proposed 4-bit"][-1] == "6210, 6290 (predicted)"
    assert rows_of(text, TITLE)["proposed 4-bit"][-1] == "6290 (predicted)"
    assert "tf32" not in batches(BATCH)
    assert "bf16" not in batches(replace(BATCH), replace(tf32, settings=OTHER_CARD))


def test_measured_and_predicted_stand_side_by_side() -> None:
    measured = replace(BATCH, value=6210.0, predicted=False, device="a card")
    text = batches(measured, BATCH)
    assert rows_of(text, TITLE)["proposed 4-bit"][-1] == "6210, 6290 (predicted)"
    assert "; measured on a card." in text


def test_a_measured_batch_says_where_expandable_segments_fit_more() -> None:
    expandable = replace(BATCH, value=6000.0, predicted=False, device="a card", segments="expandable")
    usual = replace(expandable, mode="exact", value=440.0, segments="usual")
    rows = rows_of(batches(BATCH, expandable, usual), TITLE)
    assert rows["proposed 4-bit"][-1] == "6000 (expandable), 6290 (predicted)"
    assert rows["exact"][-1] == "440"


def test_the_newer_answer_counts() -> None:
    newer = replace(BATCH, value=7.0, date="2027-01-01T00:00:00+00:00")
    assert rows_of(batches(newer, BATCH), TITLE)["proposed 4-bit"][-1] == "7 (predicted)"


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        ("does not fit: CUDA out of memory", "does not fit"),
        ("does not compile: no code for this machine", "does not compile"),
        ("KeyError: 3", "failed"),
    ],
)
def test_a_cell_that_failed_says_how_unless_it_was_measured_too(failure: str, shown: str) -> None:
    failed = replace(BATCH, metric="failed", failure=failure, predicted=False, date="2027-01-01T00:00:00+00:00")
    assert rows_of(batches(failed), TITLE)["proposed 4-bit"][-1] == shown
    assert rows_of(batches(failed, BATCH), TITLE)["proposed 4-bit"][-1] == "6290 (predicted)"


def test_nothing_fits_where_the_batch_is_zero() -> None:
    assert rows_of(batches(replace(BATCH, value=0.0)), TITLE)["proposed 4-bit"][-1] == "does not fit (predicted)"


def test_times_are_by_the_sample_with_the_ratio_to_exact() -> None:
    ratio = replace(TIME, metric="ratio_to_exact", value=0.93)
    text = read(TIMES, [TIME, ratio, replace(TIME, mode="exact", value=0.0046)])
    rows = rows_of(text, "CIFAR-10-size images, fp32, batch 128, a card")
    assert rows["proposed 4-bit"] == ["4.3 ms (0.93 times exact)"]
    assert rows["exact"] == ["4.6 ms"]
    assert "in the paper" not in text  # its times are at no batch that it tells


def test_a_ratio_belongs_to_the_time_of_its_own_run() -> None:
    ratio = replace(TIME, metric="ratio_to_exact", value=0.93)
    later = replace(TIME, value=0.0099, date="2027-01-01T00:00:00+00:00")
    rows = rows_of(read(TIMES, [TIME, ratio, later]), "CIFAR-10-size images, fp32, batch 128, a card")
    assert rows["proposed 4-bit"] == ["9.9 ms"]


def test_times_at_the_largest_batch_stand_beside_the_papers_and_tell_the_batch() -> None:
    four_bits = replace(TIME, settings=AT_LARGEST, batch_size=6290)
    own = [four_bits, replace(four_bits, mode="2bit", batch_size=9158)]
    text = read(TIMES, own)
    rows = rows_of(text, f"CIFAR-10-size images, fp32, {AT_LARGEST_TEXT}, a card")
    assert rows["proposed 4-bit"] == ["not run"] * 4 + ["4.3 ms (batch 6290)"]
    assert rows["2-bit (ours)"][-1] == "4.3 ms (batch 9158)"
    assert rows["- in the paper"] == ["101.6 ms", "26 ms", "12.7 ms", "6.7 ms", "4.3 ms"]


def test_times_of_two_machines_share_no_table() -> None:
    text = read(TIMES, [TIME, replace(TIME, device="another card")])
    assert text.count("\n## ") == 2


def test_seeds_divide_gradients_and_no_times() -> None:
    assert "## digits, fp32, batch 64, at initialisation, seed 1\n" in read(GRADIENTS, [
        replace(ERROR, metric=f"gradient_{metric}", seed=1) for metric in ("error", "cosine", "spread")
    ])  # fmt: skip
    assert read(TIMES, [TIME, replace(TIME, mode="exact", seed=1)]).count("\n## ") == 1


def test_gradients_end_with_the_spread_of_exact() -> None:
    found = [
        replace(ERROR, metric=metric, value=value, depth=depth)
        for depth in (11, 29)
        for metric, value in (("gradient_error", 0.1612), ("gradient_cosine", 0.98764), ("gradient_spread", 1.391))
    ]
    rows = rows_of(read(GRADIENTS, found), "digits, fp32, batch 64, at initialisation")
    assert rows[""] == ["29", "11"]
    assert rows["proposed 4-bit"] == ["0.161 (cosine 0.9876)"] * 2
    assert list(rows)[-1] == "exact, from batch to batch"
    assert rows["exact, from batch to batch"] == ["1.39", "1.39"]


def test_the_newest_run_tells_the_spread() -> None:
    older = [replace(ERROR, metric=f"gradient_{m}", value=1.0) for m in ("error", "cosine", "spread")]
    newer = [replace(r, mode="8bit", value=2.0, date="2027-01-01T00:00:00+00:00") for r in older]
    rows = rows_of(read(GRADIENTS, newer + older), "digits, fp32, batch 64, at initialisation")
    assert rows["exact, from batch to batch"] == ["2.00"]


def test_memory_is_per_sample_with_a_row_per_mode() -> None:
    step = replace(BATCH, task="memory", metric="step_peak_mib", batch_size=128, settings={}, value=2.345)
    rows = rows_of(
        read(MEMORY, [step, replace(step, mode="exact", value=10.0)]), "CIFAR-10-size images, fp32, batch 128"
    )
    assert (rows["exact"], rows["proposed 4-bit"]) == (["10.00"], ["2.35"])
