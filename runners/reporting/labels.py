"""What modes, data sets and settings are called in tables and figures.

A mode's label, alpha, colour and order stand in its YAML file, a data set's label in its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runners.checks import check_colour
from runners.config import MODE_LABELS, ModeConfig, options
from runners.errors import UserError
from runners.option_files import option
from runners.records import Settings


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


def read_labels(config_dir: str | None = None) -> Labels:
    """Read the labels from the YAML files of modes and data sets.

    Args:
        config_dir: the user's own folder of options; its files replace the package's files of the same name.
    """
    modes = {}
    for name, values in _options("mode", config_dir).items():
        try:
            check_colour(values.get("colour", ModeConfig.colour))
        except UserError as error:
            raise UserError(f"mode {name}: {error}") from None
        modes[name] = ModeConfig(name=name, **{field: values[field] for field in MODE_LABELS if field in values})
    datasets = {name: values.get("label", "") for name, values in _options("dataset", config_dir).items()}
    return Labels(modes, datasets)


def _options(group: str, config_dir: str | None) -> dict[str, Any]:
    """Read the YAML files of one group, by the name that each gives itself."""
    found = (option(group, name, config_dir) for name in options(group, config_dir))
    return {values["name"]: values for values in found}


IN_TITLES = ("gpu.processes", "gpu.sync_batch_norm")
"""Settings that titles of tables name."""


def settings_text(settings: Settings) -> str:
    """Write a record's settings for people: 11 GiB less 512 MiB gpu.deterministic=false. Nothing reads it back."""
    rest = dict(settings)
    parts = []
    if "memory_gib" in rest:
        gib, mib = rest.pop("memory_gib"), rest.pop("allowance_mib", "?")
        gib = f"{gib:g}" if isinstance(gib, float) else gib
        budget = f"{gib} GiB less {mib} MiB" if gib else "the whole card"
        parts.append(f"largest batch in {budget}" if rest.pop("largest_batch", False) else budget)
    if "checkpoint" in rest:
        checkpoint = rest.pop("checkpoint")
        parts.append(f"at {checkpoint}" if checkpoint else "at initialisation")
    if "rows" in rest:
        parts.append(f"{rest.pop('rows')} rows of {rest.pop('channels', '?')} channels")
    if "kernel_size" in rest:
        size = rest.pop("kernel_size")
        parts.append(f"BN-ReLU-conv {size}x{size} {rest.pop('in_channels', '?')} to {rest.pop('out_channels', '?')}")
    if "gpu.processes" in rest:
        together = ", statistics of all" if rest.pop("gpu.sync_batch_norm", False) else ""
        parts.append(f"{rest.pop('gpu.processes')} processes{together}")
    for name, value in sorted(rest.items()):
        parts.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(parts)
