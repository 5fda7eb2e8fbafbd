"""runners/config.py: every option is a valid configuration, and every mistake is one line that names the value."""

import re
from contextlib import nullcontext

import pytest
from support import composed, make, refusal

from blpa.models.preact_resnet import CIFAR, IMAGENET
from runners import checks
from runners import config as schema
from runners.cells import task_module, task_settings
from runners.config import Config, options
from runners.option_files import option


def check(config: Config) -> None:
    """All that the command line checks of a typed configuration."""
    checks.check(config)
    getattr(task_module(config.task.name), "check", lambda config: None)(config)


def test_a_valid_configuration_passes() -> None:
    check(make())
    check(make(mode__bits=None))
    check(make(mode__layers="checkpoint", mode__bits=None, mode__segments=9))  # depth 29 has 9 blocks
    check(make(width=0.25, mode__width_factor=0.25))
    check(make(dataset__momentum=0.0, dataset__weight_decay=0.0, dataset__crop_padding=0))


@pytest.mark.parametrize("depth", [11, 20, 29, 56, 164, 254, 488, 1001])
def test_depth_of_nine_n_plus_two_passes(depth: int) -> None:
    check(make(depth=depth))


@pytest.mark.parametrize(
    ("depth", "nearest"),
    [(165, "164 and 173"), (172, "164 and 173"), *((depth, "11 and 20") for depth in (12, 10, 2, 0, -7))],
)
def test_any_other_depth_names_the_nearest_two(depth: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"^depth={depth} .* the nearest are {nearest}$"):
        check(make(depth=depth))


@pytest.mark.parametrize(
    "key",
    [
        "dataset__classes",
        "dataset__image_size",
        "dataset__image_channels",
        "dataset__iterations",
        "dataset__batch_size",
        "dataset__eval_batch_size",
        "mode__clip",
        "mode__width_factor",
        "task__evaluate_every",
        "task__checkpoint_every",
        "width",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_zero_and_negative_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{key.replace('__', '.')}={value} is not allowed"):
        check(make(**{key: value}))


@pytest.mark.parametrize("key", ["width", "mode__clip", "mode__width_factor", "dataset__weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_what_is_no_positive_number_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key.replace('__', '.')}={value} is not allowed"):
        check(make(**{key: value}))


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("dataset__name", "cifar10, cifar10-files, cifar100, digits, imagenet"),
        ("dataset__augmentation", "per-image, per-batch, none"),
        ("dataset__eval_statistics", "running, batch"),
        ("mode__layers", "stock, coded, checkpoint, offload, compiled"),
        ("gpu__device", "auto, cpu, cuda"),
        ("gpu__precision", "auto, tf32, bf16, fp32"),
        ("gpu__kernels", "auto, torch, inductor, triton"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(key: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{key.replace('__', '.')}=nonsense is not allowed: .* {allowed}$"):
        check(make(**{key: "nonsense"}))


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -4])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^mode.bits={bits} is not allowed: choose 2, 4 or 8"):
        check(make(mode__bits=bits))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"mode__layers": "stock"}, "mode.bits=4 needs mode.layers=coded"),
        ({"mode__layers": "checkpoint"}, "mode.bits=4 needs mode.layers=coded"),
        ({"mode__bits": None, "mode__forward_from_code": True}, "mode.forward_from_code=true needs codes"),
        ({"mode__segments": 2}, "mode.segments=2 needs mode.layers=checkpoint"),
        ({"mode__layers": "checkpoint", "mode__bits": None, "mode__segments": 0}, "mode.segments=0 is not allowed"),
        (
            {"mode__layers": "checkpoint", "mode__bits": None, "mode__segments": 10},
            "mode.segments=10 is not allowed: depth=29 has 9 blocks",
        ),
        ({"mode__bits": None, "mode__clip": 2.0}, "mode.clip=2.0 needs codes to clip"),
    ],
)
def test_values_of_a_mode_that_contradict_each_other_are_refused(mode: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(make(**mode))


def test_a_width_without_a_channel_is_refused_naming_both_factors() -> None:
    with pytest.raises(ValueError, match=r"^width=0\.1 with mode\.width_factor=0\.25 leaves less than a channel"):
        check(make(width=0.1, mode__width_factor=0.25))


@pytest.mark.parametrize("width", [1 / 32, 1 / 31, 0.1, 1.0])
def test_the_width_is_refused_where_the_network_refuses_it(width: float) -> None:
    """The check knows the stem's channels by heart, for the network would import torch."""
    has_channels = round(CIFAR.stem_channels * width) >= 1
    with nullcontext() if has_channels else pytest.raises(ValueError, match=r"^width="):
        check(make(width=width))


@pytest.mark.parametrize(
    "schedule",
    [
        [],
        [[1.0]],
        [[0.5, 0.1]],
        [[0.5, 0.1], [0.5, 0.1], [1.0, 0.1]],
        [[0.75, 0.1], [0.5, 0.1], [1.0, 0.1]],
        [[0.0, 0.1], [1.0, 0.1]],
        [[1.5, 0.1]],
        [[1.0, 0.0]],
        [[1.0, -0.1]],
        [[1.0, float("nan")]],
        [[float("nan"), 0.1]],
    ],
)
def test_a_schedule_that_does_not_lead_to_the_end_is_refused(schedule: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"^dataset\.schedule=\[.*\] is not allowed"):
        check(make(dataset__schedule=schedule))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_is_at_least_zero_and_below_one(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"^dataset.momentum={momentum} is not allowed"):
        check(make(dataset__momentum=momentum))


@pytest.mark.parametrize("key", ["run", "experiment", "mode__name"])
@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/tmp", "a b", ".hidden", "-m", "a\n"])
def test_a_name_that_is_no_plain_file_name_is_refused(key: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{key.replace('__', '.')}="):
        check(make(**{key: name}))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed={seed} is not allowed"):
        check(make(seed=seed))


def test_empty_results_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^results= is empty"):
        check(make(results=""))


def test_every_group_has_the_options_of_the_command_line() -> None:
    assert options("dataset") == ["cifar10", "cifar10-files", "cifar100", "digits", "imagenet"]
    assert set(options("mode")) == {
        "exact", "fewer-features", "naive-8bit", "8bit", "4bit", "4bit-pool", "2bit", "exact-one-copy", "checkpoint",
        "offload", "compiled", "compiled-budget-0.5", "compiled-budget-0.2", "compiled-fp8",
    }  # fmt: skip
    assert options("gpu") == ["auto", "cpu", "gtx1080ti", "h200"]
    assert options("task") == [
        "converted-runtime", "explain", "gradient-error", "kernels", "max-batch", "memory", "plots", "progress",
        "report", "runtime", "tables", "thresholds", "train",
    ]  # fmt: skip
    assert options("experiment") == [
        "bench-batches", "bench-batches-fp32", "bench-card", "bench-converted", "bench-converted-fp32",
        "bench-kernels", "bench-kernels-others", "bench-largest", "bench-largest-fp32", "bench-times",
        "bench-times-fp32", "bench-training", "converted", "converted-times", "demo", "demo-batches",
        "demo-gradients", "demo-memory", "demo-times", "gradients", "image-files",
        "imagenet-batches", "imagenet-times", "single", "table1", "table1-imagenet", "table1-quarter", "table2",
        "table2-fp32", "table3", "table3-fp32",
    ]  # fmt: skip


@pytest.mark.parametrize("task", options("task"))
def test_a_task_s_file_sets_all_of_its_settings(task: str) -> None:
    assert task_settings(task).name == task
    assert task_settings(task, {**option("task", task)}) == task_settings(task)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("runtime", {"steps": 0}, "task.steps=0 is not allowed: it is a whole number, at least 1"),
        ("runtime", {"modes": ["4bits"]}, "task.modes=4bits is not allowed: choose one of 2bit, "),
        ("kernels", {"elements": 1}, "task.elements=1 is not allowed"),
        ("gradient-error", {"checkpoint": ""}, "task.checkpoint= is empty"),
        ("thresholds", {}, "task=thresholds analyses trained weights"),
        ("explain", {"image_size": 0}, "task.image_size=0: must be a number of pixels above 0"),
        ("tables", {"tables": ["error"]}, "task.tables=error is not allowed: choose one of memory, "),
        ("max-batch", {"resolution": 1.0}, "task.resolution=1.0 is not allowed"),
    ],
)
def test_a_task_checks_its_own_settings(task: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(make(task=task, **{f"task__{key}": value for key, value in values.items()}))


# ---- image files

FILES = {
    f"dataset__{key}": value
    for key, value in {
        "image_channels": 3, "image_size": 32, "crop_padding": 0, "train_sides": [36, 48], "colour": True,
        "check_side": 36, "check_images": 100, "test_side": 36, "test_crops": 10, "decoder": "pillow",
    }.items()
}  # fmt: skip


def test_a_data_set_of_image_files_passes() -> None:
    check(make(**FILES))
    check(make(**FILES, dataset__workers=0, dataset__augmentation="none"))
    check(make(**{**FILES, "dataset__train_sides": [32, 32], "dataset__test_crops": 1, "dataset__colour": False}))


@pytest.mark.parametrize("name", schema.IMAGE_FILES)
def test_a_data_set_of_image_files_gives_all_of_its_values(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^dataset\.{name}=null is not allowed with dataset\.\w+=.*: a data set of im"
    ):
        check(make(**{**FILES, f"dataset__{name}": None}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_sides": [31, 48]},
            r"dataset\.train_sides=\[31, 48\] is not allowed: .*dataset\.image_size=32",
        ),
        ({"train_sides": [48, 36]}, r"dataset\.train_sides=\[48, 36\] is not allowed"),
        ({"train_sides": [48, 16385]}, r"dataset\.train_sides=\[48, 16385\] is not allowed: .*at most 16384$"),
        ({"train_sides": [48]}, r"dataset\.train_sides=\[48\] is not allowed"),
        ({"check_side": 31}, r"dataset\.check_side=31 is not allowed: it is a whole number, at least 32"),
        ({"test_side": 31}, r"dataset\.test_side=31 is not allowed: it is a whole number, at least 32"),
        ({"check_images": 0}, r"dataset\.check_images=0 is not allowed: it is a whole number, at least 1"),
        ({"test_crops": 5}, r"dataset\.test_crops=5 is not allowed: choose 1 or 10"),
        ({"decoder": "dali"}, r"dataset\.decoder=dali is not allowed: choose one of pillow, torchcodec"),
        ({"workers": -1}, r"dataset\.workers=-1 is not allowed: it is a whole number, 0 to 1024"),
        ({"workers": 1025}, r"dataset\.workers=1025 is not allowed: it is a whole number, 0 to 1024"),
        ({"image_channels": 1}, r"dataset\.image_channels=1 is not allowed: image files are read as RGB"),
        ({"augmentation": "per-batch"}, r"dataset\.augmentation=per-batch is not allowed for image files"),
        ({"crop_padding": 4}, r"dataset\.crop_padding=4 is not allowed for image files"),
    ],
)
def test_values_that_image_files_cannot_have_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(make(**{**FILES, **{f"dataset__{key}": value for key, value in values.items()}}))


def test_images_in_memory_have_no_workers() -> None:
    with pytest.raises(ValueError, match=r"^dataset\.workers=2: digits is in memory, and has no workers$"):
        check(make(dataset__workers=2))


@pytest.mark.parametrize("count", [0, 3])
def test_sub_batches_that_do_not_divide_the_batch_are_refused(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line too, where a task is still a dictionary."""
    message = f"dataset.sub_batches={count} is not allowed: it divides dataset.batch_size=64"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(make(dataset__batch_size=64, dataset__sub_batches=count))
    assert message in refusal(["dataset=digits", f"dataset.sub_batches={count}"], capsys)


def test_only_training_divides_the_batch() -> None:
    (memory,) = composed(["dataset=digits", "dataset.sub_batches=3", "task=memory"])
    assert memory.dataset.sub_batches == 3


def test_the_checks_know_the_depths_of_the_imagenet_network() -> None:
    """They have them by heart, for the network would import torch."""
    assert IMAGENET.groups is not None
    assert tuple(IMAGENET.groups) == checks.IMAGENET_DEPTHS
