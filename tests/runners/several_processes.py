"""What test_several_processes.py runs in each of four processes."""

import math
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support import CPU, TinyNet, assert_same_end, last_checkpoint, tiny_config, tiny_data
from torch import Tensor, nn
from torch import distributed as dist

from blpa import Codec, CodedLayers, PreActResNet
from blpa.kernels.reference import REFERENCE
from runners.config import Config
from runners.data import ImageData
from runners.errors import Diverged, Interrupted, Stopped, UserError
from runners.training import loop, signals, steps, world
from runners.training.averages import RunningAverages
from runners.training.evaluation import Evaluated, Evaluation
from runners.training.reduction import GradientReducer
from runners.training.steps import TrainingStep


class Here:
    """This process."""

    folder: Path
    rank: int


@contextmanager
def group(size: int) -> Iterator[None]:
    """The first `size` processes form a group; the others pass on to the next."""
    dist.init_process_group(
        "gloo", init_method=f"file://{Here.folder}/store{size}", rank=Here.rank, world_size=size,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


RECIPES: list[dict[str, Any]] = [
    {"eval_batch_size": 3}, {"eval_batch_size": 3, "eval_statistics": "batch"}, {"eval_batch_size": 20}
]  # fmt: skip
"""Evaluations: of seven batches, of one."""


def coded() -> PreActResNet:
    """Depth 11 in 4 bits, whose statistics and codes are of a process's own samples."""
    torch.manual_seed(0)
    layers = CodedLayers(codec=Codec(4), kernels=REFERENCE, eps=1e-3)
    network = PreActResNet(11, layers=layers, classes=10, image_channels=1, width=0.25)
    return network.to(memory_format=torch.channels_last)


def config(**recipe: Any) -> Config:
    """Six steps of 12 images, evaluated after 2, 4 and 6, saved after 3 and 6."""
    found = tiny_config(**{"iterations": 6, "batch_size": 12, **recipe})
    found.task = replace(found.task, evaluate_every=2, checkpoint_every=3)
    return found


def train(name: str, model: nn.Module, given: Config | None = None, data: ImageData | None = None) -> loop.Outcome:
    return loop.train(model, data or tiny_data(), given or config(), device=CPU, run_dir=Here.folder / name)


def raised(call: Callable[[], object], kind: type[Exception], words: str) -> str:
    """The message of the exception that a call raises."""
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def same_weights(one: Path, other: Path) -> None:
    """Weights and momentum alike to the bit."""
    ours, theirs = last_checkpoint(one), last_checkpoint(other)
    for name, value in theirs["model"].items():
        assert "running" in name or "batches" in name or torch.equal(ours["model"][name], value), name
    for key, values in theirs["optimiser"]["state"].items():
        assert torch.equal(ours["optimiser"]["state"][key]["momentum_buffer"], values["momentum_buffer"])


# ---- one process, and a group of one


def one_is_no_group() -> None:
    if Here.rank == 0:
        train("alone", coded())
        with group(1):
            train("one", coded())
        assert_same_end(Here.folder / "one", Here.folder / "alone")
        train("halves", coded(), config(sub_batches=2))


# ---- two


def two_are_two_sub_batches() -> None:
    """Each half is normalised by its own statistics. Halving is exact, and a sum of two has one order."""
    outcome = train("two", coded())
    if Here.rank == 0:
        same_weights(Here.folder / "two", Here.folder / "halves")
        rows = (Here.folder / "two" / "metrics.csv").read_text().splitlines()
        assert len(rows) == 4
    assert outcome.iterations == 6


def gradient_is_the_mean() -> None:
    """Of the gradients that each process has alone, to the bit; of two sub-batches each, of the four quarters'."""
    data, recipe = tiny_data(), config().dataset
    _, (draws,) = next(data.train.inputs(recipe, seed=0))
    _, (own,) = next(data.train.inputs(recipe, seed=0, rows=slice(Here.rank, None, 2)))
    assert torch.equal(own, draws[Here.rank :: 2])

    def gradients(rows: Tensor, model: nn.Module) -> list[Tensor | None]:
        images, labels = data.train.batch((rows,), recipe)
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model.parameters()]

    for make in (coded, TinyNet):
        alone = [gradients(draws[rank::2], make().train()) for rank in range(2)]
        model = make().train()
        reducer = GradientReducer(model)
        for _ in range(2):  # the second time into buckets that are full
            model.zero_grad()
            with reducer.reduced():
                found = gradients(own, model)
            for actual, *own_of in zip(found, *alone, strict=True):
                assert (actual is None) == (own_of[0] is None)
                assert actual is None or torch.equal(actual, (own_of[0] + own_of[1]) / 2)


def processes_share_a_refusal() -> None:
    here = world.current()

    def fails() -> None:
        with here.together():
            if Here.rank == 1:
                raise UserError("dataset.root=nowhere: there is no such folder")

    raised(fails, UserError, "dataset.root=nowhere: there is no such folder")
    values = {"depth": 11, "training images": f"listing {Here.rank}"}
    raised(lambda: here.check_same(values), UserError, "training images is listing ")
    rows = torch.full((Here.rank + 1, 2), float(Here.rank))
    assert [found.tolist() for found in here.gather_uneven(rows)] == [[[0.0, 0.0]], [[1.0, 1.0]] * 2]
    assert here.largest(Here.rank, -Here.rank) == [1, 0]


def different_weights_are_noticed() -> None:
    def changes(net: TinyNet) -> None:
        if Here.rank == 1:
            net.conv.weight.data[0, 0, 0, 0] += 1e-6

    raised(lambda: train("different", TinyNet({2: changes})), Stopped, "the processes have different weights after")


# ---- three and four


def stopped_and_resumed(size: int) -> None:
    """Equal to the bit to a run that was never stopped; a signal to one process stops all at one iteration."""
    whole, parts = Here.folder / f"whole{size}", f"parts{size}"
    train(whole.name, coded())
    model = coded()
    stops_at(model, step=2)
    message = raised(lambda: train(parts, model), Interrupted, "stopped by SIGTERM at iteration ")
    where = {text.partition(";")[0] for text in world.current().all_values(message)}
    assert where in ({"stopped by SIGTERM at iteration 2 of 6"}, {"stopped by SIGTERM at iteration 3 of 6"}), where
    if Here.rank == 0:
        averages = last_checkpoint(Here.folder / parts)["averages"]
        assert len(averages) == size
        assert not torch.equal(averages[0], averages[1])
    train(parts, coded())
    if Here.rank == 0:
        assert_same_end(Here.folder / parts, whole)
        assert torch.equal(last_checkpoint(Here.folder / parts)["averages"], last_checkpoint(whole)["averages"])


def continued_by_four() -> None:
    """The run of three goes on: the images stay, and all begin with the mean of the three's averages."""
    given = config(iterations=9, schedule=[[1.0, 0.1]])
    given.gpu = replace(given.gpu, processes=dist.get_world_size())
    words = (
        "gpu.processes is 3 there and 4 here; give resume=false to start anew, or another folder by run=, or gpu.from_"
    )
    raised(lambda: train("three", coded(), given), UserError, words)
    given.gpu = replace(given.gpu, from_other_processes=True)
    assert train("three", coded(), given).iterations == 9
    if Here.rank == 0:
        assert len(last_checkpoint(Here.folder / "three")["averages"]) == 4


def begun_by_three() -> None:
    given = config(iterations=9, schedule=[[1.0, 0.1]])
    given.gpu = replace(given.gpu, processes=3)
    model = coded()
    stops_at(model, step=2)
    raised(lambda: train("three", model, given), Interrupted, "stopped by SIGTERM")


def stops_at(model: nn.Module, *, step: int) -> None:
    """The last process gets a signal during a step of its training."""
    calls = iter(range(1, 100))

    def signal_once(*_: Any) -> None:
        if model.training and next(calls) == step and dist.get_world_size() - 1 == Here.rank:
            os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_pre_hook(signal_once)


def evaluated(model: nn.Module, given: Config) -> Evaluated:
    step = TrainingStep(
        model, steps.make_optimiser(model, given.dataset), lambda inputs: inputs, gpu=given.gpu, device=CPU
    )
    averages = RunningAverages(model, world.current())
    return Evaluation(step, tiny_data().test, given.dataset, averages)()


def evaluation_is_that_of_one(alone: list[Evaluated]) -> None:
    """Whole batches, some processes one less: each has the bits that it has in one process."""
    for recipe, expected in zip(RECIPES, alone, strict=True):
        assert evaluated(coded(), config(**recipe)) == expected


def averages_are_means() -> None:
    model = coded()
    averages = RunningAverages(model, world.current())
    model.bn.running_mean.fill_(Here.rank)
    with averages.means():
        assert (model.bn.running_mean == 1.5).all()
        assert (model.bn.running_var == 1).all()
    assert (model.bn.running_mean == Here.rank).all()


def one_diverges() -> None:
    def spoils(net: TinyNet) -> None:
        net.scale = math.nan if Here.rank == 2 else 1.0

    raised(lambda: train("diverged", TinyNet({2: spoils})), Diverged, "the loss is nan at iteration 2; there is no")


def run(folder: Path, rank: int) -> None:
    """All checks, in the process of a rank; a failure is in a file of the folder."""
    Here.folder, Here.rank = folder, rank
    signals.unblock()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checks(rank)
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # all checks have passed; PyTorch's threads may still run, and it sometimes aborts at its own exit


def checks(rank: int) -> None:
    torch.set_num_threads(1)
    one_is_no_group()
    if rank < 2:
        with group(2):
            two_are_two_sub_batches()
            gradient_is_the_mean()
            processes_share_a_refusal()
            different_weights_are_noticed()
    evaluated_alone = [evaluated(coded(), config(**recipe)) for recipe in RECIPES]
    if rank < 3:
        with group(3):
            stopped_and_resumed(3)
            begun_by_three()
    with group(4):
        stopped_and_resumed(4)
        continued_by_four()
        evaluation_is_that_of_one(evaluated_alone)
        averages_are_means()
        one_diverges()
