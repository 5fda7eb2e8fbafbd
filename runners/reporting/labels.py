"""What modes, data sets and settings are called in tables and figures.

A mode's label, alpha, colour and order stand in its YAML file, a data set's label in its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners import CONF
from runners.config import MODE_LABELS, ModeConfig
from runners.records import Settings
from runners.reporting.paper import IMAGENET, IMAGENET_LABEL


@dataclass(frozen=True)
class Labels:
    """Names, colours and order of modes and data sets."""

    modes: Mapping[str, ModeConfig]
    """By name; only the fields of config.MODE_LABELS are filled."""
    datasets: Mapping[str, str]
    """Label by name."""

    def mode(self, name: str) -> ModeConfig:
        """Return how a mode is shown: one without a YAML file has the defaults of ModeConfig, grey and last."""
        return self.modes.get(name, ModeConfig(name=name))

    def label(self, mode: str) -> str:
        """Return a mode's name in tables and figures."""
        return self.mode(mode).label or mode

    def order(self, mode: str) -> tuple[int, str]:
        """Return the key that sorts modes in tables and figures."""
        return self.mode(mode).order, mode

    def images(self, dataset: str) -> str:
        """Return a data set's name in tables and figures."""
        return self.datasets.get(dataset) or dataset


def read_labels(extra_folders: Sequence[Path] = ()) -> Labels:
    """Read the labels from the YAML files of modes and data sets.

    Args:
        extra_folders: the user's own folders of options, each with mode/ or dataset/ in it; their files replace the
            package's files of the same name.
    """
    modes = {
        name: ModeConfig(name=name, **{field: values[field] for field in MODE_LABELS if field in values})
        for name, values in _options("mode", extra_folders).items()
    }
    datasets = {name: values.get("label", "") for name, values in _options("dataset", extra_folders).items()}
    return Labels(modes, {IMAGENET.dataset: IMAGENET_LABEL} | datasets)


def _options(group: str, extra_folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Read the YAML files of one group, by the name that each gives itself."""
    found = {}
    for folder in (CONF, *extra_folders):
        for file in sorted((folder / group).glob("*.yaml")):
            values: Any = OmegaConf.to_container(OmegaConf.load(file))
            found[values.get("name", file.stem)] = values
    return found


def settings_text(settings: Settings) -> str:
    """Write a record's settings for people: 11 GiB less 512 MiB gpu.deterministic=false. Nothing reads it back."""
    rest = dict(settings)
    parts = []
    if "memory_gib" in rest:
        gib, mib = rest.pop("memory_gib"), rest.pop("allowance_mib")
        budget = f"{gib:g} GiB less {mib} MiB" if gib else "the whole card"
        parts.append(f"largest batch in {budget}" if rest.pop("largest_batch", False) else budget)
    if "checkpoint" in rest:
        checkpoint = rest.pop("checkpoint")
        parts.append(f"at {checkpoint}" if checkpoint else "at initialisation")
    if "rows" in rest:
        parts.append(f"{rest.pop('rows')} rows of {rest.pop('channels')} channels")
    if "kernel_size" in rest:
        size = rest.pop("kernel_size")
        parts.append(f"unit {size}x{size} {rest.pop('in_channels')} to {rest.pop('out_channels')}")
    for name, value in sorted(rest.items()):
        parts.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(parts)
