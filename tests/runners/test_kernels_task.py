"""runners/tasks/kernels.py and kernel_tables.py: what is measured, in what units, and how it reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import composed

from runners import cli, records
from runners.records import Record
from runners.reporting import kernels as kernel_tables
from runners.reporting.labels import read_labels, settings_text
from runners.reporting.pages import markdown
from runners.tasks import kernels

LABELS = read_labels()
TINY = [
    "task=kernels", "gpu=cpu", "gpu.kernels=torch", "task.steps=3", "task.elements=32768", "dataset.batch_size=2",
]  # fmt: skip
SHAPES = [(2048, 16), (2048, 64), (512, 32), (512, 128), (128, 64), (128, 256)]
"""Of the activations of 2 images, rows and channels."""
SECONDS = {"copy": 2.0, "channel_stats": 4.0, "normalise_rectify_encode": 4.0, "decode": 1.0, "backward": 8.0}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def measured(*arguments: str) -> list[Record]:
    assert cli.main([*TINY, *arguments]) == 0
    (file,) = Path("results/runs").glob("*-kernels-*/records.json")
    return records.read(file)


def test_every_function_and_bn_relu_conv_is_measured_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured("mode=4bit")
    shapes = [f"{rows} rows of {channels} channels" for rows, channels in [*SHAPES, (512, 64)]]
    units = [f"BN-ReLU-conv {unit}" for unit in ("1x1 64 to 16", "3x3 16 to 16", "1x1 16 to 64")]
    expected = {(name, shape) for name in SECONDS for shape in shapes}
    expected |= {(f"{name}_share_of_copy", shape) for name in list(SECONDS)[1:] for shape in shapes}
    expected |= {(name, unit) for name in ("unit_seconds", "unit_ratio_to_exact") for unit in units}
    assert {(record.metric, settings_text(record.settings)) for record in found} == expected
    assert len(found) == 7 * 5 + 7 * 4 + 3 * 3 * 2
    assert {record.batch_size for record in found if settings_text(record.settings) == shapes[-1]} == {0}
    assert {record.batch_size for record in found if settings_text(record.settings) != shapes[-1]} == {2}
    assert all(record.value > 0 and record.low <= record.value <= record.high and record.n == 3 for record in found)
    assert {record.mode for record in found if record.metric == "unit_seconds"} == {"4bit", "exact", "compiled"}
    ratios = [record.value for record in found if record.metric == "unit_ratio_to_exact" and record.mode == "exact"]
    assert ratios == [1.0] * 3
    capsys.readouterr()

    assert cli.main(["task=tables", "task.tables=[kernels]"]) == 0
    text = capsys.readouterr().out
    assert head_of(text, "functions at batch 2") == ["", "kernels", *shapes[:-1]]
    assert head_of(text, "functions beyond any cache") == ["", "kernels", *shapes[-1:]]
    assert all(name in text for name in (*SECONDS, *shapes, *units, "torch.compile"))


def head_of(text: str, title: str) -> list[str]:
    """The head of the one table whose title ends so."""
    lines = text.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("## ") and line.endswith(title)]
    return [cell.strip() for cell in lines[place + 2].strip("|").split("|")]


def test_the_network_s_own_activations_are_those_of_its_blocks() -> None:
    (config,) = composed(["task=kernels"])
    assert kernels.shapes(config) == [
        (128, 131072, 16), (128, 131072, 64), (128, 32768, 32), (128, 32768, 128), (128, 8192, 64), (128, 8192, 256),
    ]  # fmt: skip
    (narrow,) = composed(["task=kernels", "width=0.5", "dataset=digits", "dataset.batch_size=3"])
    assert kernels.shapes(narrow)[:2] == [(3, 3 * 8 * 8, 8), (3, 3 * 8 * 8, 32)]


@pytest.mark.parametrize(
    ("mode", "precision", "shares"),
    [
        # bytes an element over the copy's 8 (4 in bf16), times the copy's 2 seconds over the function's
        ("4bit", "fp32", {"channel_stats": 4 / 8 / 2, "normalise_rectify_encode": 8.5 / 8 / 2, "decode": 4.5 / 8 * 2,
                          "backward": 13 / 8 / 4}),
        ("8bit", "bf16", {"channel_stats": 2 / 4 / 2, "normalise_rectify_encode": 5 / 4 / 2, "decode": 3 / 4 * 2,
                          "backward": 8 / 4 / 4}),
        ("exact-one-copy", "fp32", {"channel_stats": 4 / 8 / 2, "normalise_rectify_encode": 8 / 8 / 2,
                                    "decode": 8 / 8 * 2, "backward": 20 / 8 / 4}),
    ],
)  # fmt: skip
def test_a_share_is_of_the_bytes_that_must_be_moved(
    mode: str, precision: str, shares: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(calls: list[object], turns: int, *_: object) -> torch.Tensor:
        taken = list(SECONDS.values()) if len(calls) == len(SECONDS) else [1.0] * len(calls)
        return torch.tensor([taken] * turns, dtype=torch.float64)

    monkeypatch.setattr(kernels, "_seconds", seconds)
    found = measured(f"mode={mode}", f"gpu.precision={precision}")
    values = {record.metric: record.value for record in found if record.metric.endswith("_share_of_copy")}
    assert values == {f"{name}_share_of_copy": pytest.approx(share) for name, share in shares.items()}


def test_stock_layers_have_no_kernels_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "mode=exact"]) == 1
    assert "task=kernels mode=exact: its layers are not ours; choose 8bit, 4bit or 2bit" in capsys.readouterr().err


def test_a_function_that_was_not_measured_everywhere_says_so() -> None:
    found = measured("mode=2bit")
    without = [r for r in found if (r.metric, r.settings) != ("decode", {"rows": 512, "channels": 32})]
    text = markdown(kernel_tables.page(kernel_tables.cells(without, LABELS), LABELS))
    at_batch, beyond = (line for line in text.splitlines() if line.startswith("| decode "))
    assert at_batch.count("not run") == 1
    assert "not run" not in beyond


def test_a_changed_mode_stands_beside_exact_at_the_same_unit() -> None:
    text = markdown(kernel_tables.page(kernel_tables.cells(measured("mode=4bit", "mode.clip=2.0"), LABELS), LABELS))
    assert head_of(text, "BN-ReLU-conv") == [
        "",
        *(f"BN-ReLU-conv {unit}" for unit in ("1x1 16 to 64", "3x3 16 to 16", "1x1 64 to 16")),
    ]


def test_nothing_measured_says_what_to_run() -> None:
    assert "`blpa-run task=kernels mode=4bit`" in markdown(kernel_tables.page([], LABELS))


def test_turns_are_taken_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = SimpleNamespace(now=0.0)

    def call(name: str, seconds: float) -> object:
        def run() -> None:
            log.append(name)
            clock.now += seconds

        return run

    monkeypatch.setattr("runners.timing.time.perf_counter", lambda: clock.now)
    seconds = kernels._seconds([call("a", 1.0), call("b", 2.0)], 2, "", torch.device("cpu"))
    assert seconds.tolist() == [[1.0, 2.0]] * 2
    assert log == ["a", "b", "b", "a", "a", "b"]  # once each to warm up
