"""A run's folder: its checkpoints, each whole or absent, and its metrics.

    checkpoint-<iteration>-<first 16 hexadecimal digits of the sha256 of its bytes>.pt     named as in torch.hub
    metrics.csv                                                                           one row per evaluation

A file is written under another name, synced to disk and then renamed, so that a kill, a full disk or a power cut leaves
the previous one. Later damage shows as a wrong digest in the name. The last two checkpoints are kept, so a damaged
newest one can be skipped. One that may be good and cannot be read, for want of memory or for an error of the disk, ends
the run: going on without it would remove it. A checkpoint holds the configuration it belongs to, and no other
configuration can load it.
"""

import csv
import io
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runners.cells import IGNORED
from runners.config import Config, DatasetConfig, GpuConfig, ModeConfig
from runners.errors import CannotWrite, UserError
from runners.files import write_whole
from runners.records import FILES
from runners.training import torch_files
from runners.training.torch_files import Damaged, NotLoaded, Unreadable

NUMBER_OF_PROCESSES = "gpu.processes"

KEPT = 2
"""Checkpoints that stay on disk: the newest, and one to fall back on."""


DECIDING_OF_GPU = ("device", "precision", "kernels", "deterministic", "processes", "sync_batch_norm")
"""Settings of the GPU group that decide a result."""


def deciding_fields(config: Config) -> dict[str, Any]:
    """Return the settings that decide a run's result, by name on the command line."""
    gpu = asdict(config.gpu)
    named = {
        f"{group}.{key}": value
        for group, values in (("dataset", config.dataset), ("mode", config.mode))
        for key, value in asdict(values).items()
    }
    return {
        **{key: value for key, value in named.items() if key not in (*IGNORED, "dataset.reader")},
        **{f"gpu.{key}": gpu[key] for key in DECIDING_OF_GPU},
        "task.evaluate_every": config.task.evaluate_every,
        "depth": config.depth,
        "width": config.width,
        "seed": config.seed,
    }


class RunFolder:
    """The folder of one run, used by one process at a time (run.locked).

    Args:
        path: the folder, created if missing; half-written files of a killed process are removed.
        configuration: settings that decide the run's result, written into its checkpoints.
        keep_every: keep every checkpoint whose iteration is a multiple of this; None keeps only the last two.
        may_differ: settings in which a checkpoint that is read may differ.

    Raises:
        CannotWrite: the folder cannot be created.
    """

    def __init__(
        self,
        path: Path,
        configuration: dict[str, Any],
        *,
        keep_every: int | None = None,
        may_differ: Collection[str] = (),
    ) -> None:
        self.path = path
        self.configuration = configuration
        self.may_differ = may_differ
        self.keep_every = keep_every
        self.known_good: list[Path] = []
        """Undamaged checkpoints, written or read by this process, the newest last."""
        self.foreign: set[Path] = set()
        """What has the name of a checkpoint and is none: not ours to remove."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoint-*", "metrics.csv", *FILES):
                for half_written in path.glob(f"{name}.*.part"):
                    half_written.unlink()
        except OSError as error:
            raise CannotWrite(f"cannot write into {path}: {error.strerror}") from error

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, and remove others but for the last good one, multiples of keep_every and foreign files.

        Args:
            iteration: training steps done.
            state: tensors, numbers, strings, lists and dictionaries, as `torch.load(weights_only=True)` can read them.

        Returns:
            The file.

        Raises:
            CannotWrite: the write failed, for example on a full disk; earlier checkpoints are untouched.
        """
        # Serialised in memory: the name depends on the bytes, and a full disk raises a plain OSError.
        buffer = io.BytesIO()
        torch.save({**state, "configuration": self.configuration}, buffer)
        content = buffer.getbuffer()
        file = self.path / f"checkpoint-{iteration}-{torch_files.digits(content)}.pt"
        self._write(file, content)
        self.known_good = [*self.known_good, file][-KEPT:]
        for other in set(checkpoints(self.path)) - set(self.known_good) - self.foreign:
            if not (self.keep_every and iteration_of(other) % self.keep_every == 0):
                other.unlink(missing_ok=True)
        return file

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest good checkpoint; a damaged one is reported on stderr and skipped.

        Returns:
            The file and its state, tensors on the CPU; None without a good checkpoint.

        Raises:
            UserError: it belongs to another configuration, or cannot be read and may be good.
        """
        found = newest(self.path, foreign=self.foreign)
        if found is not None:
            file, state = found
            self._check_configuration(file, state["configuration"])
            self.known_good = [file]
        elif checkpoints(self.path):
            print(f"no good checkpoint in {self.path}: starting from the beginning", file=sys.stderr)
        return found

    def remove_checkpoints(self) -> None:
        """Remove every checkpoint, to start anew.

        Raises:
            CannotWrite: a checkpoint cannot be removed.
        """
        for file in checkpoints(self.path):
            try:
                file.unlink()
            except OSError as error:
                raise CannotWrite(f"cannot remove {file}: {error.strerror}") from error

    def write_metrics(self, header: Sequence[str], rows: Iterable[Sequence[float]]) -> None:
        """Write metrics.csv anew, with numbers as Python prints them: they read back to the same bits.

        Raises:
            CannotWrite: the write failed, for example on a full disk; the previous file is untouched.
        """
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        self._write(self.path / "metrics.csv", text.getvalue().encode())

    def _check_configuration(self, file: Path, there: dict[str, Any]) -> None:
        here = self.configuration
        there = {key: _default(key) for key in here} | there
        different = [key for key in {**here, **there} if here.get(key) != there.get(key) and key not in self.may_differ]
        if different:
            values = ", ".join(f"{key} is {there.get(key)} there and {here.get(key)} here" for key in different)
            advice = "give resume=false to start anew, or another folder by run="
            if different == [NUMBER_OF_PROCESSES]:
                advice += ", or gpu.from_other_processes=true to go on, with other bits"
            raise UserError(f"{file} belongs to another configuration: {values}; {advice}")

    def _write(self, file: Path, content: bytes | memoryview) -> None:
        try:
            write_whole(file, content)
        except OSError as error:
            kept = f"{self.known_good[-1].name} is kept" if self.known_good else "there is no checkpoint yet"
            raise CannotWrite(f"cannot write {file}: {error.strerror}; {kept}") from error


class NoFolder:
    """The folder of a run for a process that leaves its files to another one: nothing is read or written."""

    def __init__(self) -> None:
        self.known_good: list[Path] = []

    def save(self, iteration: int, state: dict[str, Any]) -> None:
        """Write nothing."""

    def newest(self) -> None:
        """Read nothing."""

    def write_metrics(self, header: Sequence[str], rows: Iterable[Sequence[float]]) -> None:
        """Write nothing."""


def _default(key: str) -> Any:
    """Return a setting's default in the schema, which a checkpoint from before the setting says by saying nothing."""
    group, _, name = key.partition(".")
    schema = {"dataset": DatasetConfig, "mode": ModeConfig, "gpu": GpuConfig}.get(group)
    return getattr(schema, name, None)


def newest(path: Path, *, foreign: set[Path] | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest good checkpoint in a folder, of any configuration; see RunFolder.newest.

    Args:
        path: the folder.
        foreign: what is skipped for another reason than damage is added here.
    """
    for file in reversed(checkpoints(path)):
        try:
            state = torch_files.unpickled(torch_files.content_of(file))
            if isinstance(state, dict) and isinstance(state.get("configuration"), dict):
                return file, state
            raise Unreadable("holds no configuration: no checkpoint of a run")
        except NotLoaded as error:  # going on from the one before would remove this one
            advice = "nothing was removed: try again, or move the file away to go on without it"
            raise UserError(f"{file} {error}; {advice}") from error
        except Unreadable as error:
            print(f"{file} {error}; using the one before", file=sys.stderr)
            if foreign is not None and not isinstance(error, Damaged):
                foreign.add(file)
    return None


def checkpoints(path: Path) -> list[Path]:
    """List a folder's checkpoints, damaged ones too, the oldest first."""
    return sorted(filter(iteration_of, path.iterdir()), key=lambda file: (iteration_of(file), file))


def iteration_of(file: Path) -> int:
    """Return the training steps behind a checkpoint, by its name; 0 for any other file."""
    match = re.fullmatch(r"checkpoint-(\d+)-[0-9a-f]{16}\.pt", file.name)
    return int(match[1]) if match else 0
