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
from runners.data import Images
from runners.training import steps
from runners.training.steps import TrainingStep


class Evaluation:
    """Evaluate the network in training; captured as a CUDA graph if its training steps are.

    Args:
        step: the training steps of the network.
        images: the test set, for the model's device.
        recipe: `eval_batch_size`, and `eval_statistics`: running averages or the statistics of each batch.
    """

    def __init__(self, step: TrainingStep, images: Images, recipe: DatasetConfig) -> None:
        self.step = step
        self.images = images
        self.recipe = recipe
        self.sums = torch.zeros(2, dtype=torch.float64, device=step.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = False
        self.inputs: steps.Inputs = ()  # the graph's, once captured

    def __call__(self, *, is_final: bool = False) -> tuple[float, float]:
        """Classify the test images; the model is in training mode before and after.

        Args:
            is_final: as Images.batches takes it.

        Returns:
            Mean loss, and error in percent.
        """
        model = self.step.model
        self.sums.zero_()
        count = 0
        model.eval()
        with torch.no_grad(), batch_statistics(model) if self.recipe.eval_statistics == "batch" else nullcontext():
            for inputs in self.images.batches(self.recipe, is_final=is_final):
                self._add(inputs)
                count += len(inputs[0])
        model.train()
        loss, error = (self.sums / count).tolist()
        return loss, 100 * error

    def _add(self, inputs: steps.Inputs) -> None:
        """Add a batch to the sums."""
        is_whole = len(inputs[0]) == self.recipe.eval_batch_size
        has_other_shapes = self.graph is not None and [x.shape for x in inputs] != [x.shape for x in self.inputs]
        if not self.step.captures:
            self._classify(steps.to_device(inputs, self.step.device))
        elif not self.has_run or not is_whole or has_other_shapes:
            # Not replayed: the first batch, where kernels compile and cuDNN picks algorithms, a last, smaller one, and
            # the batches of a last evaluation with more crops.
            steps.run_on_stream(lambda: self._classify(steps.to_device(inputs, self.step.device)), self.step.stream)
            self.has_run = True
        else:
            if self.graph is None:
                self.inputs = tuple(x.to(self.step.device, copy=True) for x in inputs)
                self.graph, _ = steps.capture(lambda: self._classify(self.inputs), self.step.stream, self.step.pool)
            for to, x in zip(self.inputs, inputs, strict=True):
                to.copy_(x, non_blocking=True)
            self.graph.replay()

    def _classify(self, inputs: steps.Inputs) -> Tensor:
        views, labels = self.images.views(inputs, self.recipe)
        logits = steps.forward(self.step.model, views[0], self.step.gpu)
        for view in views[1:]:
            logits += steps.forward(self.step.model, view, self.step.gpu)
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
