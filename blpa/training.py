"""Training: METHOD.md section 5's recipe, in a loop that can be killed at any moment.

Nothing random outlives a step (see blpa/data), so that what a run does next follows from

    iteration, weights, momentum, and the sums of the metrics since the last evaluation

and a run that resumes from those ends with the same bits as one never stopped. (The initial weights are the caller's.)

The host waits for the device only to read the losses: about once a second, at an evaluation and at a checkpoint.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from blpa import budget, records, signals
from blpa.checkpoints import RunFolder, deciding_fields
from blpa.config import Config, DatasetConfig
from blpa.data import ImageData, Split, normalise
from blpa.errors import Diverged, Interrupted, OutOfTime
from blpa.steps import TrainingStep, configure_torch, forward, make_optimiser

METRICS = ("iteration", "learning_rate", "train_loss", "train_error_percent", "test_loss", "test_error_percent")
"""Columns of metrics.csv; the training figures are means since the row before."""

READ_EVERY_ITERATIONS = 50
READ_EVERY_SECONDS = 1.0
"""Losses wait on the device until there are so many, or for so long."""
STOPPING_SECONDS = 5.0
"""Kept of the budget for one more step, an evaluation and a checkpoint, or as long as those have taken at most."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; the training figures are means since the evaluation before the last."""

    test_error_percent: float
    test_loss: float
    train_loss: float
    train_error_percent: float
    iterations: int
    seconds: float
    """Wall time of the training steps, over all parts of a resumed run; evaluations and checkpoints left out."""
    samples_per_second: float
    """Training samples in each of those seconds."""
    parts: list[dict[str, Any]]
    """As in Progress."""


@dataclass
class Progress:
    """How far a run has come: besides weights and momentum, all it needs to go on."""

    iteration: int = 0
    """Training steps done, and their losses read."""
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
    """What the processes that were at this run computed on, and with, but for dates (records.provenance)."""


def train(model: nn.Module, data: ImageData, config: Config, *, device: torch.device, run_dir: Path) -> Outcome:
    """Train a network, or go on with it from the last good checkpoint in its folder.

    Args:
        model: freshly initialised: float32 images [N, C, H, W], channels last, to logits [N, classes].
        data: on `device`; at least a batch of training images.
        config: with the device and the back end that are really used in `gpu`, since they decide the result.
        device: where to train; the model is moved there.
        run_dir: the run's own folder, for its checkpoints and metrics.csv.

    Returns:
        The figures of the last evaluation; at once where the run is already finished.

    Raises:
        UserError: a checkpoint belongs to another configuration.
        Interrupted: SIGINT or SIGTERM; the step under way was finished and a checkpoint written (of a finished run,
            there is one). A second signal does, at once, what it would do outside of training.
        OutOfTime: `budget_minutes` are nearly over; as after a signal.
        Diverged: a loss or a weight that is not finite; no checkpoint holds it.
        CannotWrite: a full disk, or the like; the checkpoints written before are untouched.
    """
    recipe = config.dataset
    configure_torch(config.gpu)
    model.to(device).train()
    optimiser = make_optimiser(model, recipe)
    task = config.task
    folder = RunFolder(run_dir, deciding_fields(config), keep_every=task.keep_every)
    if not config.resume:
        folder.remove_checkpoints()
    progress = _resume(folder, model, optimiser, recipe.iterations)
    if not progress.iteration:
        records.forget_failure(run_dir)
    if progress.iteration < recipe.iterations:
        _note_part(progress, device)
    folder.write_metrics(METRICS, progress.rows)

    def make_batch(draws: Tensor) -> tuple[Tensor, Tensor]:
        return data.train.batch(draws, recipe)

    step = TrainingStep(model, optimiser, make_batch, gpu=config.gpu, device=device)
    unread: list[Tensor] = []
    stopping_seconds, is_out_of_time = STOPPING_SECONDS, False
    clock = time.perf_counter()
    with signals.noted() as stop, _progress_bar(config, progress.iteration) as bar:
        for iteration, draws in data.train.draws(recipe, seed=config.seed, start=progress.iteration + 1):
            rate = learning_rate(recipe, iteration)
            unread.append(step(draws, rate=rate))

            is_last = iteration == recipe.iterations
            is_out_of_time = not is_last and budget.seconds_left(config.budget_minutes) < stopping_seconds
            stops = stop.received is not None or is_out_of_time
            evaluates = is_last or iteration % task.evaluate_every == 0
            is_kept = task.keep_every is not None and iteration % task.keep_every == 0
            saves = is_last or iteration % task.checkpoint_every == 0 or is_kept or stops
            is_due = len(unread) == READ_EVERY_ITERATIONS or time.perf_counter() - clock > READ_EVERY_SECONDS
            if not (evaluates or saves or is_due):
                continue

            paused = time.perf_counter()
            _read(unread, progress, folder)
            elapsed = time.perf_counter() - clock
            progress.seconds += elapsed
            train_loss = progress.loss_sum / progress.steps
            train_error_percent = 100 * progress.wrong_sum / (progress.steps * recipe.batch_size)
            step_seconds = elapsed / len(unread)
            speed = recipe.batch_size / step_seconds
            figures = f"loss {train_loss:.3f}, error {train_error_percent:.2f} %, {speed:.0f} samples/s"
            bar.set_postfix_str(figures, refresh=False)
            bar.update(len(unread))
            unread.clear()

            if evaluates:
                test_loss, test_error_percent = evaluate(model, data.test, config)
                progress.rows.append([iteration, rate, train_loss, train_error_percent, test_loss, test_error_percent])
                progress.loss_sum, progress.wrong_sum, progress.steps = 0.0, 0.0, 0
                folder.write_metrics(METRICS, progress.rows)
            if saves:
                _save(folder, model, optimiser, progress)
                if stops:
                    break
            clock = time.perf_counter()
            stopping_seconds = max(stopping_seconds, step_seconds + clock - paused)
    if stop.received is not None or is_out_of_time:  # here, for a signal after the last step counts too
        where = f"at iteration {progress.iteration} of {recipe.iterations}"
        goes_on = f"started again, the run goes on from {folder.known_good[-1]}"
        if stop.received is None:
            raise OutOfTime(f"budget_minutes={config.budget_minutes:g} are over {where}; {goes_on}")
        raise Interrupted(f"stopped by {stop.received.name} {where}; {goes_on}", stop.received)

    _, _, train_loss, train_error_percent, test_loss, test_error_percent = progress.rows[-1]
    return Outcome(
        test_error_percent=test_error_percent,
        test_loss=test_loss,
        train_loss=train_loss,
        train_error_percent=train_error_percent,
        iterations=progress.iteration,
        seconds=progress.seconds,
        samples_per_second=progress.iteration * recipe.batch_size / progress.seconds,
        parts=progress.parts,
    )


def learning_rate(recipe: DatasetConfig, iteration: int) -> float:
    """Look up the rate of a training step, the first being iteration 1.

    Raises:
        ValueError: the schedule ends before.
    """
    for end, rate in recipe.schedule:
        if iteration <= round(end * recipe.iterations):
            return rate
    raise ValueError(f"dataset.schedule={recipe.schedule}: ends before iteration {iteration} of {recipe.iterations}")


def evaluate(model: nn.Module, split: Split, config: Config) -> tuple[float, float]:
    """Classify a set of images.

    Args:
        model: left in training mode.
        split: the images, on the model's device.
        config: `dataset.eval_batch_size`; `dataset.eval_statistics`, running averages or those of each batch.

    Returns:
        Mean loss, and error in percent.
    """
    recipe = config.dataset
    sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    model.eval()
    with torch.no_grad(), batch_statistics(model) if recipe.eval_statistics == "batch" else nullcontext():
        for start in range(0, len(split.labels), recipe.eval_batch_size):
            labels = split.labels[start : start + recipe.eval_batch_size]
            images = normalise(split.images[start : start + recipe.eval_batch_size])
            logits = forward(model, images, config.gpu)
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss_sum, (logits.argmax(dim=1) != labels).sum()])
    model.train()
    loss, error = (sums / len(split.labels)).tolist()
    return loss, 100 * error


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every batch norm normalise by the batch's own statistics in evaluation, as the authors' code does.

    A batch norm without running averages does just that, and updates nothing: they are taken away, and given back.
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


def _read(unread: list[Tensor], progress: Progress, folder: RunFolder) -> None:
    """Wait for the device, and add its steps to the sums one by one, so that the sums do not show when it was."""
    for loss, wrong in torch.stack(unread).tolist():
        progress.iteration += 1
        progress.steps += 1
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {progress.iteration}; {_last_good(folder)}")
        progress.loss_sum += loss
        progress.wrong_sum += wrong


def _save(folder: RunFolder, model: nn.Module, optimiser: torch.optim.SGD, progress: Progress) -> None:
    weights, momentum = model.state_dict(), optimiser.state_dict()
    values = [*weights.values(), *(value for state in momentum["state"].values() for value in state.values())]
    if not torch.stack([value.isfinite().all() for value in values if isinstance(value, Tensor)]).all():
        raise Diverged(f"a weight is not finite after iteration {progress.iteration}; {_last_good(folder)}")
    folder.save(progress.iteration, {"progress": asdict(progress), "model": weights, "optimiser": momentum})


def _resume(folder: RunFolder, model: nn.Module, optimiser: torch.optim.SGD, iterations: int) -> Progress:
    """Put weights and momentum where the last good checkpoint left them."""
    found = folder.newest()
    if found is None:
        return Progress()
    file, state = found
    model.load_state_dict(state["model"])
    # Rates and the like are the configuration's, with which the checkpoint agrees.
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict(state["optimiser"] | {"param_groups": groups})
    progress = Progress(**state["progress"])
    verb = "finished before, as in" if progress.iteration == iterations else "going on from"
    print(f"{verb} {file}", file=sys.stderr)
    return progress


def _note_part(progress: Progress, device: torch.device) -> None:
    """Note on what the run goes on, unless it is what it was before."""
    part = {name: value for name, value in records.provenance(device).items() if name != "date"}
    if progress.parts[-1:] != [part]:
        progress.parts.append(part)


def _last_good(folder: RunFolder) -> str:
    return f"the last checkpoint is {folder.known_good[-1]}" if folder.known_good else "there is no checkpoint yet"


def _progress_bar(config: Config, done: int) -> "tqdm[Any]":
    """A bar on stderr; in a log file, where each drawing is a new line, a drawing every half minute."""
    iterations = config.dataset.iterations
    return tqdm(
        desc=f"{config.dataset.name} {config.mode.name} seed {config.seed}",
        initial=done,
        total=iterations,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        miniters=1,
        dynamic_ncols=True,
        disable=done == iterations,
    )
