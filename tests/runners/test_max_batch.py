"""runners/tasks/max_batch.py and memory.py, from the command line to the record; and the table of largest batches."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from support import make, refusal

from runners import cli, compose, fresh, records
from runners.config import Config
from runners.errors import classify
from runners.records import Record
from runners.reporting import paper
from runners.tasks import max_batch
from runners.training import network, segments

TINY = ["dataset=digits", "depth=11", "width=0.25", "mode=4bit", "gpu.device=cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record_of(run: str) -> list[Record]:
    return records.read(Path("results/runs") / run / "records.json")


def test_largest_batch_is_recorded_as_predicted_and_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.6", "run=a", *TINY]) == 0
    (record,) = record_of("a-max-batch-0.6gib-auto")
    assert (record.metric, record.unit, record.predicted, record.device) == ("largest_batch", "samples", True, "none")
    assert record.settings == {"memory_gib": 0.6, "allowance_mib": 512}
    out, _ = capsys.readouterr()
    assert out.startswith(f"4bit, depth 11, width 0.25: largest batch {record.value:.0f} in 0.6 GiB (predicted); GiB: ")
    assert out.count("\n") == 1
    (config,) = cells(["task=max-batch", "gpu.memory_gib=0.6", "run=a", *TINY])
    budget = int(0.6 * 2**30) - 512 * 2**20
    at = [training_total(config, int(record.value) + more) for more in (0, 1)]
    assert at[0] <= budget < at[1]


def cells(arguments: list[str]) -> list[Config]:
    with compose.session():
        return [cell.config for cell in compose.cells(arguments, multirun=False)]


def training_total(config: Config, batch: int) -> int:
    return network.training_bytes(config, batch).total_bytes


def test_a_network_that_does_not_fit_is_recorded_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.5", "run=a", *TINY]) == 0
    (record,) = record_of("a-max-batch-0.5gib-auto")
    assert record.value == 0
    assert "does not fit 0.5 GiB even at batch 1 (predicted)" in capsys.readouterr().out
    assert cli.main(["task=tables"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu.memory_gib=0"], "gpu.memory_gib=0.0 is not allowed: it is a number above 0"),
        (["gpu.memory_gib=-11"], "gpu.memory_gib=-11.0 is not allowed: it is a number above 0"),
        (["gpu=gtx1080ti", "gpu.allowance_mib=-1"], "gpu.allowance_mib=-1 is not allowed: it is a whole number, at"),
    ],
)
def test_a_budget_without_meaning_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["task=max-batch", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"blpa-run: error: {message}")
    assert list(Path.cwd().iterdir()) == []


def test_a_budget_is_asked_for_where_there_is_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=max-batch", "gpu=cpu"]) == 1
    assert capsys.readouterr().err.startswith("blpa-run: error: gpu.memory_gib=null: here is no GPU to take it from")


def test_memory_shows_kinds_blocks_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=memory", "run=a", "dataset.batch_size=4", *TINY]) == 0
    out, _ = capsys.readouterr()
    name = "a-memory-batch4-auto"
    exact, coded = record_of(name)
    assert [exact.mode, coded.mode, exact.predicted] == ["exact", "4bit", True]
    assert coded.value < exact.value
    assert f"| peak of a step {'':34}"[:18] in out
    with (Path("results/runs") / name / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert [block["block"] for block in blocks] == ["block 1", "block 2", "block 3"]
    assert all(block["saved"] == block["formula"] for block in blocks)
    total = sum(int(block["saved"]) for block in blocks)
    assert f"saved by the blocks: {total} bytes counted, {total} by blpa.memory.saved_bytes" in out
    lines = pd.read_csv(f"results/memory/{name}.csv")
    assert {mode: line["mib"].max() for mode, line in lines.groupby("mode")} == pytest.approx(
        {"exact": exact.value, "4bit": coded.value},
        rel=0.2,  # the peak may lie inside an operation
    )
    picture = Path(f"results/figures/{name}.png")
    drawn = picture.read_bytes()
    picture.unlink()
    assert cli.main(["task=plots"]) == 0
    assert picture.read_bytes() == drawn


def test_memory_of_stock_layers_has_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task=memory", "run=a", "dataset.batch_size=4", *TINY, "mode=checkpoint"]) == 0
    assert "saved_bytes" not in capsys.readouterr().out


def test_the_paper_s_card_is_told_by_its_budget_and_default_settings() -> None:
    card = {"memory_gib": 11.0, "allowance_mib": 512}
    assert paper.matches_card(card)
    assert paper.matches_card({**card, "allowance_mib": 0, "largest_batch": True, "gpu.deterministic": False})
    for changed in ({"memory_gib": 80.0}, {"memory_gib": None}, {"mode.clip": 2.0}, {"gpu.cuda_graph": False}):
        assert not paper.matches_card({**card, **changed})
    assert not paper.matches_card({})


# ---- measuring: the search, on a made-up card -----------------------------------------------------------------------


class Card:
    """Where batches up to `largest` fit, or up to `steady` over many steps; remembers what was asked of it."""

    def __init__(self, largest: int, steady: int | None = None) -> None:
        self.largest, self.steady = largest, largest if steady is None else steady
        self.probes: list[tuple[int, int]] = []

    def __call__(self, batch: int, steps: int) -> bool:
        self.probes.append((batch, steps))
        return batch <= (self.steady if steps == max_batch.VERIFYING_STEPS else self.largest)


@pytest.mark.parametrize("predicted", [0, 1, 26, 1000, 6290])
@pytest.mark.parametrize("largest", [0, 1, 2, 25, 182, 990, 1010, 6290, 6500])
def test_the_search_ends_at_the_largest_batch_wherever_it_begins(predicted: int, largest: int) -> None:
    card = Card(largest)
    fits, fails = max_batch.search(card, predicted)
    assert fits <= largest < fails
    assert fails - fits <= max(1, fits // 100)
    assert not fits or (fits, max_batch.VERIFYING_STEPS) in card.probes
    assert any(batch >= fails and batch > largest for batch, _ in card.probes)
    assert not fits or any(largest < batch <= max(fits + 1, 1.05 * fits + 1) for batch, _ in card.probes)


def test_few_probes_are_needed_where_the_prediction_is_good() -> None:
    """Within 5 %: two or three strides of 2.5 % and their double, two halvings, the long run and the one 5 % beyond."""
    for largest in (950, 975, 1000, 1025, 1049):
        card = Card(largest)
        max_batch.search(card, 1000)
        assert len(card.probes) <= 9


def test_a_coarse_search_needs_three_probes() -> None:
    for largest in (1000, 1025, 1049):
        card = Card(largest)
        assert max_batch.search(card, 1000, resolution=0.05) == (1000, 1050)
        assert len(card.probes) == 3


def test_an_answer_that_does_not_stand_is_lowered() -> None:
    fits, fails = max_batch.search(Card(1000, steady=960), 1000)
    assert fits <= 960 < fails <= 1000


def test_where_more_than_the_answer_fits_the_search_goes_on() -> None:
    """A failure that memory was not to blame for: 1000 fails by chance, and 1050 fits."""

    class Fickle(Card):
        def __call__(self, batch: int, steps: int) -> bool:
            return super().__call__(batch, steps) and not (995 <= batch < 1040)

    fits, fails = max_batch.search(Fickle(2000), 1000)
    assert fits <= 2000 < fails <= 2020


def cards(usual: int, expandable: int) -> dict[str, Card]:
    return {segments.USUAL: Card(usual), segments.EXPANDABLE: Card(expandable)}


@pytest.mark.parametrize("predicted", [1, 1000])
@pytest.mark.parametrize(
    ("usual", "expandable", "kind"),
    [(1000, 990, "usual"), (1000, 1002, "usual"), (700, 1000, "expandable"), (0, 1, "expandable"), (0, 0, "usual")],
)
def test_the_kind_of_segments_that_fits_more_is_kept(usual: int, expandable: int, kind: str, predicted: int) -> None:
    """Unless it fits no more than lies between the largest batch of the first kind and the smallest that fails."""
    found, fits, fails = max_batch.better(cards(usual, expandable), predicted, 0.01)
    largest = {"usual": usual, "expandable": expandable}[kind]
    assert found == kind
    assert fits <= largest < fails
    assert fails - fits <= max(1, fits // 100)


def test_a_kind_that_is_no_better_costs_one_probe() -> None:
    tried = cards(1000, 1000)
    _, _, fails = max_batch.better(tried, 1000, 0.01)
    assert tried["expandable"].probes == [(fails, max_batch.STEPS)]


def test_the_second_search_begins_where_the_first_fails_and_asks_nothing_twice() -> None:
    tried = cards(690, 1000)
    _, _, fails = max_batch.better({"usual": tried["usual"], "expandable": tried["expandable"]}, 1000, 0.01)
    asked = tried["expandable"].probes
    assert asked[0][0] <= 697
    assert len(set(asked)) == len(asked)
    assert min(batch for batch, _ in asked) == asked[0][0]
    assert fails > 1000


def test_the_setting_is_one_that_torch_knows() -> None:
    """It refuses those it does not know; the process where it is made ends with it."""
    assert fresh.call(made_settings) == ["expandable_segments:False", "expandable_segments:True"]


def made_settings() -> list[str]:
    """What is handed to torch, which takes it and leaves CUDA alone."""
    given: list[str] = []
    make = torch._C._accelerator_setAllocatorSettings
    torch._C._accelerator_setAllocatorSettings = lambda text: given.append(text) or make(text)
    for kind in (segments.USUAL, segments.EXPANDABLE):
        segments.use(kind)
    with pytest.raises(ValueError, match="Unrecognized key"):
        make("expandable_segment:True")
    assert not torch.cuda.is_initialized()
    return given


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 8 GiB that remembers the part a process may take and the steps it ran, and runs out at batch 5."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    seen = SimpleNamespace(parts=[], steps=[], kinds=[], error=error, free=2**33)

    def training_step(config: Config, batch: int, *_: object) -> Callable[[], None]:
        def step() -> None:
            seen.steps.append(batch)
            if batch >= 5 and seen.steps.count(batch) == 2:
                raise seen.error

        return step

    cuda = max_batch.torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (seen.free, 2**33))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", seen.parts.append)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**33))
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda: 77)
    monkeypatch.setattr(max_batch.segments, "use", seen.kinds.append)
    monkeypatch.setattr(max_batch.kernels, "choose", lambda *_: None)
    monkeypatch.setattr(max_batch.network, "training_step", training_step)
    return seen


def test_a_probe_runs_its_steps_under_the_limit(gpu: SimpleNamespace) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    assert max_batch.fits_in(config, 4, 3, 2**31, segments.EXPANDABLE) == 77
    assert gpu.parts == [1 / 4]
    assert gpu.kinds == [segments.EXPANDABLE]
    assert gpu.steps == [4, 4, 4]


@pytest.mark.parametrize(
    "error",
    [
        max_batch.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_out_of_memory_in_whatever_words_is_an_answer(
    gpu: SimpleNamespace, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    gpu.error = error
    assert max_batch.fits_in(config, 5, 3, 2**31, segments.USUAL) is None
    assert gpu.steps == [5, 5]
    assert capsys.readouterr().err == f"batch 5, usual segments: {error}\n"


UNCLEAR = [
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "GET was unable to find an engine to execute this computation",
]


@pytest.mark.parametrize("said", UNCLEAR)
def test_what_is_said_for_other_reasons_too_is_no_answer_yet(gpu: SimpleNamespace, said: str) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    gpu.error = RuntimeError(f"{said}\nmore")
    with pytest.raises(max_batch.Unclear) as raised:
        max_batch.fits_in(config, 5, 3, 2**31, segments.USUAL)
    assert str(raised.value) == said
    exit_code, line = classify(gpu.error)
    assert (exit_code, line) == (1, f"does not run, for want of memory or for the size of its tensors: {said}")


@pytest.mark.parametrize("said", ["cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "integer out of range"])
def test_what_is_never_said_for_want_of_memory_is_a_bug(gpu: SimpleNamespace, said: str) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    gpu.error = RuntimeError(said)
    with pytest.raises(RuntimeError, match=said):
        max_batch.fits_in(config, 5, 3, 2**31, segments.USUAL)
    assert classify(gpu.error) == (None, f"RuntimeError: {said}")


def probed(monkeypatch: pytest.MonkeyPatch, config: Config, batch: int, answers: dict[int, int | None]) -> bool:
    """What a probe makes of the answers of its processes, by batch: those that are not there are unclear."""

    def call(function: object, config: Config, batch: int, *_: object) -> int | None:
        if batch in answers:
            return answers[batch]
        raise max_batch.Unclear(UNCLEAR[-1])

    monkeypatch.setattr(max_batch.fresh, "call", call)
    return max_batch._probe_on(config, 2**31, segments.USUAL)(batch, max_batch.STEPS)


def test_an_unclear_failure_is_memory_where_half_the_batch_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti"])
    assert not probed(monkeypatch, config, 9, {4: 2**30})
    assert "batch 9, 5 steps, usual segments: does not fit" in capsys.readouterr().err
    assert not probed(monkeypatch, config, 9, {4: None})  # half of it is short of memory for certain
    assert probed(monkeypatch, config, 9, {9: 2**30})


@pytest.mark.parametrize(
    ("batch", "answers", "reason"),
    [
        (9, {}, "batch 9 fails, and not for want of memory, for batch 4 fails like it: GET was unable to find"),
        (1, {}, "batch 1 fails, and not for want of memory, for it is the smallest: GET was unable to find"),
        # The sum after a block of the first group is [batch, 64, 32, 32].
        (2**15, {2**14: 2**30}, "batch 32768 fails by its size, whatever the memory: GET was unable .* has 2147483648"),
    ],
)
def test_an_unclear_failure_is_a_failure_otherwise(
    batch: int, answers: dict[int, int | None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti"])
    with pytest.raises(max_batch.NotMemory, match=reason) as raised:
        probed(monkeypatch, config, batch, answers)
    assert classify(raised.value) == (1, str(raised.value))


def test_a_batch_just_below_two_to_the_31_elements_may_want_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti"])
    assert not probed(monkeypatch, config, 2**15 - 1, {2**14 - 1: 2**30})


def test_out_of_memory_is_an_answer_where_the_graph_half_captured_fails_last(
    gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    gpu.error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    gpu.error.__context__ = max_batch.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert max_batch.fits_in(config, 5, 3, 2**31, segments.USUAL) is None
    assert capsys.readouterr().err == "batch 5, usual segments: CUDA out of memory. Tried to allocate 2.00 GiB\n"


def test_other_errors_of_a_probe_are_no_answer(gpu: SimpleNamespace) -> None:
    (config,) = cells(["task=max-batch", "gpu=gtx1080ti", *TINY])
    gpu.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        max_batch.fits_in(config, 5, 3, 2**31, segments.USUAL)
    gpu.free = 2**30
    with pytest.raises(max_batch.CardIsTaken, match="1 GiB of the GPU are free: too little to measure 2"):
        max_batch.fits_in(config, 4, 3, 2**31, segments.EXPANDABLE)


def on_a_card(monkeypatch: pytest.MonkeyPatch, free: int, total: int, answer: Card) -> list[int]:
    """Make believe that there is one, alike with both kinds of segments; the limits that are probed under come back."""
    limits: list[int] = []

    def probe_on(config: Config, limit: int, kind: str) -> Card:
        if kind == segments.USUAL:
            limits.append(limit)
        return answer

    monkeypatch.setattr(max_batch.network, "device", lambda *_: max_batch.torch.device("cuda"))
    monkeypatch.setattr(max_batch.fresh, "call", lambda function: (free, total))
    monkeypatch.setattr(max_batch, "_probe_on", probe_on)
    monkeypatch.setattr(max_batch.torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(max_batch.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(max_batch.kernels, "missing", lambda name, device: "")
    return limits


def test_on_a_card_both_answers_are_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = on_a_card(monkeypatch, 2**40, 2**40, Card(100))
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.6", "run=a", *TINY]) == 0
    predicted, measured = record_of("a-max-batch-0.6gib-auto")
    assert limits == [int(0.6 * 2**30) - 512 * 2**20]
    assert (predicted.predicted, measured.predicted, measured.device) == (True, False, "a card")
    assert (predicted.precision, measured.precision) == ("fp32", "tf32")  # bytes are alike; what was run is not
    assert (measured.value, measured.low, measured.high) == (100, 100, 100)
    assert (predicted.segments, measured.segments) == ("", "expandable")
    assert "largest batch 100 in 0.6 GiB (measured, expandable segments); 101 does not fit" in capsys.readouterr().out
    assert {record.value for record in records.collect(Path("results"))} == {predicted.value, 100}


def test_a_prediction_is_taken_from_the_results_and_stays_what_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["task=max-batch", "gpu.memory_gib=0.6", *TINY]
    assert cli.main([*arguments, "run=a"]) == 0
    (counted,) = record_of("a-max-batch-0.6gib-auto")
    counted = replace(counted, date="2026-01-01T00:00:00+00:00", commit="an older one")
    records.write([counted], Path("results/runs/a-max-batch-0.6gib-auto"))
    on_a_card(monkeypatch, 2**40, 2**40, Card(100))
    capsys.readouterr()

    counted_anew: list[str] = []
    monkeypatch.setattr(max_batch, "predict", lambda config, *_, **__: counted_anew.append(config.run) or counted)
    assert cli.main([*arguments, "experiment=bench-card", "run=b"]) == 0
    predicted, measured = record_of("b-max-batch-0.6gib-auto")
    assert (predicted.value, predicted.date, predicted.commit) == (counted.value, counted.date, counted.commit)
    assert (predicted.experiment, predicted.command) == ("bench-card", measured.command)
    said = f"largest batch {counted.value:.0f} in 0.6 GiB (predicted, 2026-01-01T00:00:00+00:00)"
    assert said in capsys.readouterr().out
    assert counted_anew == []
    others = {"c": "gpu.memory_gib=0.61", "d": "gpu.kernels=torch", "e": "mode.clip=2.9", "f": "resume=false"}
    for run, changed in others.items():
        assert cli.main([*arguments, f"run={run}", changed]) == 0
    assert counted_anew == list(others)


def test_without_a_budget_it_is_the_whole_card(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = on_a_card(monkeypatch, 10**9, 2**30, Card(100))
    assert cli.main(["task=max-batch", "run=a", *TINY]) == 0
    assert limits == [2**29]
    budget = {"memory_gib": 1.0, "allowance_mib": 512}
    assert all(record.settings == budget for record in record_of("a-max-batch-whole-card-auto"))


def test_a_card_a_little_smaller_than_its_name_measures_what_is_left_without_the_allowance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card of 11 GB has 10.92 GiB."""
    limits = on_a_card(monkeypatch, int(10.6 * 2**30), int(10.92 * 2**30), Card(100))
    assert cli.main(["task=max-batch", "gpu.memory_gib=11", "run=a", *TINY]) == 0
    assert limits == [int(10.5 * 2**30)]


def test_a_budget_that_the_allowance_eats_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = on_a_card(monkeypatch, 2**33, 2**33, Card(100))
    assert cli.main(["task=max-batch", "gpu.memory_gib=0.3", "run=a", *TINY]) == 0
    assert limits == []
    assert [(r.value, r.predicted) for r in record_of("a-max-batch-0.3gib-auto")] == [(0, True), (0, False)]


def test_bf16_is_predicted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what exact keeps, and so nearly twice the batch."""
    exact = [*TINY[:-2], "gpu.device=cpu", "mode=exact", "task=max-batch", "gpu.memory_gib=0.6"]
    found = {}
    for precision in ("fp32", "bf16"):
        assert cli.main([*exact, f"gpu.precision={precision}", f"run={precision}"]) == 0
        (record,) = record_of(f"{precision}-max-batch-0.6gib-auto")
        assert (record.precision, record.predicted) == (precision, True)
        found[precision] = record.value
    assert 1.7 < found["bf16"] / found["fp32"] < 2
    on_a_card(monkeypatch, 2**33, 2**33, Card(100))
    assert cli.main([*exact, "gpu.precision=bf16", "run=bf16"]) == 0
    assert [(r.value, r.predicted, r.precision) for r in record_of("bf16-max-batch-0.6gib-auto")] == [
        (found["bf16"], True, "bf16"), (100, False, "bf16"),
    ]  # fmt: skip


def test_a_smaller_card_measures_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = on_a_card(monkeypatch, 2**30, 2**30, Card(100))
    assert cli.main(["task=max-batch", "gpu.memory_gib=2", "run=a", *TINY]) == 0
    assert limits == []
    assert [record.predicted for record in record_of("a-max-batch-2gib-auto")] == [True]
    assert "not measured: this card has 1 GiB" in capsys.readouterr().err


def test_a_card_that_others_are_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_card(monkeypatch, 2**30, 2**33, Card(100))
    assert cli.main(["task=max-batch", "gpu.memory_gib=8", "run=a", *TINY]) == 1
    assert "1 GiB of the GPU are free: too little to measure 7.5" in capsys.readouterr().err


def test_the_batch_of_several_gpus_is_measured_and_never_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["task=max-batch", "gpu.memory_gib=0.6", "gpu.processes=4", "run=a", *TINY]
    assert "gpu.processes=4: this machine has no GPU, and the batch of several is never predicted" in refusal(
        arguments, capsys
    )
    on_a_card(monkeypatch, 2**40, 2**40, Card(100))
    assert cli.main(arguments) == 0
    (measured,) = record_of("a-max-batch-0.6gib-auto")
    assert (measured.predicted, measured.value, measured.high) == (False, 400, 403)
    assert measured.settings["gpu.processes"] == 4
    out = capsys.readouterr().out
    assert "largest batch 400 in 0.6 GiB of each of 4 GPUs (measured, expandable segments); 404 does not fit" in out
    on_a_card(monkeypatch, 2**25, 2**25, Card(100))
    assert "gpu.memory_gib=0.6 is not measured: this card has 0.03125 GiB" in refusal(arguments, capsys)


def test_a_probe_of_several_processes_fits_where_it_fits_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(task="max-batch", gpu__processes=2)
    reserved: list[int | None] = [10, 20]

    def run(task: Callable[[Config], int], config: Config) -> list[int]:
        return [task(config) for _ in range(config.gpu.processes)]

    monkeypatch.setattr(max_batch.processes, "run", run)
    monkeypatch.setattr(max_batch, "fits_in", lambda *_: reserved.pop())
    probe = max_batch._probe_on(config, 2**31, segments.USUAL)
    assert probe(3, 1)
    reserved = [10, None]
    assert not probe(3, 1)
