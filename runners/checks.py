"""What a configuration may be beyond its types: a mistake is one line with the key, the value and what is allowed.

Nothing here imports torch, so a mistake is answered at once.
"""

import math
import re
from collections.abc import Collection

from runners.config import IMAGE_FILES, LONGEST_NAME, Config, DatasetConfig, ModeConfig, options
from runners.errors import UserError

LARGEST_SIDE = 16_384
"""Largest short side of a training image, in pixels."""
MOST_WORKERS = 1024
"""Most processes that decode images: far more than a machine has cores for."""
TASKS_IN_PROCESSES = ("train", "runtime", "max-batch")
"""Tasks that several processes do together."""
IMAGENET_DEPTHS = (26, 50, 101, 152)
"""Depths of the imagenet architecture."""


def check(config: Config) -> None:
    """Check that a configuration can be run.

    Args:
        config: the run, composed and typed.

    Raises:
        UserError: the first mistake found, on one line: the key, the value and what is allowed.
    """
    _check_dataset(config)
    _check_mode(config.mode)
    one_of("gpu.device", config.gpu.device, ("auto", "cpu", "cuda"))
    one_of("gpu.precision", config.gpu.precision, ("auto", "tf32", "bf16", "fp32"))
    one_of("gpu.kernels", config.gpu.kernels, ("auto", "torch", "inductor", "triton"))
    if config.gpu.memory_gib is not None:
        above_zero("gpu.memory_gib", config.gpu.memory_gib)
    at_least("gpu.allowance_mib", config.gpu.allowance_mib, 0)
    _check_processes(config)
    _check_depth(config.depth, config.dataset)
    above_zero("width", config.width)
    _check_size(config)
    at_least("jobs", config.jobs, 1)
    if config.budget_minutes is not None:
        above_zero("budget_minutes", config.budget_minutes)
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is not allowed: it is a whole number from 0 to 2**63 - 1")
    _plain_name("mode.name", config.mode.name)
    _plain_name("experiment", config.experiment)
    _plain_name("run", config.run)
    if not config.results:
        raise UserError("results= is empty: give the folder for runs, records, tables and figures")
    _check_characters(config)


def _check_characters(config: Config) -> None:
    """Check the texts that no other check limits: a record holds them in its command, and must read back."""
    task = config.task if isinstance(config.task, dict) else vars(config.task)
    texts = {
        "results": config.results,
        "--config-dir": config.config_dir,
        "dataset.root": config.dataset.root,
        "dataset.reader": config.dataset.reader,
        "gpu.name": config.gpu.name,
        **{f"task.{key}": value for key, value in task.items()},
    }
    for key, text in texts.items():
        if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f]", text):
            raise UserError(f"{key}={text!r} is not allowed: a path or name has no control characters")


def _check_dataset(config: Config) -> None:
    dataset = config.dataset
    one_of("dataset.name", dataset.name, options("dataset", config.config_dir))
    _plain_name("dataset.version", dataset.version)
    one_of("dataset.architecture", dataset.architecture, ("cifar", "imagenet"))
    at_least("dataset.classes", dataset.classes, 2)
    for key in ("image_size", "image_channels", "iterations", "batch_size", "eval_batch_size"):
        at_least(f"dataset.{key}", getattr(dataset, key), 1)
    if dataset.sub_batches < 1 or (
        _task_name(config) == "train" and dataset.batch_size % dataset.sub_batches
    ):  # others do not divide
        raise UserError(
            f"dataset.sub_batches={dataset.sub_batches} is not allowed: it divides dataset.batch_size="
            f"{dataset.batch_size}"
        )
    if dataset.top5 and dataset.classes <= 5:
        raise UserError(f"dataset.top5=true needs more than five classes: dataset.classes={dataset.classes}")
    at_least("dataset.crop_padding", dataset.crop_padding, 0)
    _check_schedule(dataset.schedule)
    if not 0 <= dataset.momentum < 1:
        raise UserError(f"dataset.momentum={dataset.momentum} is not allowed: it is at least 0 and less than 1")
    if not (dataset.weight_decay >= 0 and math.isfinite(dataset.weight_decay)):
        raise UserError(f"dataset.weight_decay={dataset.weight_decay} is not allowed: it is a number, at least 0")
    if not 0 <= dataset.label_smoothing <= 1:
        raise UserError(f"dataset.label_smoothing={dataset.label_smoothing} is not allowed: it is 0 to 1")
    one_of("dataset.augmentation", dataset.augmentation, ("per-image", "per-batch", "none"))
    one_of("dataset.eval_statistics", dataset.eval_statistics, ("running", "batch"))
    _check_image_files(dataset)


def _check_image_files(dataset: DatasetConfig) -> None:
    """Check the values of a data set of image files: all are given, or none."""
    given = [key for key in IMAGE_FILES if getattr(dataset, key) is not None]
    if not given:
        if dataset.workers is not None:
            raise UserError(f"dataset.workers={dataset.workers}: {dataset.name} is in memory, and has no workers")
        return
    if missing := [key for key in IMAGE_FILES if key not in given]:
        raise UserError(
            f"dataset.{missing[0]}=null is not allowed with dataset.{given[0]}={getattr(dataset, given[0])}: a data "
            f"set of image files gives {', '.join(IMAGE_FILES)}; one in memory gives none of them"
        )
    sides, size = dataset.train_sides or [], dataset.image_size
    if len(sides) != 2 or not size <= sides[0] <= sides[1] <= LARGEST_SIDE:
        raise UserError(
            f"dataset.train_sides={sides} is not allowed: it is the smallest and the largest short side, at least "
            f"dataset.image_size={size} and at most {LARGEST_SIDE}"
        )
    for key in ("check_side", "test_side"):
        at_least(f"dataset.{key}", getattr(dataset, key), size)
    at_least("dataset.check_images", dataset.check_images or 0, 1)
    if dataset.test_crops not in (1, 10):
        raise UserError(f"dataset.test_crops={dataset.test_crops} is not allowed: choose 1 or 10")
    one_of("dataset.decoder", str(dataset.decoder), ("pillow", "torchcodec"))
    if dataset.workers is not None and not 0 <= dataset.workers <= MOST_WORKERS:
        raise UserError(f"dataset.workers={dataset.workers} is not allowed: it is a whole number, 0 to {MOST_WORKERS}")
    if dataset.image_channels != 3:
        raise UserError(f"dataset.image_channels={dataset.image_channels} is not allowed: image files are read as RGB")
    if dataset.augmentation == "per-batch":
        raise UserError("dataset.augmentation=per-batch is not allowed for image files: choose per-image or none")
    if dataset.crop_padding:
        raise UserError(
            f"dataset.crop_padding={dataset.crop_padding} is not allowed for image files, which are cropped without "
            "padding: it is 0"
        )


def _check_processes(config: Config) -> None:
    """Check that the processes can share the work: each gets as many images of a batch as any other."""
    gpu, dataset, task = config.gpu, config.dataset, _task_name(config)
    at_least("gpu.processes", gpu.processes, 1)
    at_least("gpu.restarts", gpu.restarts, 0)
    above_zero("gpu.timeout_minutes", gpu.timeout_minutes)
    if gpu.sync_batch_norm and config.mode.layers == "compiled":
        raise UserError("gpu.sync_batch_norm=true is not allowed with compiled layers: choose another mode")
    if gpu.processes == 1:
        if gpu.sync_batch_norm:
            raise UserError("gpu.sync_batch_norm=true needs gpu.processes of at least 2: one process has all samples")
        return
    if task not in TASKS_IN_PROCESSES:
        allowed = ", ".join(TASKS_IN_PROCESSES)
        raise UserError(f"gpu.processes={gpu.processes} is not allowed for task={task}: it is for {allowed}")
    if config.jobs > 1:
        raise UserError(
            f"jobs={config.jobs} is not allowed with gpu.processes={gpu.processes}: a run has its GPUs alone"
        )
    parts = gpu.processes * (dataset.sub_batches if task == "train" else 1)
    if task != "max-batch" and dataset.batch_size % parts:
        times = f" times dataset.sub_batches={dataset.sub_batches}" if parts > gpu.processes else ""
        raise UserError(
            f"gpu.processes={gpu.processes}{times} does not divide dataset.batch_size={dataset.batch_size}, which is "
            "the batch of all processes"
        )


def _task_name(config: Config) -> str:
    return str(config.task["name"] if isinstance(config.task, dict) else config.task.name)


def _check_mode(mode: ModeConfig) -> None:
    one_of("mode.layers", mode.layers, ("stock", "coded", "checkpoint", "offload", "compiled"))
    if mode.bits not in (None, 2, 4, 8):
        raise UserError(f"mode.bits={mode.bits} is not allowed: choose 2, 4 or 8, or null for full precision")
    if mode.bits is not None and mode.layers != "coded":
        raise UserError(f"mode.bits={mode.bits} needs mode.layers=coded: {mode.layers} layers save no codes")
    if mode.forward_from_code and mode.bits is None:
        raise UserError("mode.forward_from_code=true needs codes to feed forward: give mode.bits 2, 4 or 8")
    if mode.codes_max_pool and mode.bits is None:
        raise UserError("mode.codes_max_pool=true needs codes to save: give mode.bits 2, 4 or 8")
    if mode.segments is not None:
        at_least("mode.segments", mode.segments, 1)
        if mode.layers != "checkpoint":
            raise UserError(f"mode.segments={mode.segments} needs mode.layers=checkpoint, not {mode.layers}")
    if not 0 <= mode.activation_memory_budget <= 1:
        raise UserError(f"mode.activation_memory_budget={mode.activation_memory_budget} is not allowed: it is 0 to 1")
    for key in ("activation_memory_budget", "fp8"):
        if getattr(mode, key) != getattr(ModeConfig, key) and mode.layers != "compiled":
            raise UserError(f"mode.{key}={getattr(mode, key)} needs mode.layers=compiled, not {mode.layers}")
    above_zero("mode.clip", mode.clip)
    if mode.bits is None and mode.clip != ModeConfig.clip:
        raise UserError(f"mode.clip={mode.clip} needs codes to clip: give mode.bits 2, 4 or 8")
    above_zero("mode.width_factor", mode.width_factor)
    check_colour(mode.colour)


def check_colour(colour: str) -> None:
    """Check the colour of a mode's lines."""
    if not re.fullmatch("#[0-9A-Fa-f]{6}", colour):
        raise UserError(f"mode.colour={colour} is not allowed: it is #rrggbb, red, green and blue, such as #0072B2")


def _check_schedule(schedule: list[list[float]]) -> None:
    """Check pairs [end, rate]: the ends increase from above 0 to exactly 1, the rates are above 0."""
    if not schedule or any(len(pair) != 2 for pair in schedule):
        raise UserError(f"dataset.schedule={schedule} is not allowed: it is a list of [end, rate] pairs")
    previous = 0.0
    for end, rate in schedule:
        if not previous < end <= 1:
            raise UserError(f"dataset.schedule={schedule} is not allowed: its ends increase, above 0 and up to 1")
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"dataset.schedule={schedule} is not allowed: its rates are numbers above 0")
        previous = end
    if previous != 1:
        raise UserError(f"dataset.schedule={schedule} is not allowed: its last end is 1, the end of the training")


def _check_depth(depth: int, dataset: DatasetConfig) -> None:
    if dataset.architecture == "imagenet":
        if depth not in IMAGENET_DEPTHS:
            allowed = ", ".join(map(str, IMAGENET_DEPTHS))
            raise UserError(f"depth={depth} is not allowed: the network of dataset={dataset.name} has one of {allowed}")
        return
    if depth >= 11 and depth % 9 == 2:
        return
    below = (depth - 2) // 9 * 9 + 2
    nearest = f"{below} and {below + 9}" if below >= 11 else "11 and 20"
    raise UserError(f"depth={depth} is not 9n + 2 for any n of at least 1: the nearest are {nearest}")


def _check_size(config: Config) -> None:
    """Check sizes: images can be halved as often as needed, the stem has a channel, each segment a block."""
    mode, size = config.mode, config.dataset.image_size
    is_imagenet = config.dataset.architecture == "imagenet"
    multiple, smallest = (32, 64) if is_imagenet else (4, 8)
    if size % multiple or size < smallest:
        raise UserError(
            f"dataset.image_size={size} is not allowed: it is a multiple of {multiple}, at least {smallest}"
        )
    stem_channels = 64 if is_imagenet else 16
    if stem_channels * config.width * mode.width_factor <= 0.5:
        raise UserError(
            f"width={config.width} with mode.width_factor={mode.width_factor} leaves less than a channel: "
            f"their product is above 1/{2 * stem_channels}"
        )
    blocks = (config.depth - 2) // 3
    if mode.segments is not None and mode.segments > blocks:
        raise UserError(f"mode.segments={mode.segments} is not allowed: depth={config.depth} has {blocks} blocks")


def one_of(key: str, value: str, allowed: Collection[str]) -> None:
    """Check that a value is one of those allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not allowed: choose one of {', '.join(allowed)}")


def at_least(key: str, value: int, smallest: int) -> None:
    """Check that a whole number is not below the smallest allowed."""
    if value < smallest:
        raise UserError(f"{key}={value} is not allowed: it is a whole number, at least {smallest}")


def above_zero(key: str, value: float) -> None:
    """Check that a number is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key}={value} is not allowed: it is a number above 0")


def _plain_name(key: str, value: str) -> None:
    """Check that a name is a file name on every system: letters, digits and . _ + -, led by a letter or digit."""
    if len(value) > LONGEST_NAME:
        raise UserError(f"{key}={value} is not allowed: it has {len(value)} characters, and may have {LONGEST_NAME}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", value):
        raise UserError(f"{key}={value} is not allowed: letters, digits and . _ + -, led by a letter or a digit")
