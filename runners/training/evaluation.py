"""Evaluation: classify the test images, batch by batch.

    sums of a batch = [loss, samples classified wrongly], on the device; then added up in the order of the batches

A data set with `top5` also counts the samples whose class is not among the five with the largest logits. Where each
image has several views, the mean of their logits counts.

Of N processes that train together the one of rank r takes the batches r::N, whole. So each batch is what it is for one
process, and the result has the same bits, also where batches are normalised by their own statistics. Running averages
are the mean of those of all processes (averages.py).

On a GPU the evaluation of a full batch is captured once as a CUDA graph and replayed, as training steps are (steps.py).
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from runners.config import DatasetConfig
from runners.data import Images
from runners.training import steps
from runners.training.averages import BATCH_NORMS, RunningAverages
from runners.training.steps import TrainingStep
from runners.training.world import World


class Evaluated(NamedTuple):
    """Result of an evaluation."""

    loss: float
    """Mean loss."""
    error_percent: float
    top5_error_percent: float | None
    """None for a data set without `top5`."""


class Evaluation:
    """Evaluate the network in training; captured as a CUDA graph if its training steps are.

    Args:
        step: the training steps of the network.
        images: the test set, for the model's device.
        recipe: `eval_batch_size`; `eval_statistics`, running averages or the statistics of each batch; `top5`.
        averages: of the network; None where no other process trains it.
    """

    def __init__(
        self, step: TrainingStep, images: Images, recipe: DatasetConfig, averages: RunningAverages | None = None
    ) -> None:
        self.step = step
        self.images = images
        self.recipe = recipe
        self.averages = averages or RunningAverages(step.model, World())
        self.world = self.averages.world
        self.sums = step.rate  # the graph's output, once captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = False
        self.inputs: steps.Inputs = ()  # the graph's, once captured

    def __call__(self, *, is_final: bool = False) -> Evaluated:
        """Classify the test images; the model is in training mode before and after.

        Args:
            is_final: as Images.batches takes it.
        """
        model = self.step.model
        sums: list[Tensor] = []
        counts: list[int] = []
        which = slice(self.world.rank, None, self.world.size)
        model.eval()
        with (
            torch.no_grad(),
            batch_statistics(model) if self.recipe.eval_statistics == "batch" else self.averages.means(),
            self._progress_bar(is_final) or nullcontext() as bar,
        ):
            for inputs in self.images.batches(self.recipe, is_final=is_final, which=which):
                sums.append(self._sums(inputs))
                counts.append(len(inputs[0]))
                if bar is not None:
                    bar.update(len(inputs[0]) * self.world.size)
        model.train()
        return self._evaluated(sums, counts)

    def _evaluated(self, sums: list[Tensor], counts: list[int]) -> Evaluated:
        """Add up the sums of the batches of all processes, in their order."""
        columns = 3 if self.recipe.top5 else 2
        found = torch.stack(sums).cpu() if sums else torch.zeros(0, columns, dtype=torch.float64)
        rows = torch.cat([found, torch.tensor(counts, dtype=torch.float64)[:, None]], dim=1)
        total = torch.zeros(columns + 1, dtype=torch.float64)
        for batches in itertools.zip_longest(*self.world.gather_uneven(rows)):
            for row in batches:
                total += 0 if row is None else row
        loss, *errors = (total[:-1] / total[-1]).tolist()
        percent = [100 * error for error in errors]
        return Evaluated(loss, percent[0], percent[1] if self.recipe.top5 else None)

    def _progress_bar(self, is_final: bool) -> "tqdm[Any] | None":
        """Make a progress bar for images in files, which take long."""
        if self.images.seconds_waited is None:
            return None
        checked = None if is_final else self.recipe.check_images
        total = len(self.images) if checked is None else min(checked, len(self.images))
        seconds = 0.1 if sys.stderr.isatty() else 30  # in a log file each update is a new line
        return tqdm(desc="test images", total=total, leave=False, delay=2, mininterval=seconds, dynamic_ncols=True)

    def _sums(self, inputs: steps.Inputs) -> Tensor:
        """Return the sums of a batch."""
        is_whole = len(inputs[0]) == self.recipe.eval_batch_size
        has_other_shapes = self.graph is not None and [x.shape for x in inputs] != [x.shape for x in self.inputs]
        if not self.step.captures:
            return self._classify(steps.to_device(inputs, self.step.device))
        if not self.has_run or not is_whole or has_other_shapes:
            # Not replayed: the first batch, where kernels compile and cuDNN picks algorithms, a last, smaller one, and
            # the batches of a last evaluation with more crops.
            self.has_run = True
            return steps.run_on_stream(
                lambda: self._classify(steps.to_device(inputs, self.step.device)), self.step.stream
            )
        if self.graph is None:
            self.inputs = tuple(x.to(self.step.device, copy=True) for x in inputs)
            self.graph, self.sums = steps.capture(lambda: self._classify(self.inputs), self.step.stream, self.step.pool)
        for to, x in zip(self.inputs, inputs, strict=True):
            to.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.sums.clone()  # the next replay writes over it

    def _classify(self, inputs: steps.Inputs) -> Tensor:
        views, labels = self.images.views(inputs, self.recipe)
        logits = steps.forward(self.step.model, views[0], self.step.gpu)
        for view in views[1:]:
            logits += steps.forward(self.step.model, view, self.step.gpu)
        if len(views) > 1:
            logits /= len(views)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        found = [loss_sum, (logits.argmax(dim=1) != labels).sum()]
        if self.recipe.top5:
            found.append((logits.topk(5).indices != labels[:, None]).all(dim=1).sum())
        return torch.stack(found).double()


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every batch norm normalise by the batch's own statistics in evaluation, as the authors' code does.

    A batch norm without running averages does so and updates nothing. So the averages are removed, and restored after.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    averages = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, averages, strict=True):
            norm.running_mean, norm.running_var = mean, var
