"""The paper's own figures, which tables show beside measured numbers (Chakrabarti and Moseley 2019, section 4)."""

from typing import Any, NamedTuple

from runners.records import Settings, canonical


class Cells(NamedTuple):
    """What the paper's cells of one data set share; the names are those of a record's columns."""

    dataset: str
    depth: int
    width: float
    iterations: int
    batch_size: int


CIFAR10 = Cells("cifar10", 164, 1.0, 64000, 128)
CIFAR100 = Cells("cifar100", 164, 1.0, 64000, 128)
IMAGENET = Cells("imagenet", 152, 1.0, 640000, 256)
TOP5 = (IMAGENET,)
"""Cells whose errors are top-5: the right class is not among the five with the largest logits."""

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
            tables name; the paper's own was fp32.
        mode: the mode's name.
    """
    cells = cells_of(group)
    return ERROR_PERCENT[cells].get(mode, (None, None)) if cells else (None, None)


def cells_of(group: tuple[Any, ...]) -> Cells | None:
    """Return the paper's cells with a group's recipe, whatever its precision; None where the recipe is another."""
    *cells, _, settings = group
    found = Cells(*cells)
    return found if found in ERROR_PERCENT and settings == canonical({}) else None


LARGEST_BATCH: dict[tuple[int, float], dict[str, int]] = {
    (1001, 4.0): {"exact-one-copy": 26, "4bit": 182},
    (1001, 1.0): {"exact-one-copy": 134, "4bit": 876},
    (488, 1.0): {"exact-one-copy": 264, "4bit": 1468},
    (254, 1.0): {"exact-one-copy": 474, "4bit": 2154},
    (164, 1.0): {"exact-one-copy": 688, "4bit": 2522},
}
"""The largest batch on one GTX 1080 Ti (11 GB), by depth and width, in the order of the paper's poster, then by mode.
The paper's exact shares buffers and saves one tensor per layer: it is the mode exact-one-copy here."""

CARD_GIB = 11.0


def matches_card(settings: Settings) -> bool:
    """Check for the memory budget of the paper's GTX 1080 Ti, default settings otherwise.

    The paper's convolutions were whichever were fastest, so deterministic or not, ours stand beside them.
    """
    others = settings.keys() - {"memory_gib", "allowance_mib", "largest_batch", "gpu.deterministic"}
    return settings.get("memory_gib") == CARD_GIB and not others


SECONDS_PER_SAMPLE: dict[tuple[int, float], dict[str, float]] = {
    (1001, 4.0): {"exact-one-copy": 0.1308, "4bit": 0.1016},
    (1001, 1.0): {"exact-one-copy": 0.0313, "4bit": 0.0260},
    (488, 1.0): {"exact-one-copy": 0.0133, "4bit": 0.0127},
    (254, 1.0): {"exact-one-copy": 0.0065, "4bit": 0.0067},
    (164, 1.0): {"exact-one-copy": 0.0041, "4bit": 0.0043},
}
"""Time of a training step per sample on one GTX 1080 Ti, in seconds, by depth and width, then by mode."""
