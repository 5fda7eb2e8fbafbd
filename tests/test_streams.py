"""blpa/runners/streams.py: training runs that take turns in one process end as each does alone, whatever happens."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cells import composed
from test_training import assert_same_end
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blpa import budget, records, signals, training
from blpa.config import Config, DatasetConfig
from blpa.data import Split
from blpa.errors import Busy, Diverged, OutOfTime
from blpa.locks import alone_in
from blpa.runners import cli, streams, sweep
from blpa.steps import TrainingStep

CELLS = [
    "dataset=digits", "depth=11", "width=0.25", "dataset.batch_size=4", "gpu=cpu", "gpu.kernels=torch",
    "dataset.iterations=4", "task.evaluate_every=2", "task.checkpoint_every=2", "jobs=3",
]  # fmt: skip
MODES_AND_SEEDS = ["mode=exact,4bit", "seed=0,1"]


@pytest.fixture(autouse=True)
def a_process_that_just_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "BEGAN", time.monotonic())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all cells, one after the other."""
    results = tmp_path_factory.mktemp("alone")
    assert cli.main([*CELLS[:-1], *MODES_AND_SEEDS, f"results={results}", "-m"]) == 0
    return results / "runs"


@pytest.fixture(scope="module")
def configs() -> list[Config]:
    """The cells, of which the first two may not run side by side."""
    return composed([*CELLS, *MODES_AND_SEEDS], multirun=True)


def assert_as_alone(config: Config, alone: Path) -> None:
    assert_same_end(Path(config.results) / "runs" / config.run, alone / config.run)


class Stream:
    """A CUDA stream that counts how often it was waited for."""

    def __init__(self) -> None:
        self.ended = 0

    def synchronize(self) -> None:
        self.ended += 1


def test_cells_side_by_side_end_with_the_bits_of_cells_alone(
    alone: Path, configs: list[Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cells in three places, each on its place's stream; the second of stock layers begins after the first."""
    made: list[Stream] = []
    current: list[Stream] = []
    steps: list[tuple[TrainingStep, Stream]] = []
    call = TrainingStep.__call__

    def make() -> Stream:
        made.append(Stream())
        return made[-1]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    def noted(self: TrainingStep, draws: Tensor, *, rate: float) -> Tensor:
        steps.append((self, current[-1]))
        return call(self, draws, rate=rate)

    monkeypatch.setattr(sweep, "is_on_cuda", lambda config: True)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(TrainingStep, "__call__", noted)
    assert [(config.mode.name, config.seed) for config in configs] == [
        ("exact", 0), ("exact", 1), ("4bit", 0), ("4bit", 1),
    ]  # fmt: skip
    assert streams.train(configs, [0, 1, 2, 3]) == (dict.fromkeys(range(4), 0), False)
    for config in configs:
        assert_as_alone(config, alone)
    cells = [cell for cell, _ in steps]
    assert cells[:3] == cells[3:6] and len(set(cells[:3])) == 3
    assert len(set(cells)) == len({(cell, id(place)) for cell, place in steps}) == 4
    assert sorted(place.ended for place in made) == [1, 1, 2]
    err = capsys.readouterr().err
    assert err.count("waits: cuDNN's batch norm must have the GPU's cores beside no other such") == 1
    assert err.index("[4/4] ") < err.index("[2/4] ")


def test_a_signal_stops_them_all_with_checkpoints_and_they_go_on(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = Split.draws

    def stopping(*args: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:
        for iteration, table in draws(*args, **options):
            if iteration == 3 and options["seed"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield iteration, table

    with monkeypatch.context() as stopped:
        stopped.setattr(Split, "draws", stopping)
        codes, _ = streams.train(configs, [0, 1, 2, 3])
    assert codes == {0: 128 + signal.SIGTERM, 2: 128 + signal.SIGTERM, 3: 128 + signal.SIGTERM}  # 1 had no place yet
    assert not list(Path("results").glob("runs/*/*.json"))
    assert streams.train(configs, [0, 2, 3]) == ({0: 0, 2: 0, 3: 0}, False)
    for number in (0, 2, 3):
        assert_as_alone(configs[number], alone)


def test_a_budget_stops_them_all_with_checkpoints_and_they_go_on(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hurried = [replace(config, budget_minutes=0.2) for config in configs]
    for iteration in (1, 2):  # a step each, for 12 seconds are less than the three keep for their end
        monkeypatch.setattr(budget, "BEGAN", time.monotonic())
        assert streams.train(hurried, [0, 2, 3]) == (dict.fromkeys((0, 2, 3), OutOfTime.exit_code), False)
        assert capsys.readouterr().err.count(f"budget_minutes=0.2 are over at iteration {iteration} of 4") == 3
    assert streams.train(configs, [0, 2, 3]) == ({0: 0, 2: 0, 3: 0}, False)
    for number in (0, 2, 3):
        assert_as_alone(configs[number], alone)


def test_time_is_kept_for_all_that_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BEGAN", time.monotonic() - 60 + 1.5 * training.STOPPING_SECONDS)
    stopping = training.Stopping(signals.Stop(), 1)
    with stopping.of(Path("one")):
        assert not stopping.is_due()
        with stopping.of(Path("another")):
            assert stopping.is_due()
        assert stopping.is_due()  # for all of them, also when one has stopped


def test_one_that_diverges_and_one_that_fails_leave_the_others_alone_and_no_more_are_begun(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(recipe: DatasetConfig, iteration: int) -> float:
        if recipe.iterations == 5 and iteration == 3:
            raise ZeroDivisionError("of the test's own")
        return learning_rate(recipe, iteration)

    learning_rate = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", rate)
    (diverges,) = composed([*CELLS, "mode=exact", "dataset.schedule=[[1.0,1e38]]", "run=diverges"])
    (refused,) = composed([*CELLS, "mode=4bit", "dataset.weight_decay=0.1", "run=refused"])
    (fails,) = composed([*CELLS, "mode=4bit", "dataset.iterations=5", "run=fails"])
    (other,) = composed([*CELLS, "mode=4bit", "dataset.weight_decay=0.2", "run=refused"])
    assert sweep.run_cell(other) == 0  # whose checkpoints another configuration cannot go on from
    with alone_in(Path("results/runs/busy")):
        (busy,) = composed([*CELLS, "mode=4bit", "run=busy"])
        codes, is_spoilt = streams.train([diverges, refused, busy, fails, *configs], list(range(8)))
    assert is_spoilt  # from the third step of `fails`
    assert codes == {0: Diverged.exit_code, 1: 1, 2: Busy.exit_code, 3: 1, 4: 0, 6: 0}
    for number in (0, 2):
        assert_as_alone(configs[number], alone)
    assert "ZeroDivisionError: of the test's own" in capsys.readouterr().err
    failures = sorted(record.failure for record in records.collect(Path("results")) if record.failure)
    begin = ("ZeroDivisionError: of the test's own", "diverged: ", "results/runs/refused/checkpoint-4-")
    assert [failure.startswith(beginning) for failure, beginning in zip(failures, begin, strict=True)] == [True] * 3


@pytest.fixture
def believes_in_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does; those that it has its cells run in do not."""
    monkeypatch.setattr(sweep, "is_on_cuda", lambda config: True)
    monkeypatch.setattr(cli, "is_on_cuda", lambda config: True)


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_a_sweep_whose_process_was_spoilt_goes_on_in_another(
    alone: Path, configs: list[Config], capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path("results/runs/digits-exact-depth11-width0.25-seed0")
    broken.mkdir(parents=True)
    content = b"no checkpoint"
    (broken / f"checkpoint-1-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m", "jobs=2"]) == 1
    assert "4 cells: 3 done, 0 finished before (resume=false does them again), 1 failed" in capfd.readouterr().err
    for config in configs[1:]:
        assert_as_alone(config, alone)
    (failed,) = [record for record in records.collect(Path("results")) if record.failure]
    assert (failed.mode, failed.seed) == ("exact", 0)


def dies(configs: list[Config], waiting: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_ended_by_a_signal(configs: list[Config], waiting: list[int]) -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None and caller.pid is not None
    os.kill(caller.pid, signal.SIGTERM)
    signal.pause()


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_a_process_that_dies_ends_the_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "train", dies)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m"]) == 1
    assert "a process ended without an answer, by exit code -9; started again, the sweep" in capsys.readouterr().err
    monkeypatch.setattr(streams, "train", is_ended_by_a_signal)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m"]) == 128 + signal.SIGTERM


def test_other_tasks_have_a_gpu_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "is_on_cuda", lambda config: True)
    configs = composed([*CELLS, "task=runtime,train", "seed=0,1"], multirun=True)
    assert list(sweep._taken_together(configs)) == [[0], [1], [2, 3]]
    assert list(sweep._taken_together([replace(config, jobs=1) for config in configs])) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("one", "another", "reason"),
    [
        (["mode=exact"], ["mode=4bit"], ""),
        (["mode=8bit"], ["mode=4bit"], ""),
        (["mode=exact"], ["mode=checkpoint"], "cuDNN's batch norm"),
        (["mode=exact", "gpu.precision=bf16"], ["mode=checkpoint", "gpu.precision=bf16"], ""),
        (["mode=compiled", "gpu.precision=bf16"], ["mode=compiled-fp8", "gpu.precision=bf16"], "it would forget"),
        (["mode=compiled"], ["mode=4bit", "gpu.kernels=inductor"], "it would forget"),
        (["mode=4bit", "gpu.precision=tf32"], ["mode=4bit"], "precision and determinism"),
        (["mode=4bit", "gpu.deterministic=false"], ["mode=4bit"], "precision and determinism"),
    ],
)
def test_what_may_run_beside_what(one: list[str], another: list[str], reason: str) -> None:
    (first,), (second,) = composed(one), composed(another)
    for pair in ((first, second), (second, first)):
        found = streams.reason_to_wait(*pair)
        assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_s_own_batch_norm_is_cudnn_s_but_for_bf16(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x = torch.empty(8, 16, 4, 4, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
        vectors = torch.empty(4, 16, device="cuda").unbind()
        chosen = torch._C._select_batch_norm_backend(x, *vectors, True, 1e-3)  # type: ignore[attr-defined]
    assert (chosen == torch._C._BatchNormBackend.Cudnn) == (dtype == torch.float32)  # type: ignore[attr-defined]
