"""runners/cells.py: the name of a run, and the command line that composes it again."""

from itertools import chain

import pytest
from omegaconf import OmegaConf
from support import composed, make

from runners import compose
from runners.cells import folder_name, overrides, recipe_changes, run_name
from runners.config import options
from runners.option_files import option
from runners.training.checkpoints import deciding_fields


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mode=2bit", "depth=1001", "width=0.3", "seed=7", "gpu=gtx1080ti", "task=max-batch"],
        ["experiment=demo", "dataset.iterations=7"],
        ["experiment=demo", "dataset=cifar100", "task.evaluate_every=1000"],
        ["mode.name=mine", "mode.bits=null", "mode.width_factor=0.5", "mode.layers=stock", "gpu.memory_gib=0.1"],
        ["run=1e3", "task=gradient-error", "task.checkpoint='it\\'s a (file), {here}=1.pt'"],
        ["dataset.schedule=[[0.5,0.1],[1.0,0.01]]", "dataset.flip=false", "gpu.deterministic=false"],
    ],
    ids=" ".join,
)
def test_a_run_is_composed_again_by_its_overrides(arguments: list[str]) -> None:
    assert_composed_again(arguments)


def assert_composed_again(arguments: list[str]) -> None:
    (config,) = composed(arguments)
    assert composed(overrides(config)) == [config]


def test_cells_of_experiments_are_composed_again_by_their_overrides() -> None:
    """So many that every experiment is named, and every value that one of them lists."""
    with compose.session():
        lists = [compose._split([f"experiment={name}"], multirun=True) for name in options("experiment")]
        cells = list(chain(*lists))
    left = set(chain(*cells))
    while left:
        cell = max(cells, key=lambda texts: len(left.intersection(texts)))
        assert_composed_again(cell)
        left -= set(cell)


def test_overrides_say_what_a_run_is_and_not_where_it_lies() -> None:
    (here,), (there,) = composed([]), composed(["results=/elsewhere", "dataset.root=/data", "resume=false"])
    assert overrides(here) == overrides(there) == [
        "experiment=single", "task=train", "dataset=cifar10", "mode=4bit", "gpu=auto", "depth=164", "width=1.0",
        "seed=0",
    ]  # fmt: skip


def test_a_run_is_named_after_what_tells_it_apart() -> None:
    assert run_name(make()) == "digits-4bit-depth29-width1-seed0"
    assert run_name(make(experiment="demo", width=0.25, seed=3)) == "demo-digits-4bit-depth29-width0.25-seed3"
    assert run_name(make(gpu__precision="bf16")) == "digits-4bit-depth29-width1-bf16-seed0"


@pytest.mark.parametrize("task", ["train", "gradient-error", "kernels", "max-batch", "memory", "runtime"])
def test_no_two_precisions_share_a_folder(task: str) -> None:
    cells = composed([f"task={task}", "gpu.precision=auto,tf32,bf16,fp32"], multirun=True)
    assert len({folder_name(cell) for cell in cells}) == 4


@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {"single"}))
def test_every_experiment_names_its_precisions(experiment: str) -> None:
    """So that its runs and its records do."""
    told = option("experiment", experiment)
    named = str(OmegaConf.select(told, "gpu.precision") or told.hydra.sweeper.params["gpu.precision"]).split(",")
    assert set(named) <= {"tf32", "bf16", "fp32"}


def test_recipe_changes_are_those_that_no_column_of_a_record_holds() -> None:
    assert recipe_changes(make()) == {}
    assert recipe_changes(make(dataset__iterations=7, dataset__batch_size=2, dataset__root="elsewhere")) == {}
    assert recipe_changes(make(mode__bits=8)) == {"mode.bits": 8}  # or it would pass for what its mode's name says
    assert recipe_changes(make(dataset__eval_batch_size=8)) == {}  # with running averages it decides nothing
    on_batches = make(dataset__eval_batch_size=8, dataset__eval_statistics="batch")
    assert recipe_changes(on_batches) == {"dataset.eval_batch_size": 8, "dataset.eval_statistics": "batch"}
    changed = make(dataset__augmentation="none", mode__clip=2.0)
    assert recipe_changes(changed) == {"dataset.augmentation": "none", "mode.clip": 2.0}


def test_a_mode_without_a_file_is_told_by_its_values() -> None:
    assert recipe_changes(make(mode__name="mine")) == {"mode.layers": "coded", "mode.bits": 4}
    changed = recipe_changes(make(mode__name="mine", mode__clip=2.0))
    assert changed == {"mode.layers": "coded", "mode.bits": 4, "mode.clip": 2.0}


def test_labels_and_colours_decide_nothing() -> None:
    renamed = make(mode__label="mine", mode__order=1, mode__colour="#123456", mode__alpha="1", dataset__label="ours")
    assert renamed == make()
    assert recipe_changes(renamed) == {}
    assert overrides(renamed) == overrides(make())
    assert deciding_fields(renamed) == deciding_fields(make())


def test_a_task_s_folder_tells_apart_what_its_cells_may_differ_in() -> None:
    assert folder_name(make()) == "a-run"
    assert folder_name(make(task="tables")) is None
    timed = make(task="runtime")
    assert folder_name(timed) == "a-run-runtime-batch64-auto"
    changes = ({"dataset__batch_size": 8}, {"gpu__kernels": "torch"})
    assert len({folder_name(make(task="runtime", **change)) for change in changes} | {folder_name(timed)}) == 3
