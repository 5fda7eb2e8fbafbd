"""task=converted-runtime: steps of other networks, converted, from the command line to the table."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support import refusal
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpa.codec import Codec
from blpa.convert import is_converted, policy_of
from runners import cli, records
from runners.records import Record
from runners.tasks import converted_runtime
from runners.timing import Call
from runners.training import steps

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
        "resnet18, 32, 4, fp32, channels-last", "1000.0 ms", "1.750 times (1.300 to 2.000)",
        "1.250 times (1.150 to 1.250)",
    ]  # fmt: skip


def test_other_machines_and_memory_stand_in_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["task=explain", "mode=4bit", "task.model=resnet18", "task.image_size=32"]) == 0
    found = timed([], monkeypatch, [[1.0, 1.0]] * 4)
    elsewhere = [replace(r, device="NVIDIA Z") for r in found if r.task == "converted-runtime"]
    records.write(elsewhere, Path("results/runs/elsewhere"))
    capsys.readouterr()
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.startswith("## ")]
    assert len(titles) == 3
    assert titles[-1] == "## Memory: peak (saved)"
    assert "## Time of a step, NVIDIA Z" in titles
    assert "n = 4; kernels " in out


class Spied(NamedTuple):
    """What a network was given and what it gave, in the last step before the clock."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    calls: list[tuple[Tensor, Any]]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spied]:
    """The networks that the task times, by mode."""
    found: dict[str, Spied] = {}
    own, make_optimiser = converted_runtime._timed, steps.make_optimiser

    def timed(cell: Any, model: nn.Module, *arguments: Any) -> Any:
        def make(model: nn.Module, recipe: Any) -> torch.optim.Optimizer:
            found[cell.mode.name] = Spied(model, make_optimiser(model, recipe), [])
            return found[cell.mode.name].optimiser

        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            found[cell.mode.name].calls.append((inputs[0], output))

        monkeypatch.setattr(steps, "make_optimiser", make)
        model.register_forward_hook(record)
        return own(cell, model, *arguments)

    monkeypatch.setattr(converted_runtime, "_timed", timed)
    return found


@pytest.mark.parametrize("name", ["unet", "googlenet", "regnet_y_400mf"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_whole_steps_of_stock_and_converted_networks_are_timed(
    name: str, spied: dict[str, Spied], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A U-Net's logits are per pixel, GoogLeNet has three heads, and a RegNet cannot be made on the meta device."""
    monkeypatch.chdir(tmp_path)
    arguments = [f"task.model={name}", "task.image_size=64", "task.steps=3", "task.channels_last=true"]
    more = ["gpu.precision=bf16", "gpu.deterministic=false", "task.modes=[8bit]"]
    assert cli.main([*ARGUMENTS, *arguments, *more]) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert [policy_of(spied[mode].model).codec for mode in ("4bit", "8bit")] == [Codec(4), Codec(8, "range")]
    assert not is_converted(spied["exact"].model)
    for model, optimiser, calls in spied.values():
        assert len(calls) == converted_runtime.WARM_UP + 3
        for images, output in calls:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert {logits.dtype for logits in tree_leaves(output)} == {torch.bfloat16}
        convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        momentum = optimiser.state[convolution.weight]["momentum_buffer"]
        assert momentum.abs().max() > 0
        assert convolution.weight.grad is None
    found = records.collect(Path("results"))
    assert {(r.precision, r.iterations, r.n) for r in found} == {("bf16", 3, 3)}
    assert all(r.settings["gpu.deterministic"] is False for r in found)


def test_a_mode_s_own_clip_is_that_of_its_codes(
    spied: dict[str, Spied], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*ARGUMENTS, "mode.clip=2.5"]) == 0
    assert policy_of(spied["4bit"].model).codec == Codec(4, 2.5)


def test_captured_steps_are_warmed_up_on_their_stream_and_replayed(
    spied: dict[str, Spied], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where a replay calls the step again."""
    monkeypatch.chdir(tmp_path)
    done: list[str] = []

    def run_on_stream(call: Call, stream: str) -> object:
        done.append(f"launched on {stream}")
        return call()

    def capture(call: Call, stream: str, pool: str) -> tuple[SimpleNamespace, None]:
        done.append(f"captured on {stream} in {pool}")
        return SimpleNamespace(replay=call), None

    monkeypatch.setattr(steps, "uses_cuda_graph", lambda gpu, device: True)
    monkeypatch.setattr(steps, "own_stream", lambda device: "its stream")
    monkeypatch.setattr(steps, "run_on_stream", run_on_stream)
    monkeypatch.setattr(steps, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "one pool")
    timed([], monkeypatch, [[1.0, 1.0]] * 4)
    assert done == 2 * [*converted_runtime.WARM_UP * ["launched on its stream"], "captured on its stream in one pool"]
    assert {mode: len(one.calls) for mode, one in spied.items()} == dict.fromkeys(("exact", "4bit"), 3)


def test_a_capture_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def timed(*_: Any) -> Any:
        raise steps.CaptureFailed("a CUDA graph could not be captured: it waits\nfor the device")

    monkeypatch.setattr(converted_runtime, "_timed", timed)
    assert cli.main(ARGUMENTS) == 1
    err = capsys.readouterr().err
    assert "a CUDA graph could not be captured: it waits; gpu.cuda_graph=false launches steps kernel by kernel" in err


def test_what_is_not_deterministic_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def timed(*_: Any) -> Any:
        raise RuntimeError("nll_loss2d_forward_out_cuda_template does not have a deterministic implementation, but")

    monkeypatch.setattr(converted_runtime, "_timed", timed)
    assert cli.main(ARGUMENTS) == 1
    assert "gpu.deterministic=true: nll_loss2d_forward_out_cuda" in capsys.readouterr().err


def test_a_row_shows_one_run_of_each_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    older = timed([], monkeypatch, [[1.0, 2.0]] * 4)
    later = "2999-01-01T00:00:00+00:00"
    newer = [replace(r, date=later, value=0.75) for r in older if (r.mode, r.unit) == ("4bit", "s")]
    records.write(newer, Path("results/runs/newer"))
    capsys.readouterr()
    assert cli.main(["task=tables", "task.tables=[converted]"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet18"))
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["250.0 ms", "750.0 ms"]


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
    assert "| 250.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.modes=[checkpoint]"], "task.modes=checkpoint: does not convert a network"),
        (["dataset.batch_size=100000000000"], "does not fit: "),  # more than a processor can address
        (["task.modes=[4bits]"], "task.modes=4bits is not allowed: choose one of 2bit, "),
        (["task.steps=0"], "task.steps=0 is not allowed: it is a whole number, at least 1"),
        (["gpu.kernels=torch"], "gpu.kernels=torch: a converted network chooses by its device"),
        (["gpu.cuda_graph=true"], "gpu.cuda_graph=true: the run is on the cpu; only a CUDA device captures graphs"),
    ],
)
def test_what_it_cannot_time_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refusal([*ARGUMENTS, *arguments], capsys)
