"""The state of a training run: what a checkpoint holds, and how it is read and written.

    iteration, weights, momentum, and the sums of the metrics since the last evaluation

Where several processes train, all have the same weights and momentum, and each its own running averages. The first
process reads and writes the files; a checkpoint holds everybody's averages, and their mean in the network.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runners import provenance
from runners.errors import Diverged, Stopped
from runners.training.averages import RunningAverages
from runners.training.checkpoints import NoFolder, RunFolder


@dataclass
class Progress:
    """State of a run besides weights and momentum."""

    iteration: int = 0
    """Training steps done whose losses have been read."""
    loss_sum: float = 0.0
    """Sum of the steps' mean losses since the last evaluation."""
    wrong_sum: float = 0.0
    """Training samples classified wrongly since the last evaluation."""
    steps: int = 0
    """Training steps since the last evaluation."""
    seconds: float = 0.0
    """As in Outcome."""
    rows: list[list[float]] = field(default_factory=list)
    """The rows of metrics.csv."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Provenance of each process that trained this run, without the date."""


class State:
    """The state of a run in this process.

    Args:
        folder: of its checkpoints.
        model: on its device.
        optimiser: of its parameters.
        averages: of its batch norms.
    """

    def __init__(
        self,
        folder: RunFolder | NoFolder,
        model: nn.Module,
        optimiser: torch.optim.SGD,
        averages: RunningAverages,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimiser = optimiser
        self.averages = averages
        self.world = averages.world
        self.progress = Progress()

    @property
    def last_checkpoint(self) -> str:
        """Say which is the last checkpoint."""
        known = self.folder.known_good
        return f"the last checkpoint is {known[-1]}" if known else "there is no checkpoint yet"

    def resume(self, iterations: int) -> None:
        """Load the last good checkpoint, if any.

        Args:
            iterations: of the whole run.

        Raises:
            UserError: as RunFolder.newest, in all processes.
        """
        with self.world.together():
            found = self.folder.newest()
        found = self.world.broadcast(found)
        if found is None:
            return
        file, state = found
        self.model.load_state_dict(state["model"])
        if "averages" in state:
            self.averages.load(state["averages"])
        # Learning rate and weight decay come from the configuration, with which the checkpoint agrees.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict(state["optimiser"] | {"param_groups": groups})
        self.progress = Progress(**state["progress"])
        verb = "finished before, as in" if self.progress.iteration == iterations else "going on from"
        print(f"{verb} {file}", file=sys.stderr)

    def append_provenance(self, device: torch.device) -> None:
        """Append the machines and versions of these processes if they differ from the last ones."""
        part = {name: value for name, value in provenance.provenance(device).items() if name != "date"}
        parts: list[dict[str, Any]] = []
        for other in self.world.all_values(part):
            if other not in parts:
                parts.append(other)
        if self.progress.parts[-len(parts) :] != parts:
            self.progress.parts += parts

    def read(self, unread: list[Tensor]) -> None:
        """Wait for the device and add the results of steps one by one: the sums do not depend on when they are read.

        Args:
            unread: mean loss and number of samples classified wrongly of each step, in this process.

        Raises:
            Diverged: a loss is not finite, in all processes.
        """
        of_all = self.world.gather(torch.stack(unread).cpu().double())
        for step in torch.stack(of_all, dim=1).tolist():
            losses, wrong = zip(*step, strict=True)
            loss = sum(losses) / self.world.size
            self.progress.iteration += 1
            self.progress.steps += 1
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at iteration {self.progress.iteration}; {self.last_checkpoint}")
            self.progress.loss_sum += loss
            self.progress.wrong_sum += sum(wrong)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            Diverged: a weight is not finite, in all processes.
            CannotWrite: as RunFolder.save; in the other processes LostProcess.
            Stopped: the processes have different weights.
        """
        after = f"after iteration {self.progress.iteration}"
        with self.averages.means():
            weights = self.model.state_dict()
        momentum = self.optimiser.state_dict()
        if not self.world.is_alone and len(set(self.world.all_values(sum_of_bits(self.model)))) > 1:
            raise Stopped(f"the processes have different weights {after}; {self.last_checkpoint}")
        values = [*weights.values(), *(value for state in momentum["state"].values() for value in state.values())]
        if not torch.stack([value.isfinite().all() for value in values if isinstance(value, Tensor)]).all():
            raise Diverged(f"a weight is not finite {after}; {self.last_checkpoint}")
        state: dict[str, Any] = {"progress": asdict(self.progress), "model": weights, "optimiser": momentum}
        if not self.world.is_alone:
            state["averages"] = self.averages.of_all()
        with self.world.together():
            self.folder.save(self.progress.iteration, state)


def sum_of_bits(model: nn.Module) -> int:
    """Add up the bits of all weights, as whole numbers: equal weights have equal sums."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.detach().view(whole[weight.itemsize]).sum() for weight in model.parameters()]
    return int(torch.stack(sums).sum())
