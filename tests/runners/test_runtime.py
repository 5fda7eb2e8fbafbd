"""runners/tasks/runtime.py, with steps that take the time they are told to."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import composed

from blpa.kernels.reference import REFERENCE
from runners import cli, records, timing
from runners.config import Config
from runners.records import Record
from runners.tasks import runtime

NETWORK = ["dataset=digits", "depth=11", "width=0.25", "gpu=cpu", "gpu.kernels=torch", "dataset.batch_size=10", "run=a"]
TINY = [*NETWORK, "task=runtime", "task.steps=3"]
AT_LARGEST = ["gpu.memory_gib=0.502", "task.largest_batch=true"]


class Clock:
    """Steps of a mode take these seconds one after the other, the first two for warming up; `log` tells who ran."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds = {mode.replace("_", ""): iter(values) for mode, values in seconds.items()}
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def training_step(self, config: Config, batch: int, *_: object) -> Callable[[], None]:
        def step() -> None:
            self.log.append((config.mode.name, batch))
            taken = next(self.seconds[config.mode.name])
            if taken < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.now += taken

        return step


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock, *arguments: str) -> dict[str, Record]:
    monkeypatch.setattr(runtime.network, "training_step", clock.training_step)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert cli.main([*TINY, *arguments]) == 0
    (file,) = Path("results/runs").glob("a-runtime-*/records.json")
    return {record.metric: record for record in records.read(file)}


def test_time_is_by_the_sample_and_the_ratio_is_that_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(exact=[99, 99, 10, 20, 40], _4bit=[99, 99, 5, 30, 8])
    found = timed(monkeypatch, clock, "mode=4bit")
    time, ratio = found["seconds_per_sample"], found["ratio_to_exact"]
    assert (time.value, time.n, time.iterations, time.batch_size) == (pytest.approx(8 / 10), 3, 3, 10)
    assert (time.low, time.high) == (pytest.approx(0.5 + 0.4 * 0.3), pytest.approx(0.8 + 0.6 * 2.2))  # 0.5, 0.8, 3.0
    assert ratio.value == pytest.approx(0.5)  # of 5/10, 30/20 and 8/40
    timed_turns = [mode for mode, _ in clock.log[2 * runtime.WARM_UP :]]
    assert timed_turns in (["exact", "4bit", "4bit", "exact", "exact", "4bit"],
                           ["4bit", "exact", "exact", "4bit", "4bit", "exact"])  # fmt: skip


def test_iterations_are_the_steps_that_were_timed_and_n_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "calls_per_turn", lambda device: 5)
    found = timed(monkeypatch, Clock(exact=[9, 9, 1, 2, 3]), "mode=exact")
    assert [(record.n, record.iterations) for record in found.values()] == [(3, 15)]


def test_exact_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch, Clock(exact=[9, 9, 1, 2, 3]), "mode=exact")
    assert {metric: record.value for metric, record in found.items()} == {"seconds_per_sample": pytest.approx(0.2)}


def test_more_modes_take_their_turns_and_each_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(exact=[9, 9, 10, 20, 40], _4bit=[9, 9, 5, 30, 8], _2bit=[9, 9, 2, 2, 2])
    monkeypatch.setattr(runtime.network, "training_step", clock.training_step)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert cli.main([*TINY, "mode=4bit", "task.modes=[exact,4bit,2bit]"]) == 0
    (file,) = Path("results/runs").glob("a-runtime-*/records.json")
    found = {(record.mode, record.metric): record for record in records.read(file)}
    assert {key: record.value for key, record in found.items()} == {
        ("4bit", "seconds_per_sample"): pytest.approx(0.8),
        ("4bit", "ratio_to_exact"): pytest.approx(0.5),
        ("exact", "seconds_per_sample"): pytest.approx(2.0),
        ("2bit", "seconds_per_sample"): pytest.approx(0.2),
        ("2bit", "ratio_to_exact"): pytest.approx(0.1),
    }
    assert len({record.command for record in found.values()}) == 1
    assert found["exact", "seconds_per_sample"].kernels == "stock"
    assert found["2bit", "seconds_per_sample"].bits == 2


def test_a_mode_beside_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = timed(monkeypatch, Clock(exact=[1] * 9, _4bit=[1] * 9, _8bit=[-1]), "mode=4bit", "task.modes=[8bit]")
    assert {record.mode for record in found.values()} == {"4bit"}
    assert "CUDA out of memory; 8bit is not timed" in capsys.readouterr().err


def test_where_exact_does_not_fit_the_mode_is_timed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = timed(monkeypatch, Clock(exact=[-1], _4bit=[9, 9, 1, 2, 3]), "mode=4bit")
    assert list(found) == ["seconds_per_sample"]
    assert "CUDA out of memory; exact is not timed" in capsys.readouterr().err


def test_a_mode_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runtime.network, "training_step", Clock(exact=[1], _4bit=[-1]).training_step)
    assert cli.main([*TINY, "mode=4bit"]) == 1
    assert capsys.readouterr().err.endswith("blpa-run: error: does not fit: CUDA out of memory\n")


@functools.cache
def largest_batch(mode: str) -> Record:
    """What max-batch records of a mode."""
    assert cli.main([*NETWORK, "task=max-batch", "gpu.memory_gib=0.502", f"mode={mode}"]) == 0
    (file,) = Path("results/runs").glob("a-max-batch-*/records.json")
    (record,) = records.read(file)
    file.unlink()
    return record


def found_batches(batches: dict[str, int], *, predicted: bool = True, kind: str = "") -> None:
    for mode, batch in batches.items():
        changes = {
            "value": batch,
            "predicted": predicted,
            "device": "none" if predicted else "a card",
            "segments": kind,
        }
        records.write([replace(largest_batch(mode), **changes)], Path(f"results/runs/{mode}-{predicted}"))


def test_at_the_largest_batch_each_is_timed_at_its_own_and_measured_counts_before_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found_batches({"exact": 2}, predicted=False, kind="expandable")
    found_batches({"4bit": 20}, predicted=False, kind="usual")
    found_batches({"exact": 3, "4bit": 30})  # newer, and predicted
    kinds: list[str] = []
    monkeypatch.setattr(runtime.segments, "use", kinds.append)
    clock = Clock(exact=[9, 9, 1, 1, 1], _4bit=[9, 9, 4, 4, 4])
    found = timed(monkeypatch, clock, "mode=4bit", *AT_LARGEST)
    assert set(clock.log) == {("exact", 2), ("4bit", 20)}
    assert kinds == ["usual", "expandable"]  # 4bit's step is made first
    assert found["seconds_per_sample"].segments == "usual"
    assert found["seconds_per_sample"].value == pytest.approx(4 / 20)
    assert found["ratio_to_exact"].value == pytest.approx((4 / 20) / (1 / 2))


def test_a_prediction_is_found_whatever_backend_runs_here() -> None:
    """Max-batch counts by the one that auto takes on the meta device, which may be none that this machine has."""
    options = ["mode=4bit", "gpu.kernels=auto", "gpu.memory_gib=0.502"]
    assert cli.main([*NETWORK, "task=max-batch", *options]) == 0
    (config,) = composed([*TINY, *options])
    batch, kind = runtime._largest_batch(config, REFERENCE, torch.device("cpu"))
    assert batch > 0
    assert kind == ""


def test_where_exact_fits_at_no_batch_the_mode_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found_batches({"exact": 0, "4bit": 20})
    found = timed(monkeypatch, Clock(_4bit=[9, 9, 4, 4, 4]), "mode=4bit", *AT_LARGEST)
    assert list(found) == ["seconds_per_sample"]


def test_a_mode_that_fits_at_no_batch_is_recorded_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found_batches({"exact": 2, "4bit": 0, "8bit": 5})
    monkeypatch.setattr(runtime.network, "training_step", Clock(exact=[1] * 9, _8bit=[1] * 9).training_step)
    sweep = [argument for argument in TINY if argument != "run=a"]
    assert cli.main([*sweep, *AT_LARGEST, "mode=4bit,8bit", "-m"]) == 1
    (failed,) = [record for record in records.merge(Path("results")) if record.failure]
    assert failed.failure == "does not fit: 4bit, depth 11, not even batch 1"
