"""The paper's own figures, so that a measured number can stand beside them (Chakrabarti and Moseley 2019, section 4).

alpha is bits kept an activation over the 32 of full precision, as the paper counts it: PyTorch's own layers, which
`exact` runs here, keep two tensors a unit where the paper's exact kept one.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from runners.cells import departures
from runners.config import Config

Number = TypeVar("Number", int, float)


class Row(NamedTuple):
    """A row of the table of errors."""

    label: str
    alpha: str
    always: bool
    """Whether the row is shown where nothing has been run."""


ROWS = {
    "exact": Row("exact", "1", True),
    "exact-one-copy": Row("exact, one copy a unit", "1", False),
    "checkpoint": Row("checkpoint (recomputed)", "-", False),
    "offload": Row("offload (to the host)", "-", False),
    "compiled": Row("torch.compile", "-", False),
    "compiled-budget-0.5": Row("torch.compile, budget 0.5", "-", False),
    "compiled-budget-0.2": Row("torch.compile, budget 0.2", "-", False),
    "compiled-fp8": Row("torch.compile, fp8 pass", "-", False),
    "fewer-features": Row("exact, fewer features", "1/4", True),
    "naive-8bit": Row("naive 8-bit", "1/4", True),
    "8bit": Row("proposed 8-bit", "1/4", True),
    "4bit": Row("proposed 4-bit", "1/8", True),
    "2bit": Row("2-bit (ours)", "1/16", True),
}
"""The paper's rows in its order, by mode; those it does not have stand after the exact one they are to beat."""


class Cells(NamedTuple):
    """What the paper's cells of one data set have in common; the names are those of a record's columns."""

    dataset: str
    depth: int
    width: float
    iterations: int
    batch_size: int


CIFAR10 = Cells("cifar10", 164, 1.0, 64000, 128)
CIFAR100 = Cells("cifar100", 164, 1.0, 64000, 128)
IMAGENET = Cells("imagenet", 152, 1.0, 640000, 256)

ERROR_PERCENT: dict[Cells, dict[str, tuple[float, float | None]]] = {
    CIFAR10: {
        "exact": (5.36, 0.15),
        "fewer-features": (9.49, 0.12),
        "naive-8bit": (75.49, 9.09),
        "8bit": (5.48, 0.13),
        "4bit": (5.49, 0.16),
    },
    CIFAR100: {
        "exact": (23.44, 0.26),
        "fewer-features": (33.47, 0.50),
        "naive-8bit": (95.41, 2.16),
        "8bit": (23.63, 0.32),
        "4bit": (23.58, 0.30),
    },
    IMAGENET: {"exact": (7.20, None), "8bit": (7.70, None), "4bit": (7.72, None)},
}
"""Mean and standard deviation of the error in percent (top 5 of 10 crops for ImageNet), by mode."""


def error_percent(group: tuple[Any, ...], mode: str) -> tuple[float | None, float | None]:
    """Look up mean and standard deviation of the error in percent; None where the paper has no such figure.

    Args:
        group: a value for each name of records.GROUP. The paper's figure is shown beside every precision, which the
            tables name; theirs was fp32.
        mode: the mode's name.
    """
    cells = cells_of(group)
    return ERROR_PERCENT[cells].get(mode, (None, None)) if cells else (None, None)


def cells_of(group: tuple[Any, ...]) -> Cells | None:
    """The paper's cells that a group's runs repeat, in whatever precision; None where the recipe is another."""
    *cells, _, note = group
    found = Cells(*cells)
    return found if found in ERROR_PERCENT and not note else None


LARGEST_BATCH: dict[tuple[int, float], dict[str, int]] = {
    (1001, 4.0): {"exact-one-copy": 26, "4bit": 182},
    (1001, 1.0): {"exact-one-copy": 134, "4bit": 876},
    (488, 1.0): {"exact-one-copy": 264, "4bit": 1468},
    (254, 1.0): {"exact-one-copy": 474, "4bit": 2154},
    (164, 1.0): {"exact-one-copy": 688, "4bit": 2522},
}
"""The largest batch on one GTX 1080 Ti (11 GB), by depth and width, in the order of the paper's poster, then by mode.
The paper's exact shares buffers and keeps one tensor a unit: it is the mode exact-one-copy here."""

CARD_GIB = 11.0


def is_its_card(note: str) -> bool:
    """Whether a record's note names the memory of the paper's card and nothing that the paper's figures are not of.

    Theirs are of whichever convolutions were fastest.
    """
    return re.fullmatch(rf"{CARD_GIB:g} GiB less \d+ MiB( gpu\.deterministic=false)?", note) is not None


def largest_batch(config: Config) -> int | None:
    """Look up the largest batch; None where the paper has no such figure."""
    return _of_cell(LARGEST_BATCH, config)


def _of_cell(figures: Mapping[tuple[int, float], Mapping[str, Number]], config: Config) -> Number | None:
    """The figure of a run's own network and mode, on the paper's card, at its size and recipe, in any precision."""
    if (config.gpu.memory_gib, config.dataset.image_size, departures(config)) != (CARD_GIB, 32, ""):
        return None
    return figures.get((config.depth, config.width), {}).get(config.mode.name)


SECONDS_PER_SAMPLE: dict[tuple[int, float], dict[str, float]] = {
    (1001, 4.0): {"exact-one-copy": 0.1308, "4bit": 0.1016},
    (1001, 1.0): {"exact-one-copy": 0.0313, "4bit": 0.0260},
    (488, 1.0): {"exact-one-copy": 0.0133, "4bit": 0.0127},
    (254, 1.0): {"exact-one-copy": 0.0065, "4bit": 0.0067},
    (164, 1.0): {"exact-one-copy": 0.0041, "4bit": 0.0043},
}
"""Time of a training step by the sample on one GTX 1080 Ti, in seconds, by depth and width, then by mode."""


def seconds_per_sample(config: Config) -> float | None:
    """Look up the time a sample at the largest batch, on the paper's card; None where it has no such figure."""
    return _of_cell(SECONDS_PER_SAMPLE, config) if config.task.largest_batch else None
