"""Evaluation: classify the test images, batch by batch.

    sums = [loss, samples classified wrongly], over the images in order, on the device

On a GPU the evaluation of a full batch is captured once as a CUDA graph and replayed, as training steps are (steps.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runners.config import DatasetConfig
from runners.data import Split, normalise
from runners.training import steps
from runners.training.steps import TrainingStep


class Evaluation:
    """Evaluate the network in training; captured as a CUDA graph if its training steps are.

    Args:
        step: the training steps of the network.
        split: the images, on the model's device.
        recipe: `eval_batch_size`, and `eval_statistics`: running averages or the statistics of each batch.
    """

    def __init__(self, step: TrainingStep, split: Split, recipe: DatasetConfig) -> None:
        self.step = step
        self.split = split
        self.recipe = recipe
        self.sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = False
        self.images = self.labels = self.sums  # the graph's inputs, once captured

    def __call__(self) -> tuple[float, float]:
        """Classify all images; the model is in training mode before and after.

        Returns:
            Mean loss, and error in percent.
        """
        model, size = self.step.model, self.recipe.eval_batch_size
        self.sums.zero_()
        model.eval()
        with torch.no_grad(), batch_statistics(model) if self.recipe.eval_statistics == "batch" else nullcontext():
            for batch in zip(self.split.images.split(size), self.split.labels.split(size), strict=True):
                self._add(*batch)
        model.train()
        loss, error = (self.sums / len(self.split.labels)).tolist()
        return loss, 100 * error

    def _add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums."""
        if not self.step.captures:
            self._classify(images, labels)
        elif not self.has_run or len(labels) < self.recipe.eval_batch_size:
            # Not replayed: the first batch, where kernels compile and cuDNN picks algorithms, and a last, smaller one.
            steps.run_on_stream(lambda: self._classify(images, labels), self.step.stream)
            self.has_run = True
        else:
            if self.graph is None:
                self.images, self.labels = images.clone(), labels.clone()
                self.graph, _ = steps.capture(
                    lambda: self._classify(self.images, self.labels), self.step.stream, self.step.pool
                )
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()

    def _classify(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = steps.forward(self.step.model, normalise(images), self.step.gpu)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        self.sums += torch.stack([loss_sum, (logits.argmax(dim=1) != labels).sum()])
        return self.sums


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every batch norm normalise by the batch's own statistics in evaluation, as the authors' code does.

    A batch norm without running averages does so and updates nothing. So the averages are removed, and restored after.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    averages = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, averages, strict=True):
            norm.running_mean, norm.running_var = mean, var
