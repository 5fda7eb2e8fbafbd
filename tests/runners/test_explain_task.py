"""task=explain: other networks, converted, from the command line to the table."""

from pathlib import Path

import pytest
import torch
import torchvision
from support import refusal

import blpa
from blpa.memory import MIB
from runners import cli, records
from runners.training import models

ARGUMENTS = ["task=explain", "dataset.batch_size=16", "gpu.precision=fp32", "mode=4bit"]


def test_the_record_and_the_table_have_the_explanation_s_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*ARGUMENTS, "task.model=resnet18", "task.image_size=64"]) == 0
    assert "ResNet, 4 bits, input [16, 3, 64, 64] float32" in capsys.readouterr().out
    found = {(r.mode, r.metric): r for r in records.collect(Path("results"))}
    expected = blpa.explain(torchvision.models.resnet18(), torch.empty(16, 3, 64, 64), bits=4)
    for mode, counted in (("exact", expected.stock), ("4bit", expected.coded)):
        assert found[mode, "saved_mib"].value == counted.saved / 16 / MIB
        assert found[mode, "step_peak_mib"].value == counted.peak / 16 / MIB
        assert found[mode, "saved_mib"].settings == {"model": "resnet18", "image_size": 64}
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    stock, coded = expected.stock, expected.coded
    cells = [f"{counted.peak / 16 / MIB:.1f} ({counted.saved / 16 / MIB:.1f})" for counted in (stock, coded)]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet18, 64, 16, fp32"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == cells


@pytest.mark.parametrize("task", ["explain", "converted-runtime"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.model=resnet5"], "task.model=resnet5: must be unet or a classifier of torchvision (resnet50"),
        (["task.model=vit_b_16", "task.image_size=32"], "task.model=vit_b_16 does not take 16 images of 32 pixels"),
        (["dataset.batch_size=1", "task.image_size=32"], "task.model=resnet50 does not take 1 images of 32 pixels"),
        (["mode=exact"], "mode=exact: does not convert a network"),
        (["mode=naive-8bit"], "mode=naive-8bit: does not convert a network"),
        (["mode.name=exact"], "mode=exact: does not convert a network"),
        (["width=2"], "width=2.0: is of the paper's networks"),
    ],
)
def test_a_network_that_cannot_be_converted_is_refused(
    arguments: list[str], message: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refusal([*ARGUMENTS, *arguments, f"task={task}"], capsys)


def test_it_counts_in_fp32_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = refusal([*ARGUMENTS, "gpu.precision=bf16"], capsys)
    assert "gpu.precision=bf16: task=explain counts fp32" in found


def test_the_u_net_has_the_shapes_of_its_paper() -> None:
    with torch.device("meta"):
        net = models.UNet()
        assert net(torch.empty(2, 3, 64, 48)).shape == (2, 2, 64, 48)
    widths = [64, 128, 256, 512, 1024]
    down = zip([3, *widths], widths, strict=False)
    up = list(zip(widths[:0:-1], widths[-2::-1], strict=True))

    def double(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs

    weights = sum(double(*pair) for pair in (*down, *up)) + sum(4 * wide * narrow + narrow for wide, narrow in up)
    assert sum(parameter.numel() for parameter in net.parameters()) == weights + 2 * 64 + 2
