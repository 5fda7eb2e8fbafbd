"""The loop on tiny networks: what it computes, and that nothing that happens to it changes that."""

import csv
import gc
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import CPU, TinyNet, assert_same_end, tiny_config, tiny_data, train
from torch import nn

from runners import errors, fresh
from runners.config import Config, DatasetConfig, GpuConfig
from runners.data import Split, load, normalise
from runners.training import loop, steps
from runners.training.evaluation import Evaluated, Evaluation
from runners.training.turns import Turns


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Give back the process-wide settings that training changes."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def evaluate(net: nn.Module, split: Split, config: Config) -> Evaluated:
    optimiser = steps.make_optimiser(net, config.dataset)
    step = steps.TrainingStep(net.train(), optimiser, lambda inputs: inputs, gpu=config.gpu, device=CPU)
    return Evaluation(step, split, config.dataset)()


def checkpointed_iterations(run_dir: Path) -> list[int]:
    return sorted(int(file.name.split("-")[1]) for file in run_dir.glob("checkpoint-*.pt"))


def rows(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ---- what it computes


def test_the_loop_is_the_recipe_written_out(tmp_path: Path) -> None:
    """Against the update formulas of SGD with momentum, in plain tensor arithmetic."""
    config, data = tiny_config(weight_decay=0.1), tiny_data()
    net = TinyNet()
    outcome = train(net, tmp_path, config)

    reference = TinyNet()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in reference.named_parameters()}
    losses, wrong, expected_rows = [], [], []
    for iteration, inputs in data.train.inputs(config.dataset, seed=config.seed):
        images, labels = data.train.batch(inputs, config.dataset)
        rate = 0.1 if iteration <= 6 else 0.01
        reference.zero_grad()
        logits = reference.train()(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if parameter.grad is None:
                    continue
                decay = 0.1 if name in ("conv.weight", "classifier.weight") else 0.0
                velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * parameter
                parameter.sub_(rate * velocity[name])
        losses.append(loss.item())
        wrong.append((logits.argmax(dim=1) != labels).float().mean().item())
        if iteration % 3 == 0:
            with torch.no_grad():
                logits = reference.eval()(normalise(data.test.images))
            test_loss = F.cross_entropy(logits, data.test.labels).item()
            test_error = 100 * (logits.argmax(dim=1) != data.test.labels).float().mean().item()
            expected_rows.append([iteration, rate, sum(losses) / 3, 100 * sum(wrong) / 3, test_loss, test_error])
            losses, wrong = [], []

    # The same float32 operations in another order, 12 steps of them: 1e-5 is a hundred units in the last place.
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-5, atol=1e-5)
    assert [list(row) for row in rows(tmp_path)] == [list(loop.METRICS)] * 4
    for row, expected in zip(rows(tmp_path), expected_rows, strict=True):
        assert list(row.values()) == pytest.approx(expected, rel=1e-4)
    assert list(rows(tmp_path)[-1].values())[2:] == [
        outcome.train_loss,
        outcome.train_error_percent,
        outcome.test_loss,
        outcome.test_error_percent,
    ]
    assert outcome.iterations == 12
    assert outcome.samples_per_second == 12 * 8 / outcome.seconds


def test_only_convolution_and_classifier_weights_decay() -> None:
    net = TinyNet()
    decayed, others = steps.make_optimiser(net, tiny_config(weight_decay=0.5).dataset).param_groups
    assert {id(value) for value in decayed["params"]} == {id(net.conv.weight), id(net.classifier.weight)}
    assert len(others["params"]) == 4
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert (decayed["momentum"], decayed["nesterov"]) == (0.9, False)


def test_the_paper_s_schedule() -> None:
    recipe = tiny_config(iterations=64_000, schedule=[[0.00625, 1e-2], [0.5, 1e-1], [0.75, 1e-2], [1.0, 1e-3]]).dataset
    found = [loop.learning_rate(recipe, i) for i in (1, 400, 401, 32_000, 32_001, 48_000, 48_001, 64_000)]
    assert found == [1e-2, 1e-2, 1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3]


def test_a_schedule_that_ends_too_soon_is_refused() -> None:
    with pytest.raises(ValueError, match="ends before iteration 7 of 12"):
        loop.learning_rate(tiny_config(schedule=[[0.5, 0.1]]).dataset, 7)


def test_when_losses_are_read_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "READ_EVERY_SECONDS", math.inf)
    train(TinyNet(), tmp_path / "late")
    monkeypatch.setattr(loop, "READ_EVERY_ITERATIONS", 1)
    train(TinyNet(), tmp_path / "at once")
    assert_same_end(tmp_path / "at once", tmp_path / "late")


def test_evaluation_by_batch_statistics_is_the_batch_norm_of_training() -> None:
    net, data, config = TinyNet(), tiny_data(), tiny_config(eval_statistics="batch", eval_batch_size=10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loss, error_percent, _ = evaluate(net, data.test, config)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        logits = torch.cat([net(normalise(images)) for images in torch.split(data.test.images, 10)])
    assert loss == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-6)  # float32 sums
    assert error_percent == 100 * (logits.argmax(dim=1) != data.test.labels).sum().item() / 20


def test_evaluation_by_running_averages_differs_and_counts_every_image() -> None:
    net, data = TinyNet(), tiny_data()
    with torch.no_grad():
        logits = net.eval()(normalise(data.test.images))
    loss, error_percent, _ = evaluate(net, data.test, tiny_config(eval_batch_size=7))  # 7 + 7 + 6
    assert loss == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-6)  # float32 sums
    assert error_percent == 100 * (logits.argmax(dim=1) != data.test.labels).sum().item() / 20
    assert loss != evaluate(net, data.test, tiny_config(eval_statistics="batch"))[0]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_settings_of_torch(precision: str, deterministic: bool) -> None:
    steps.configure_torch(GpuConfig(name="cpu", precision=precision, deterministic=deterministic))
    is_tf32 = precision == "tf32"
    assert torch.get_float32_matmul_precision() == ("high" if is_tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 == is_tf32
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == is_tf32  # type: ignore[attr-defined]
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic


def test_bf16_trains_by_autocast_and_keeps_float32_weights(tmp_path: Path) -> None:
    config = tiny_config()
    config.gpu.precision = "bf16"
    net, seen = TinyNet(), set()
    net.classifier.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    outcome = train(net, tmp_path, config)
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert math.isfinite(outcome.test_loss)


# ---- stopping and going on


def test_a_finished_run_returns_its_outcome_at_once_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(TinyNet(), tmp_path)
    capsys.readouterr()
    net = TinyNet()
    assert train(net, tmp_path) == outcome
    assert net.step == 0
    err = capsys.readouterr().err
    assert err.startswith(f"finished before, as in {tmp_path}")
    assert err.count("\n") == 1  # no bar


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    train(TinyNet(), tmp_path)
    old = {file.name for file in tmp_path.glob("checkpoint-*")}
    net, config = TinyNet(), tiny_config(iterations=4)
    config.resume = False
    train(net, tmp_path, config)
    assert net.step == 4
    assert checkpointed_iterations(tmp_path) == [4]
    assert not old & {file.name for file in tmp_path.glob("checkpoint-*")}
    assert [row["iteration"] for row in rows(tmp_path)] == [3, 4]


def test_another_configuration_is_refused_and_its_folder_left_alone(tmp_path: Path) -> None:
    train(TinyNet(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"dataset\.weight_decay is 0\.0002 there and 0\.1 here; give resume=false"):
        train(TinyNet(), tmp_path, tiny_config(weight_decay=0.1))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("iteration", [2, 8, 12])  # before any checkpoint, at one, and at the end
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, iteration: int
) -> None:
    train(TinyNet(), tmp_path / "reference")
    handler = signal.getsignal(number)
    net = TinyNet({iteration: lambda net: os.kill(os.getpid(), number)})
    with pytest.raises(errors.Interrupted) as caught:
        train(net, tmp_path / "run")
    assert net.step == iteration
    assert caught.value.exit_code == 128 + number
    assert str(caught.value).startswith(f"stopped by {number.name} at iteration {iteration} of 12; ")
    assert str(caught.value).endswith(next((tmp_path / "run").glob(f"checkpoint-{iteration}-*")).name)
    assert signal.getsignal(number) is handler

    resumed = TinyNet()
    train(resumed, tmp_path / "run")
    assert resumed.step == 12 - iteration
    assert_same_end(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_signal_after_the_last_checkpoint_is_obeyed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    reference = train(TinyNet(), tmp_path / ("run" if is_finished else "reference"))
    close = loop.tqdm.close
    signals_left = [signal.SIGTERM]

    def close_late(bar: Any) -> None:
        """The last that happens before signals are no longer noted."""
        while signals_left:
            os.kill(os.getpid(), signals_left.pop())
        close(bar)

    gc.collect()  # the bars of the runs before close too when they are collected
    monkeypatch.setattr(loop.tqdm, "close", close_late)
    with pytest.raises(errors.Interrupted, match=r"^stopped by SIGTERM at iteration 12 of 12; .*checkpoint-12-"):
        train(TinyNet(), tmp_path / "run")
    net = TinyNet()
    assert train(net, tmp_path / "run").test_loss == reference.test_loss
    assert net.step == 0


def test_a_signal_at_the_very_end_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turns = loop.in_turns

    def late(*args: Any, **options: Any) -> Turns[loop.Outcome]:
        outcome = yield from in_turns(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(loop, "in_turns", late)
    with pytest.raises(errors.Interrupted, match="stopped by SIGTERM after the last step"):
        train(TinyNet(), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_iteration(tmp_path: Path, value: float) -> None:
    net = TinyNet({6: lambda net: setattr(net, "scale", value)})  # logits become nan in either case
    with pytest.raises(errors.Diverged) as caught:
        train(net, tmp_path)
    (good,) = tmp_path.glob("checkpoint-*")
    assert str(caught.value) == f"the loss is nan at iteration 6; the last checkpoint is {good}"
    assert caught.value.exit_code != 0
    assert checkpointed_iterations(tmp_path) == [4]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """Where the loss does not show it yet."""
    net = TinyNet({3: lambda net: net.unused.data.fill_(math.inf)})
    with pytest.raises(errors.Diverged, match=r"^a weight is not finite after iteration 4; there is no checkpoint"):
        train(net, tmp_path)
    assert checkpointed_iterations(tmp_path) == []


def test_a_damaged_checkpoint_costs_steps_and_no_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(TinyNet(), tmp_path / "reference")
    train(TinyNet(), tmp_path / "run")
    newest = next((tmp_path / "run").glob("checkpoint-12-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    net = TinyNet()
    train(net, tmp_path / "run")
    assert net.step == 4
    assert f"{newest} is damaged" in capfd.readouterr().err
    assert checkpointed_iterations(tmp_path / "run") == [8, 12]
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_the_bar_shows_loss_error_speed_and_time_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(TinyNet(), tmp_path)
    last = capfd.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "12/12" in last
    assert all(word in last for word in ("left", "loss ", "error ", "samples/s"))


# ---- SIGKILL, in a process of its own


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def digits_config() -> Config:
    """Five iterations an epoch of real digits, three epochs begun."""
    return tiny_config(batch_size=256, eval_batch_size=500, flip=False)


def run_until(moment: str, run_dir: Path) -> None:
    """Train on the digits, and die at a moment: "step 3", "writing <file>" (half of it) or "written <file>"."""
    learning_rate, move = loop.learning_rate, os.replace

    def rate(recipe: DatasetConfig, iteration: int) -> float:
        if moment == f"step {iteration}":
            die()
        return learning_rate(recipe, iteration)

    def move_or_die(part: str, file: Path) -> None:
        name = file.name.rpartition("-")[0] or f"{file.name} of {Path(part).read_text().count(chr(10)) - 1}"
        if moment == f"writing {name}":
            os.truncate(part, os.stat(part).st_size // 2)
            die()
        move(part, file)
        if moment == f"written {name}":
            die()

    loop.learning_rate, os.replace = rate, move_or_die  # type: ignore[assignment]
    config = digits_config()
    loop.train(TinyNet(), load(config.dataset, CPU), config, device=CPU, run_dir=run_dir)


def exit_code(moment: str, run_dir: Path) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(fresh.IMPORTED_AHEAD)  # once, in a process that computes nothing; forks are cheap
    process = context.Process(target=run_until, args=(moment, run_dir))
    process.start()
    process.join()
    return process.exitcode


def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert exit_code("", tmp_path / "reference") == 0
    run_dir = tmp_path / "run"
    moments = {
        "written metrics.csv of 0": [],
        "step 3": [],
        "writing metrics.csv of 1": [],
        "written metrics.csv of 1": [],
        "writing checkpoint-4": [],
        "written checkpoint-4": [4],
        "step 5": [4],
        "written metrics.csv of 2": [4],
        "writing checkpoint-8": [4],
        "written checkpoint-8": [4, 8],
        "step 12": [4, 8],
        "writing checkpoint-12": [4, 8],
        "written checkpoint-12": [4, 8, 12],
    }
    for moment, checkpoints in moments.items():
        assert exit_code(moment, run_dir) == -signal.SIGKILL, moment
        assert checkpointed_iterations(run_dir) == checkpoints, moment
    assert exit_code("", run_dir) == 0
    assert not list(run_dir.glob("*.part"))
    assert_same_end(run_dir, tmp_path / "reference")


def test_a_kill_between_evaluation_and_checkpoint_leaves_no_row_twice(tmp_path: Path) -> None:
    assert exit_code("written metrics.csv of 2", tmp_path) == -signal.SIGKILL
    assert [row["iteration"] for row in rows(tmp_path)] == [3, 6]
    assert exit_code("step 5", tmp_path) == -signal.SIGKILL
    assert [row["iteration"] for row in rows(tmp_path)] == [3]  # what the checkpoint at 4 vouches for


def test_a_checkpoint_of_another_list_of_images_is_refused(tmp_path: Path) -> None:
    class Listed(Split):
        listing = "42 images, 1a2b3c4d"

    data = tiny_data()
    listed = replace(data, train=Listed(data.train.images, data.train.labels))
    loop.train(TinyNet(), listed, tiny_config(), device=CPU, run_dir=tmp_path)
    Listed.listing = "41 images, 5e6f7a8b"
    refused = r"training images is 42 images, 1a2b3c4d there and 41 images, 5e6f7a8b here; give resume=false"
    with pytest.raises(errors.UserError, match=refused):
        loop.train(TinyNet(), listed, tiny_config(), device=CPU, run_dir=tmp_path)
