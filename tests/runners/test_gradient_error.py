"""runners/tasks/gradient_error.py: the arithmetic on made-up gradients, and the task from command line to picture."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from runners import cli, records
from runners.tasks.gradient_error import compare

TINY = ["task=gradient-error", "dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=8", "task.steps=3",
        "gpu=cpu", "gpu.kernels=torch", "run=a"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def medians(*arguments: str) -> dict[str, float]:
    assert cli.main([*TINY, *arguments]) == 0
    (file,) = Path("results/runs").glob("a-*/records.json")
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("task.checkpoint=")]
    settings = {"checkpoint": Path(given[0]).stem if given else None}
    assert all(record.settings == settings for record in records.read(file))
    return {record.metric: record.value for record in records.read(file)}


def test_error_cosine_and_spread_by_hand() -> None:
    exact = [torch.tensor([3.0, 4.0]).double(), torch.tensor([5.0, 4.0]).double()]
    ours = [torch.tensor([3.0, 4.5]).double(), torch.tensor([-4.0, 5.0]).double()]
    (row,) = compare([({"a": e}, {"a": o}) for e, o in zip(exact, ours, strict=True)])
    assert row["layer"] == "a"
    errors = [0.5 / 5, math.hypot(9, 1) / math.hypot(5, 4)]
    cosines = [(9 + 18) / (5 * math.hypot(3, 4.5)), 0.0]
    assert row["error_median"] == pytest.approx(sum(errors) / 2)
    assert row["error_low"] == pytest.approx(errors[0] + 0.2 * (errors[1] - errors[0]))
    assert row["cosine_median"] == pytest.approx(sum(cosines) / 2)
    assert row["spread_median"] == pytest.approx(1 / math.hypot(4, 4))


def test_fewer_bits_are_further_from_exact() -> None:
    error = {mode: medians(f"mode={mode}")["gradient_error"] for mode in ("exact-one-copy", "8bit", "4bit", "2bit")}
    # The same arithmetic in another order: float32 rounds by 1e-7, some hundred times over.
    assert error["exact-one-copy"] < 1e-4 < error["8bit"] < error["4bit"] < error["2bit"] < 1


def test_every_layer_has_a_row_and_the_figure_is_drawn_again(capsys: pytest.CaptureFixture[str]) -> None:
    medians("mode=4bit")
    name = "a-gradient-error-batch8"
    layers = pd.read_csv(f"results/gradients/{name}.csv")
    assert len(layers) == 11
    assert (layers["layer"].iloc[0], layers["layer"].iloc[-1]) == ("stem", "classifier")
    # It reads the last activation, which is saved at full precision; float32 rounds sums of 8 products by 8 2^-24.
    assert layers["error_median"].iloc[-1] < 1e-5
    out, _ = capsys.readouterr()
    assert "exact, between batches: spread " in out
    picture = Path(f"results/figures/{name}.png")
    drawn = picture.read_bytes()
    picture.unlink()
    assert cli.main(["task=plots"]) == 0
    assert picture.read_bytes() == drawn


def test_weights_come_from_a_checkpoint_of_any_mode() -> None:
    train = ["task=train", "mode=exact", "dataset.iterations=2", "run=b"]
    assert cli.main([argument for argument in TINY if not argument.startswith(("task", "run"))] + train) == 0
    (checkpoint,) = Path("results/runs/b").glob("checkpoint-*")
    fresh = medians("mode=4bit")
    for file in Path("results/runs").glob("a-*/records.json"):
        file.unlink()
    assert medians("mode=4bit", f"task.checkpoint={checkpoint}") != fresh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode=fewer-features"], "mode=fewer-features: its layers and gradients have another width than exact"),
        (["task.checkpoint=nowhere.pt"], "task.checkpoint=nowhere.pt: there is no such file"),
        (["dataset.batch_size=5000"], "dataset.batch_size=5000: the training set has 1297 images"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TINY, *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blpa-run: error: ")]
    assert [line.removeprefix("blpa-run: error: ")[: len(message)] for line in lines] == [message]
