"""runners/streams.py: training runs that take turns in one process end as each does alone, whatever happens."""

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
from support import assert_same_end, composed, last_checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from runners import cli, records, streams, sweep
from runners import run as run_module
from runners.config import Config, DatasetConfig
from runners.data import Split
from runners.errors import Busy, Diverged, OutOfTime
from runners.run import locked
from runners.training import budget, loop, signals, turns
from runners.training.checkpoints import RunFolder, checkpoints
from runners.training.state import State
from runners.training.steps import TrainingStep
from runners.training.stopping import STOPPING_SECONDS, Stopping

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

    def noted(self: TrainingStep, inputs: tuple[Tensor, ...], *, rate: float) -> Tensor:
        steps.append((self, current[-1]))
        return call(self, inputs, rate=rate)

    monkeypatch.setattr(streams, "is_on_cuda", lambda config: True)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(TrainingStep, "__call__", noted)
    assert [(config.mode.name, config.seed) for config in configs] == [
        ("exact", 0), ("exact", 1), ("4bit", 0), ("4bit", 1),
    ]  # fmt: skip
    assert streams.train(configs, [0, 1, 2, 3]) == (dict.fromkeys(range(4), 0), None)
    for config in configs:
        assert_as_alone(config, alone)
    cells = [cell for cell, _ in steps]
    assert cells[:3] == cells[3:6] and len(set(cells[:3])) == 3
    assert len(set(cells)) == len({(cell, id(place)) for cell, place in steps}) == 4
    assert sorted(place.ended for place in made) == [1, 1, 2]
    err = capsys.readouterr().err
    assert err.count("waits: two cells with cuDNN's batch norm cannot share the GPU") == 1
    assert err.index("[4/4] ") < err.index("[2/4] ")


def test_a_signal_stops_them_all_with_checkpoints_and_they_go_on(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Split.inputs

    def stopping(*args: Any, **options: Any) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for iteration, table in inputs(*args, **options):
            if iteration == 3 and options["seed"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield iteration, table

    with monkeypatch.context() as stopped:
        stopped.setattr(Split, "inputs", stopping)
        codes, _ = streams.train(configs, [0, 1, 2, 3])
    assert codes == {0: 128 + signal.SIGTERM, 2: 128 + signal.SIGTERM, 3: 128 + signal.SIGTERM}  # 1 had no place yet
    assert not list(Path("results").glob("runs/*/*.json"))
    assert streams.train(configs, [0, 2, 3]) == ({0: 0, 2: 0, 3: 0}, None)
    for number in (0, 2, 3):
        assert_as_alone(configs[number], alone)


def test_a_budget_stops_them_all_with_checkpoints_and_they_go_on(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hurried = [replace(config, budget_minutes=0.2) for config in configs]
    for iteration in (1, 2):  # a step each, for 12 seconds are less than the three keep for their end
        monkeypatch.setattr(budget, "BEGAN", time.monotonic())
        assert streams.train(hurried, [0, 2, 3]) == (dict.fromkeys((0, 2, 3), OutOfTime.exit_code), None)
        assert capsys.readouterr().err.count(f"budget_minutes=0.2 are over at iteration {iteration} of 4") == 3
    assert streams.train(configs, [0, 2, 3]) == ({0: 0, 2: 0, 3: 0}, None)
    for number in (0, 2, 3):
        assert_as_alone(configs[number], alone)


def test_time_is_kept_for_all_that_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BEGAN", time.monotonic() - 60 + 1.5 * STOPPING_SECONDS)
    stopping = Stopping(signals.Stop(), 1)
    with stopping.of(Path("one")):
        assert not stopping.is_due()
        with stopping.of(Path("another")):
            assert stopping.is_due()
        assert stopping.is_due()  # for all of them, also when one has stopped


def test_a_failed_run_beside_these_is_no_end_of_the_budget(
    configs: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    for minutes, code, reason in (
        (1e9, None, "because another run in this process failed"),
        (1e-9, OutOfTime.exit_code, "budget_minutes=1e-09 are over"),
    ):
        stopping = Stopping(signals.Stop(), minutes)
        stopping.has_failure = True
        config = replace(configs[0], budget_minutes=minutes)
        assert turns.alone(run_module.cell_in_turns(config, records_failure=True, stopping=stopping)) == code
        assert reason in capsys.readouterr().err


def test_the_first_that_fails_stops_the_others_and_leaves_them_their_checkpoints(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(recipe: DatasetConfig, iteration: int) -> float:
        if recipe.iterations == 5 and iteration == 3:
            raise ZeroDivisionError("of the test's own")
        return learning_rate(recipe, iteration)

    learning_rate = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", rate)
    (diverges,) = composed([*CELLS, "mode=exact", "dataset.schedule=[[1.0,1e38]]", "run=diverges"])
    (refused,) = composed([*CELLS, "mode=4bit", "dataset.weight_decay=0.1", "run=refused"])
    (fails,) = composed([*CELLS, "mode=4bit", "dataset.iterations=5", "run=fails"])
    (other,) = composed([*CELLS, "mode=4bit", "dataset.weight_decay=0.2", "run=refused"])
    assert run_module.run_cell(other) == 0  # whose checkpoints another configuration cannot go on from
    capsys.readouterr()
    with locked(Path("results/runs/busy")):
        (busy,) = composed([*CELLS, "mode=4bit", "run=busy"])
        codes, failed = streams.train([diverges, refused, busy, fails, *configs], list(range(8)))
    assert codes == {0: Diverged.exit_code, 1: 1, 2: Busy.exit_code}
    assert failed == 3
    err = capsys.readouterr().err
    assert f"{fails.run}: fails beside other runs, and is tried once more in a process of its own: ZeroDivision" in err
    assert "Traceback" in err
    assert err.count("because another run in this process failed; it goes on in a new one") == 2
    assert err.count("blpa-run: error: ") == 2  # diverges, refused
    assert "budget_minutes" not in err
    failures = sorted(record.failure for record in records.collect(Path("results")) if record.failure)
    begin = ("diverged: ", "results/runs/refused/checkpoint-4-")
    assert [failure.startswith(beginning) for failure, beginning in zip(failures, begin, strict=True)] == [True] * 2
    for number in (0, 2):
        assert checkpoints(Path("results/runs") / configs[number].run)
    assert streams.train(configs, [0, 2]) == ({0: 0, 2: 0}, None)
    assert "going on from results/runs/" in capsys.readouterr().err
    for number in (0, 2):
        assert_as_alone(configs[number], alone)


def test_what_fails_after_the_first_failure_is_none_of_its_own(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the third step of the first cell on every launch fails, as after an illegal address on a GPU."""
    call = TrainingStep.__call__
    calls: list[TrainingStep] = []

    def unusable(self: TrainingStep, inputs: tuple[Tensor, ...], *, rate: float) -> Tensor:
        calls.append(self)
        if calls.count(calls[0]) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return call(self, inputs, rate=rate)

    def unreadable(self: State, unread: list[Tensor]) -> None:
        if calls.count(calls[0]) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        read(self, unread)

    read = State.read
    with monkeypatch.context() as broken:
        broken.setattr(TrainingStep, "__call__", unusable)
        broken.setattr(State, "read", unreadable)
        assert streams.train(configs, [0, 2, 3]) == ({}, 0)
    err = capsys.readouterr().err
    assert err.count("RuntimeError: CUDA error") == 4  # the first with its traceback
    assert err.count("fails after another run in this process, perhaps because of it, and goes on in a new one") == 2
    assert not [record for record in records.collect(Path("results")) if record.failure]
    assert streams.train(configs, [2, 3]) == ({2: 0, 3: 0}, None)
    for number in (2, 3):
        assert_as_alone(configs[number], alone)


@pytest.fixture
def believes_in_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does; those that it has its cells run in do not."""
    for module in (sweep, run_module, streams):
        monkeypatch.setattr(module, "is_on_cuda", lambda config: True)


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_a_cell_that_fails_beside_others_fails_by_itself_before_it_counts(
    alone: Path, configs: list[Config], capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path("results/runs/digits-exact-depth11-width0.25-seed0")
    RunFolder(broken, last_checkpoint(alone / broken.name)["configuration"]).save(1, {"model": {}})
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m", "jobs=2"]) == 1
    err = capfd.readouterr().err
    assert "4 cells: 3 done, 0 finished before (resume=false does them again), 1 failed" in err
    assert [line for line in err.splitlines() if "(by itself)" in line] == [f"[1/4] {configs[0].run} (by itself)"]
    for config in configs[1:]:
        assert_as_alone(config, alone)
    (failed,) = [record for record in records.collect(Path("results")) if record.failure]
    assert (failed.mode, failed.seed) == ("exact", 0)


def lacks_memory(configs: list[Config], waiting: list[int]) -> tuple[dict[int, int], int | None]:
    """Train side by side, where the memory is not enough for the cells of seed 1."""
    inputs = Split.inputs

    def too_many(*args: Any, **options: Any) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for iteration, table in inputs(*args, **options):
            if iteration == 3 and options["seed"] == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield iteration, table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "inputs", too_many)
        return train(configs, waiting)


train = streams.train


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_a_cell_that_lacks_memory_beside_others_has_all_of_it_last(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "train", lacks_memory)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m"]) == 0
    err = capfd.readouterr().err
    last = [f"[4/4] {configs[3].run} (by itself)", f"[2/4] {configs[1].run} (by itself)"]  # as they failed
    assert [line for line in err.splitlines() if "(by itself)" in line] == last
    assert "4 cells: 4 done, 0 finished before (resume=false does them again), 0 failed" in err
    assert not [record for record in records.collect(Path("results")) if record.failure]
    for config in configs:
        assert_as_alone(config, alone)


def dies(configs: list[Config], waiting: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_of_the_first(config: Config) -> int:
    if (config.mode.name, config.seed) == ("exact", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return run_module.run_cell(config, records_failure=True)


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_after_a_process_that_dies_its_cells_run_one_by_one(
    alone: Path, configs: list[Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "train", dies)
    monkeypatch.setattr(run_module, "_run_recording", dies_of_the_first)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m"]) == 1
    err = capfd.readouterr().err
    assert "a process ended without an answer, by exit code -9; its runs go on one by one" in err
    assert "4 cells: 3 done, 0 finished before (resume=false does them again), 1 failed" in err
    (failed,) = [record for record in records.collect(Path("results")) if record.failure]
    assert (failed.mode, failed.seed) == ("exact", 0)
    for config in configs[1:]:
        assert_as_alone(config, alone)


@pytest.mark.parametrize(
    ("answers", "has_time", "begun", "codes"),
    [
        ([({0: 0, 3: 0}, 2), ({1: 0}, None)], True, [[0, 1, 2, 3], [1], [2]], dict.fromkeys(range(4), 0)),
        ([({0: 0}, 3), ({1: 0}, 2)], True, [[0, 1, 2, 3], [1, 2], [3], [2]], dict.fromkeys(range(4), 0)),
        ([RuntimeError("CUDA error")], True, [[0, 1, 2, 3], [0], [1], [2], [3]], dict.fromkeys(range(4), 0)),
        ([({0: 0}, 3)], False, [[0, 1, 2, 3]], {0: 0}),
        ([({0: 0, 1: OutOfTime.exit_code}, None)], True, [[0, 1, 2, 3]], {0: 0, 1: OutOfTime.exit_code}),
    ],
)
def test_which_process_trains_what(
    configs: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Any],
    has_time: bool,
    begun: list[list[int]],
    codes: dict[int, int],
) -> None:
    processes: list[list[int]] = []

    def call(function: object, configs: list[Config], waiting: list[int]) -> Any:
        processes.append(waiting)
        answer = answers[len(processes) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(streams.fresh, "call", call)
    monkeypatch.setattr(streams, "has_time_for", lambda config, seconds: has_time)
    monkeypatch.setattr(streams, "run_cell_of_sweep", lambda config: processes.append([configs.index(config)]) or 0)
    assert streams.run(configs, [0, 1, 2, 3]) == codes
    assert processes == begun


def is_ended_by_a_signal(configs: list[Config], waiting: list[int]) -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None and caller.pid is not None
    os.kill(caller.pid, signal.SIGTERM)
    signal.pause()


@pytest.mark.usefixtures("believes_in_a_gpu")
def test_a_signal_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "train", is_ended_by_a_signal)
    assert cli.main([*CELLS, *MODES_AND_SEEDS, "-m"]) == 128 + signal.SIGTERM
    assert not list(Path("results").glob("runs/*"))


def test_other_tasks_have_a_gpu_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    def run(configs: list[Config], waiting: list[int]) -> dict[int, int]:
        groups.append([config.task.name for config in configs])
        return dict.fromkeys(waiting, 0)

    def run_alone(config: Config) -> int:
        groups.append([config.task.name])
        return 0

    monkeypatch.setattr(streams, "run", run)
    monkeypatch.setattr(sweep, "run_cell_of_sweep", run_alone)
    for module in (sweep, run_module):
        monkeypatch.setattr(module, "is_on_cuda", lambda config: True)
    cells = [*(text for text in CELLS if not text.startswith("task.")), "task=runtime,train", "seed=0,1", "-m"]
    assert cli.main(cells) == 0
    assert groups == [["runtime"], ["runtime"], ["train", "train"]]
    assert cli.main([*cells, "jobs=1"]) == 0
    assert groups[3:] == [["runtime"], ["runtime"], ["train"], ["train"]]


@pytest.mark.parametrize(
    ("one", "another", "reason"),
    [
        (["mode=exact"], ["mode=4bit"], ""),
        (["mode=8bit"], ["mode=4bit"], ""),
        (["mode=exact"], ["mode=checkpoint"], "two cells with cuDNN's batch norm"),
        (["mode=exact", "gpu.precision=bf16"], ["mode=checkpoint", "gpu.precision=bf16"], ""),
        (["mode=compiled", "gpu.precision=bf16"], ["mode=compiled-fp8", "gpu.precision=bf16"], "it would discard"),
        (["mode=compiled"], ["mode=4bit", "gpu.kernels=inductor"], "it would discard"),
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
