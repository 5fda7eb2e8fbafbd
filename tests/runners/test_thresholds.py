"""runners/tasks/thresholds.py: which channels a code without guards would lose."""

import csv
from pathlib import Path

import pytest
import torch
from support import composed

from blpa.codec import Codec
from blpa.kernels.reference import REFERENCE
from runners import cli, records
from runners.tasks import thresholds
from runners.training.network import build as model

ARGUMENTS = ["task=thresholds", "dataset=digits", "mode=4bit", "depth=11", "width=0.25"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("bits", "above", "below"), [(8, 20, 20), (4, 40, 20), (2, 40, 40)])
def test_shares_are_of_the_channels_beyond_each_edge(bits: int, above: float, below: float) -> None:
    """Last edges at 3 - d: 2.977, 2.625 and 1.5."""
    gamma = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.0])
    beta = torch.tensor([-2.7, -8.0, 2.0, 0.1, 0.0])
    found = thresholds.shares(gamma, beta, Codec(bits))
    assert found == {
        "threshold above the bins": pytest.approx(above),
        "threshold below the bins": pytest.approx(0 if bits > 2 else 20),
        "threshold beyond clip": pytest.approx(20),
        "gamma not positive": pytest.approx(40),
    }
    mirrored = thresholds.shares(-gamma, -beta, Codec(bits))
    assert mirrored["threshold below the bins"] == pytest.approx(above)


def test_a_codec_without_guards_would_mask_just_those() -> None:
    """`zero` is clamped to L - 1 exactly where the threshold lies above the bins by half a bin or more."""
    codec = Codec(4)
    shift = torch.linspace(-6, 6, 4801)
    gamma = torch.ones_like(shift)
    is_clamped = codec.levels // 2 - (shift / codec.bin_width).round() > codec.levels - 1
    found = thresholds.shares(gamma, shift, codec)["threshold above the bins"]
    assert 100 * is_clamped.double().mean().item() == pytest.approx(found, abs=100 * 0.5 * codec.bin_width / 12 + 0.05)


def test_the_histogram_counts_every_channel_once() -> None:
    gamma = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0])
    beta = torch.tensor([100.0, -6.0, -1.0, 1.0, 0.0])
    rows = thresholds.histogram("all", gamma, beta)
    assert sum(float(row["percent"]) for row in rows) == pytest.approx(100)
    assert {row["low"]: row["percent"] for row in rows if row["percent"]} == {-6.0: 40, 0.0: 20, 5.875: 40}


def test_trained_weights_become_a_table_a_picture_and_records(capsys: pytest.CaptureFixture[str]) -> None:
    (config,) = composed([argument for argument in ARGUMENTS if not argument.startswith("task")])
    network = model(config, REFERENCE)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    torch.nn.init.constant_(norms[0].bias, -4.0)
    torch.save({"model": network.state_dict()}, "weights.pt")
    assert cli.main([*ARGUMENTS, "task.checkpoint=weights.pt"]) == 0
    channels = sum(len(norm.weight) for norm in norms)
    share = 100 * len(norms[0].weight) / channels
    found = {record.metric: record for record in records.collect(Path("results"))}
    assert found["threshold_above_the_bins"].value == pytest.approx(share)
    assert found["threshold_below_the_bins"].value == 0
    assert {record.n for record in found.values()} == {channels}
    out = capsys.readouterr().out
    assert f"beta / |gamma| of {channels} channels: -4.00 to 0.00" in out
    (picture,) = Path("results/figures").glob("*-thresholds-weights-????????.png")
    before = picture.read_bytes()
    picture.unlink()
    assert cli.main(["task=plots"]) == 0
    assert picture.read_bytes() == before
    with Path(f"results/thresholds/{picture.stem}.csv").open(newline="") as file:
        first = [row for row in csv.DictReader(file) if row["part"] == thresholds.PARTS[0] and float(row["percent"])]
    assert [float(row["low"]) for row in first] == [-4.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ([], 2, "task=thresholds analyses trained weights: name a file of them, task.checkpoint="),
        (["task.checkpoint=no.pt"], 1, "task.checkpoint=no.pt: there is no such file"),
        (["task.checkpoint=no.pt", "mode=exact"], 1, "mode=exact: saves no codes; choose one that does, mode=4bit"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_one_line(
    arguments: list[str], exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ARGUMENTS, *arguments]) == exit_code
    assert capsys.readouterr().err == f"blpa-run: error: {message}\n"
