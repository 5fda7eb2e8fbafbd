"""Training: the paper's recipe (Chakrabarti and Moseley 2019, section 4), in a loop that can be killed at any moment.

No random state outlives a step (see runners/data), so the state of a run is

    iteration, weights, momentum, and the sums of the metrics since the last evaluation

A run resumed from these ends with the same bits as one never stopped. The caller draws the initial weights.

The host waits for the device only to read losses: about once per second, at an evaluation and at a checkpoint.

Several processes may train one network (world.py). Each draws whole batches alike and takes its rows, so which images
make an iteration does not depend on their number. What hangs on a clock is decided by the first process, and a signal
to any of them stops all: they agree about once per second. So all take the same steps.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from runners import records
from runners.config import Config, DatasetConfig
from runners.data import ImageData
from runners.errors import Deferred, Interrupted, OutOfTime
from runners.training import checkpoints, signals, turns, world
from runners.training.averages import RunningAverages
from runners.training.checkpoints import NoFolder, RunFolder, deciding_fields
from runners.training.evaluation import Evaluation
from runners.training.reduction import reducer_of
from runners.training.state import State
from runners.training.steps import TrainingStep, configure_torch, make_optimiser
from runners.training.stopping import Stopping
from runners.training.turns import Turns

METRICS = ("iteration", "learning_rate", "train_loss", "train_error_percent", "test_loss", "test_error_percent")
"""Columns of metrics.csv; training loss and error are means since the previous row."""
TOP5 = "test_top5_error_percent"
"""The last column, for data sets with `top5`."""

READ_EVERY_ITERATIONS = 50
READ_EVERY_SECONDS = 1.0
"""Read losses from the device at least every N steps or seconds."""


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run; training loss and error are means since the evaluation before the last."""

    test_error_percent: float
    test_top5_error_percent: float | None
    """None for a data set without `top5`."""
    test_loss: float
    train_loss: float
    train_error_percent: float
    iterations: int
    seconds: float
    """Wall time of the training steps, over all processes of a resumed run, without evaluations and checkpoints. Turns
    of other runs in between count."""
    samples_per_second: float
    """Training samples per second of that time."""
    parts: list[dict[str, Any]]
    """As in Progress."""


def train(model: nn.Module, data: ImageData, config: Config, *, device: torch.device, run_dir: Path) -> Outcome:
    """Train a network, from the last good checkpoint in its folder if there is one.

    Args:
        model: freshly initialised; maps float32 images [N, C, H, W], channels last, to logits [N, classes].
        data: for `device`, with at least one batch of training images.
        config: its `gpu` names the device and backend actually used, since they decide the result.
        device: where to train; the model is moved there.
        run_dir: the run's own folder, for checkpoints and metrics.csv.

    Returns:
        The result of the last evaluation; at once if the run is already finished.

    Raises:
        UserError: a checkpoint belongs to another configuration.
        Interrupted: a signal arrived (runners/training/signals.py); the current step was finished and a checkpoint
            written. A second signal acts at once, as outside of training.
        OutOfTime: `budget_minutes` are nearly over; a checkpoint was written.
        Diverged: a loss or a weight is not finite; no checkpoint holds it.
        CannotWrite: a write failed, for example on a full disk; earlier checkpoints are untouched.
    """
    with signals.deferred() as stop:
        stopping = Stopping(stop, config.budget_minutes if world.current().is_first else None)
        outcome = turns.alone(in_turns(model, data, config, device=device, run_dir=run_dir, stopping=stopping))
    if stop.received is not None:  # at the very end
        raise Interrupted(f"stopped by {stop.received.name} after the last step", stop.received)
    return outcome


def in_turns(
    model: nn.Module, data: ImageData, config: Config, *, device: torch.device, run_dir: Path, stopping: Stopping
) -> Turns[Outcome]:
    """Train as `train` does, but yield to other runs after each step; the caller handles signals.

    On CUDA a run launches on the current stream, which must be its own and the same at each turn. The runs must agree
    on what configure_torch sets for the process, and share `stopping`; the other arguments are those of `train`.

    Yields:
        After each step is launched; the device may not have finished it.

    Raises:
        Deferred: another run failed; a checkpoint was written. Other exceptions are those of `train`.
    """
    recipe = config.dataset
    configure_torch(config.gpu)
    model.to(device).train()
    optimiser = make_optimiser(model, recipe)
    task, here = config.task, world.current()
    averages = RunningAverages(model, here)
    listings = {"training images": data.train.listing, "test images": data.test.listing}
    deciding = deciding_fields(config) | {name: listing for name, listing in listings.items() if listing is not None}
    here.check_same(deciding)
    may_differ = [checkpoints.NUMBER_OF_PROCESSES] if config.gpu.from_other_processes else []
    with here.together():
        folder: RunFolder | NoFolder = NoFolder()
        if here.is_first:
            folder = RunFolder(run_dir, deciding, keep_every=task.keep_every, may_differ=may_differ)
            if not (config.resume or here.has_noted("begun anew")):
                folder.remove_checkpoints()
                here.note("begun anew")
    state = State(folder, model, optimiser, averages)
    state.resume(recipe.iterations)
    progress = state.progress
    if not progress.iteration and here.is_first:
        records.forget_failure(run_dir)
    if progress.iteration < recipe.iterations:
        state.append_provenance(device)
    columns = (*METRICS, TOP5) if recipe.top5 else METRICS
    folder.write_metrics(columns, progress.rows)

    def make_batch(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return data.train.batch(inputs, recipe)

    step = TrainingStep(
        model,
        optimiser,
        make_batch,
        gpu=config.gpu,
        device=device,
        sub_batches=recipe.sub_batches,
        label_smoothing=recipe.label_smoothing,
        reducer=reducer_of(model),
    )
    evaluate = Evaluation(step, data.test, recipe, averages)
    unread: list[Tensor] = []
    stops = False
    meeting, step_seconds = progress.iteration + 1, READ_EVERY_SECONDS
    rows = slice(here.rank, None, here.size)
    drawn = data.train.inputs(recipe, seed=config.seed, start=progress.iteration + 1, rows=rows)
    clock, waited = time.perf_counter(), data.train.seconds_waited or 0.0
    with stopping.of(run_dir), _progress_bar(config, progress.iteration) as bar, closing(drawn):
        for iteration, inputs in drawn:
            rate = learning_rate(recipe, iteration)
            unread.append(step(inputs, rate=rate))
            yield

            is_last = iteration == recipe.iterations
            evaluates = is_last or iteration % task.evaluate_every == 0
            is_permanent = task.keep_every is not None and iteration % task.keep_every == 0
            saves = is_last or iteration % task.checkpoint_every == 0 or is_permanent
            is_due = iteration == meeting
            if here.is_alone:
                is_due = len(unread) == READ_EVERY_ITERATIONS or time.perf_counter() - clock > READ_EVERY_SECONDS
            pauses = evaluates or saves or is_due
            if here.is_alone or pauses:
                is_over, steps = stopping.agree(here, steps_to_meeting(step_seconds))
                stops, meeting = is_over and not is_last, iteration + steps
            if not (pauses or stops):
                continue

            paused = time.perf_counter()
            state.read(unread)
            elapsed = time.perf_counter() - clock
            progress.seconds += elapsed
            train_loss = progress.loss_sum / progress.steps
            train_error_percent = 100 * progress.wrong_sum / (progress.steps * recipe.batch_size)
            step_seconds = elapsed / len(unread)
            speed = recipe.batch_size / step_seconds
            figures = f"loss {train_loss:.3f}, error {train_error_percent:.2f} %, {speed:.0f} samples/s"
            if data.train.seconds_waited is not None:
                share = (data.train.seconds_waited - waited) / elapsed
                figures += f", {100 * share:.0f} % of the time waiting for images"
            bar.set_postfix_str(figures, refresh=False)
            bar.update(len(unread))
            unread.clear()

            if evaluates:
                found = evaluate(is_final=is_last)
                tested = [value for value in found if value is not None]
                progress.rows.append([iteration, rate, train_loss, train_error_percent, *tested])
                progress.loss_sum, progress.wrong_sum, progress.steps = 0.0, 0.0, 0
                folder.write_metrics(columns, progress.rows)
            if saves or stops:
                state.save()
                if stops:
                    break
            clock, waited = time.perf_counter(), data.train.seconds_waited or 0.0
            stopping.seconds[run_dir] = max(stopping.seconds[run_dir], step_seconds + clock - paused)
    received = stopping.signal.received
    if stops or received is not None:  # checked after the loop: a signal after the last step counts too
        where = f"at iteration {progress.iteration} of {recipe.iterations}"
        goes_on = f"started again, the run goes on from {(folder.known_good or [run_dir])[-1]}"
        if received is not None:
            raise Interrupted(f"stopped by {received.name} {where}; {goes_on}", received)
        if stopping.is_out_of_time:
            raise OutOfTime(f"budget_minutes={config.budget_minutes:g} are over {where}; {goes_on}")
        raise Deferred(f"stops {where} because another run in this process failed; it goes on in a new one")

    _, _, train_loss, train_error_percent, test_loss, test_error_percent, *top5 = progress.rows[-1]
    return Outcome(
        test_error_percent=test_error_percent,
        test_top5_error_percent=top5[0] if top5 else None,
        test_loss=test_loss,
        train_loss=train_loss,
        train_error_percent=train_error_percent,
        iterations=progress.iteration,
        seconds=progress.seconds,
        samples_per_second=progress.iteration * recipe.batch_size / progress.seconds,
        parts=progress.parts,
    )


def learning_rate(recipe: DatasetConfig, iteration: int) -> float:
    """Return the learning rate of a training step; the first iteration is 1.

    Raises:
        ValueError: the schedule ends before that iteration.
    """
    for end, rate in recipe.schedule:
        if iteration <= round(end * recipe.iterations):
            return rate
    raise ValueError(f"dataset.schedule={recipe.schedule}: ends before iteration {iteration} of {recipe.iterations}")


def steps_to_meeting(step_seconds: float) -> int:
    """Return after how many steps the processes agree again: in about a second."""
    is_slow = step_seconds * READ_EVERY_ITERATIONS > READ_EVERY_SECONDS
    return max(1, int(READ_EVERY_SECONDS / step_seconds)) if is_slow else READ_EVERY_ITERATIONS


def _progress_bar(config: Config, done: int) -> "tqdm[Any]":
    """Make a progress bar on stderr; in a log file, where each update is a new line, it updates twice per minute."""
    iterations = config.dataset.iterations
    is_terminal = sys.stderr.isatty()
    place: dict[str, Any] = {} if is_terminal else {"position": 0}
    return tqdm(
        desc=f"{config.dataset.name} {config.mode.name} seed {config.seed}",
        initial=done,
        total=iterations,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        mininterval=0.5 if is_terminal else 30,
        miniters=1,
        dynamic_ncols=True,
        disable=done == iterations,
        **place,
    )
