"""task=converted-runtime: steps of other networks, converted, from the command line to the table."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runners import cli, records
from runners.records import Record
from runners.tasks import converted_runtime
from runners.timing import Call
from runners.training import models

ARGUMENTS = [
    "task=converted-runtime", "mode=4bit", "task.model=resnet18", "task.image_size=32", "task.steps=4",
    "dataset.batch_size=4", "gpu.device=cpu",
]  # fmt: skip


def timed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]]) -> list[Record]:
    """Run the task with these seconds [turns, networks] in place of a clock's."""

    def take_turns(calls: list[Call], turns: int, **_: Any) -> Tensor:
        assert (turns, len(calls)) == (len(seconds), len(seconds[0]))
        for call in calls:
            call()
        return torch.tensor(seconds, dtype=torch.float64)

    monkeypatch.setattr(converted_runtime, "take_turns", take_turns)
    assert cli.main([*ARGUMENTS, *arguments]) == 0
    return records.collect(Path("results"))


def test_records_and_the_table_have_times_and_ratios_of_steps_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seconds = [[4.0, 5.0, 6.0], [8.0, 8.0, 8.0], [4.0, 5.0, 8.0], [4.0, 5.0, 8.0]]
    found = timed(["task.modes=[8bit,4bit,8bit]", "task.channels_last=true"], monkeypatch, seconds)
    of = {(r.mode, r.metric): r for r in found}
    assert len(of) == len(found) == 2 * 3 - 1  # no ratio of exact to itself
    assert [of[mode, "seconds_per_sample"].value for mode in ("exact", "4bit", "8bit")] == [1.0, 1.25, 2.0]
    assert (of["4bit", "ratio_to_exact"].value, of["8bit", "ratio_to_exact"].value) == (1.25, 1.75)
    exact, coded = of["exact", "seconds_per_sample"], of["4bit", "ratio_to_exact"]
    assert (exact.n, exact.bits, exact.kernels, coded.n, coded.bits) == (4, None, "stock", 4, 4)
    assert coded.kernels in ("c++", "torch")
    assert coded.settings == {"model": "resnet18", "image_size": 32, "channels_last": True}
    assert "resnet18, 4bit: 1.250 times PyTorch's own (20 to 80 %: 1.150 to 1.250)" in capsys.readouterr().out
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet18"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "resnet18, 32, 4, fp32, channels-last", "1e+03 ms", "1.750 times (1.300 to 2.000)",
        "1.250 times (1.150 to 1.250)",
    ]  # fmt: skip


def test_other_machines_and_memory_stand_in_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["task=explain", "mode=4bit", "task.model=resnet18", "task.image_size=32"]) == 0
    found = timed([], monkeypatch, [[1.0, 1.0]] * 4)
    elsewhere = [Record(**{**vars(r), "device": "NVIDIA Z"}) for r in found if r.task == "converted-runtime"]
    records.write(elsewhere, Path("results/runs/elsewhere"))
    capsys.readouterr()
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.startswith("## ")]
    assert len(titles) == 3
    assert titles[-1] == "## Memory: peak (saved)"
    assert "## Time of a step, NVIDIA Z" in titles
    assert "n = 4; kernels " in out


@pytest.mark.parametrize("name", ["unet", "googlenet"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_networks_of_other_outputs_train_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net's logits are per pixel; GoogLeNet has three heads."""
    monkeypatch.chdir(tmp_path)
    made: list[nn.Module] = []
    own = converted_runtime._timed

    def timed(cell: Any, model: nn.Module, *arguments: Any) -> Any:
        made.append(model)
        return own(cell, model, *arguments)

    monkeypatch.setattr(converted_runtime, "_timed", timed)
    assert cli.main([*ARGUMENTS, f"task.model={name}", "task.image_size=64", "task.steps=1", "gpu.precision=bf16"]) == 0
    assert {r.precision for r in records.collect(Path("results"))} == {"bf16"}
    stock, coded = (sum(p.detach().double().abs().sum() for p in model.parameters()) for model in made)
    assert stock == coded  # the rate is 0, so that both keep their weights


def test_what_does_not_fit_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def timed_unless_exact(cell: Any, *arguments: Any) -> Any:
        if cell.mode.name == "exact":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return own(cell, *arguments)

    own = converted_runtime._timed
    monkeypatch.setattr(converted_runtime, "_timed", timed_unless_exact)
    found = timed([], monkeypatch, [[1.0]] * 4)
    assert [(r.mode, r.metric) for r in found] == [("4bit", "seconds_per_sample")]
    assert "does not fit: CUDA out of memory. Tried to allocate 9 GiB.; exact is not timed" in capsys.readouterr().err
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    assert "| 250 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.model=resnet5"], "task.model=resnet5: must be unet or a classifier of torchvision (resnet50"),
        (["task.model=vit_b_16"], "task.model=vit_b_16 does not take images of 32 pixels"),
        (["dataset.batch_size=1"], "task.model=resnet18 does not take images of 32 pixels: Expected more than 1 value"),
        (["mode=exact"], "mode=exact: does not convert a network"),
        (["task.modes=[checkpoint]"], "mode=checkpoint: does not convert a network"),
        (["task.modes=[4bits]"], "task.modes=4bits is not allowed: choose one of 2bit, "),
        (["task.steps=0"], "task.steps=0 is not allowed: it is a whole number, at least 1"),
        (["gpu.kernels=torch"], "gpu.kernels=torch: a converted network chooses by its device"),
        (["gpu.cuda_graph=true"], "gpu.cuda_graph=true: task=converted-runtime captures no graph"),
    ],
)
def test_what_it_cannot_time_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([*ARGUMENTS, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_images_are_tried_before_weights_are_made() -> None:
    with pytest.raises(ValueError, match=r"task\.model=alexnet does not take images of 32 pixels"):
        models.build("alexnet", torch.Size((2, 3, 32, 32)))
