"""What only a GPU can show: captured steps, what waits for the device, memory as it is taken, precision, real probes.

`make gpu-check` runs this and the tests of the Triton kernels; without a GPU all of it is skipped.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_end, composed, tiny_config
from torch import Tensor, nn

import blpa
from blpa import kernels
from runners import cli, errors, fresh, records, streams
from runners.config import Config, GpuConfig
from runners.data import ImageData, Split
from runners.data.colour import draw_changes
from runners.data.image_files import ImageFiles
from runners.image_files.listing import Files
from runners.image_files.workers import Workers
from runners.option_files import mode
from runners.run import run_cell
from runners.training import loop, network, segments, steps
from runners.training.offloading import Offload
from runners.training.steps import TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
MIB = 2**20
MODES = ("exact", "exact-one-copy", "checkpoint", "offload", "naive-8bit", "8bit", "4bit", "2bit")
all_modes = pytest.mark.parametrize("name", MODES)
all_precisions = pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Give back the process-wide settings that training changes."""
    yield
    steps.configure_torch(GpuConfig(precision="fp32", deterministic=False))
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.cuda.set_sync_debug_mode("default")
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def all_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of a few images are small."""
    monkeypatch.setattr(Offload, "smallest_bytes", 0)


def config_of(name: str, *, depth: int = 20, batch: int = 8, **gpu: Any) -> Config:
    """Twelve iterations on random images of 32 x 32 pixels; the rate changes after six."""
    config = tiny_config(image_size=32, image_channels=3, crop_padding=4, name="cifar10", batch_size=batch)
    used = replace(config.gpu, name="auto", device="cuda", kernels="auto", **gpu)
    return replace(config, mode=mode(name), gpu=used, depth=depth)


def random_images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (62, 3, 32, 32), dtype=torch.uint8, generator=generator).to(CUDA)
    labels = torch.randint(10, (62,), generator=generator).to(CUDA)
    return ImageData(Split(images[:42], labels[:42]), Split(images[42:], labels[42:]))


def built(config: Config) -> nn.Module:
    return network.build(config, kernels.choose(config.gpu.kernels, CUDA))


def train(config: Config, run_dir: Path) -> loop.Outcome:
    return loop.train(built(config), random_images(), config, device=CUDA, run_dir=run_dir)


# ---- captured steps --------------------------------------------------------------------------------------------------


@all_modes
def test_a_captured_run_ends_with_the_bits_of_one_that_is_not(name: str, tmp_path: Path) -> None:
    """Weights, momentum, running averages, losses and errors, over a change of rate, evaluations and checkpoints."""
    for graph in (True, False):
        train(config_of(name, cuda_graph=graph), tmp_path / str(graph))
    assert_same_end(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_so_does_it_in_other_precisions(precision: str, tmp_path: Path) -> None:
    for graph in (True, False):
        train(config_of("4bit", cuda_graph=graph, precision=precision), tmp_path / str(graph))
    assert_same_end(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("name", ["exact", "4bit"])
def test_so_does_it_where_it_is_evaluated_by_batch_statistics(name: str, tmp_path: Path) -> None:
    for graph in (True, False):
        config = config_of(name, cuda_graph=graph)
        config.dataset.eval_statistics = "batch"
        train(config, tmp_path / str(graph))
    assert_same_end(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_so_does_that_of_a_converted_network(precision: str, bits: int, tmp_path: Path) -> None:
    for graph in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        config = config_of("exact", cuda_graph=graph, precision=precision)
        converted = blpa.convert(model, bits).to(memory_format=torch.channels_last)
        loop.train(converted, random_images(), config, device=CUDA, run_dir=tmp_path / str(graph))
    assert_same_end(tmp_path / "True", tmp_path / "False")


def test_runs_on_streams_side_by_side_end_with_the_bits_of_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time, each with evaluations and checkpoints while others are captured."""
    monkeypatch.chdir(tmp_path)
    cells = [
        "dataset=digits", "depth=20", "dataset.batch_size=64", "dataset.iterations=40", "task.evaluate_every=10",
        "task.checkpoint_every=15", "jobs=3", "mode=exact,4bit", "seed=0,1",
    ]  # fmt: skip
    configs = composed(cells, multirun=True)
    assert all(run_cell(replace(config, results="alone")) == 0 for config in configs)
    assert streams.train(configs, [0, 1, 2, 3]) == (dict.fromkeys(range(4), 0), None)
    for config in configs:
        assert_same_end(Path("results/runs") / config.run, Path("alone/runs") / config.run)


def test_a_stopped_and_resumed_run_ends_with_the_bits_of_one_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("4bit", cuda_graph=True)
    train(config, tmp_path / "whole")
    inputs = Split.inputs

    def stopping(*args: Any, **options: Any) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for iteration, table in inputs(*args, **options):
            if iteration == 7:  # replayed since the fourth
                os.kill(os.getpid(), signal.SIGTERM)
            yield iteration, table

    with monkeypatch.context() as stopped:
        stopped.setattr(Split, "inputs", stopping)
        with pytest.raises(errors.Interrupted, match="stopped by SIGTERM at iteration 7 of 12"):
            train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def make_step(config: Config) -> Callable[[], Tensor]:
    """Training steps of random images, each with other draws and another rate."""
    train, recipe = random_images().train, replace(config.dataset, iterations=1000)
    steps.configure_torch(config.gpu)
    model = built(config).to(CUDA).train()
    optimiser = steps.make_optimiser(model, recipe)
    step = TrainingStep(model, optimiser, lambda inputs: train.batch(inputs, recipe), gpu=config.gpu, device=CUDA)
    drawn = train.inputs(recipe, seed=0)

    def one() -> Tensor:
        iteration, inputs = next(drawn)
        return step(inputs, rate=0.1 / iteration)

    return one


@pytest.mark.parametrize("graph", [True, False])
@all_modes
def test_no_step_waits_for_the_device(name: str, graph: bool) -> None:
    step = make_step(config_of(name, cuda_graph=graph))
    for _ in range(steps.EAGER_STEPS + 2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    results = [step() for _ in range(5)]
    torch.cuda.set_sync_debug_mode("default")
    losses = torch.stack(results)[:, 0].tolist()
    assert len(set(losses)) == 5  # each result is its own, not the memory that the next replay writes over


def test_the_rate_of_a_captured_step_can_be_changed() -> None:
    config = config_of("4bit", cuda_graph=True)
    train, recipe = random_images().train, config.dataset
    steps.configure_torch(config.gpu)
    model = built(config).to(CUDA).train()
    optimiser = steps.make_optimiser(model, recipe)
    step = TrainingStep(model, optimiser, lambda inputs: train.batch(inputs, recipe), gpu=config.gpu, device=CUDA)
    _, inputs = next(train.inputs(recipe, seed=0))
    for _ in range(steps.EAGER_STEPS + 2):
        step(inputs, rate=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    step(inputs, rate=0.0)
    assert all(map(torch.equal, before, model.parameters()))
    step(inputs, rate=0.1)
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ["exact", "4bit"])
@all_precisions
def test_activations_and_their_gradients_are_channels_last_throughout(name: str, precision: str) -> None:
    """Else cudnn copies them, or our kernels do."""
    config = config_of(name, precision=precision)
    steps.configure_torch(config.gpu)
    model = built(config).to(CUDA).train()
    odd: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def check(module: nn.Module, given: object, returned: object) -> None:
            value = getattr(returned, "value", returned)
            if not value.is_contiguous(memory_format=torch.channels_last):
                odd.append(f"{name} forward")
            value.register_hook(
                lambda grad: (
                    odd.append(f"{name} backward")
                    if not grad.is_contiguous(memory_format=torch.channels_last)
                    else None
                )
            )

        return check

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look(path))
    images = torch.randn(8, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
    steps.forward(model, images, config.gpu).square().sum().backward()
    assert not odd


# ---- the competitors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compiled", "compiled-budget-0.5", "compiled-fp8"])
def test_the_compiler_s_modes_run_and_are_recorded(name: str) -> None:
    step = make_step(config_of(name, depth=11, cuda_graph=True))
    results = [step() for _ in range(steps.EAGER_STEPS + 3)]
    assert torch.stack(results).isfinite().all()


def test_inductor_s_kernels_train_like_triton_s(tmp_path: Path) -> None:
    """Sums in other orders, and fused multiply-adds: twelve steps later the losses still agree to a hundredth."""
    losses = []
    for backend in ("inductor", "triton"):
        config = config_of("4bit", depth=11)
        config.gpu.kernels = backend
        losses.append(train(config, tmp_path / backend).train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "exact-one-copy", "checkpoint", "offload", "8bit", "4bit", "2bit"])
def test_a_step_takes_the_memory_that_was_counted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Within 5 % and the allowance: workspaces of cudnn and cuBLAS, and sums that kernels make in two stages."""
    batch = 1024
    config = config_of(name, depth=56, batch=batch)
    steps.configure_torch(config.gpu)
    counted = network.training_bytes(config, batch).total_bytes
    before = torch.cuda.memory_allocated()
    step = network.training_step(config, batch, kernels.choose("auto", CUDA), CUDA)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - before
    with capsys.disabled():
        print(f"\n{name}: counted {counted / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
    assert 0.95 * counted <= measured <= 1.05 * counted + config.gpu.allowance_mib * MIB


def test_the_largest_batch_is_measured_where_it_is_predicted(tmp_path: Path) -> None:
    arguments = ["task=max-batch", "mode=4bit", "depth=56", "gpu.memory_gib=4", "task.resolution=0.05"]
    assert cli.main([*arguments, f"results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("runs/*/records.json")
    predicted, measured = records.read(file)
    assert predicted.predicted and not measured.predicted
    assert measured.segments in ("usual", "expandable")
    # The allowance comes off both budgets, so a measured step pays for its workspaces again: no more than all of it.
    assert 1 - 0.5 / 3.5 - 0.05 <= measured.value / predicted.value <= 1.05


@pytest.mark.parametrize("kind", [segments.USUAL, segments.EXPANDABLE])
def test_a_captured_step_takes_memory_in_the_kind_of_segments_that_was_asked_for(kind: str) -> None:
    """In a graph's own pool too, and no more of it than the process may take."""
    taken, allowed = fresh.call(expandable_in_pools_of_graphs, kind)
    assert taken == {kind == segments.EXPANDABLE}
    assert allowed


def expandable_in_pools_of_graphs(kind: str) -> tuple[set[bool], bool]:
    segments.use(kind)
    limit = 2**30
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(CUDA).total_memory)
    step = make_step(config_of("4bit", cuda_graph=True))
    for _ in range(steps.EAGER_STEPS + 2):
        step()
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return {segment["is_expandable"] for segment in pools}, torch.cuda.max_memory_reserved() <= limit


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_steps_are_timed_by_the_device_s_clock(tmp_path: Path) -> None:
    arguments = ["task=runtime", "mode=4bit", "depth=11", "task.steps=3", "task.modes=[exact,2bit]", "seed=1"]
    assert cli.main([*arguments, f"results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("runs/*/records.json")
    found = records.read(file)
    assert {record.mode for record in found} == {"4bit", "exact", "2bit"}
    assert all(record.cuda and record.value > 0 for record in found)


@pytest.mark.parametrize("backend", ["triton", "inductor"])
def test_kernels_are_measured(backend: str, tmp_path: Path) -> None:
    arguments = ["task=kernels", "mode=4bit", f"gpu.kernels={backend}", "task.elements=1048576", "task.steps=3"]
    assert cli.main([*arguments, f"results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("runs/*/records.json")
    shares = [record.value for record in records.read(file) if record.metric.endswith("_share_of_copy")]
    assert len(shares) == 4 * 7
    assert min(shares) > 0


def test_the_demo_s_data_trains_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["dataset=digits", "mode=4bit", "depth=11", "dataset.iterations=20", f"results={tmp_path}"]
    assert cli.main(arguments) == 0
    (file,) = tmp_path.glob("runs/*/records.json")
    assert {record.kernels for record in records.read(file)} == {"triton"}


def test_a_batch_is_the_same_wherever_it_is_made() -> None:
    split, recipe = random_images().train, config_of("exact").dataset
    on_host = Split(split.images.cpu(), split.labels.cpu())
    for _, inputs in split.inputs(recipe, seed=0):
        images, labels = on_host.batch(inputs, recipe)
        images_there, labels_there = split.batch(steps.to_device(inputs, CUDA), recipe)
        assert torch.equal(labels, labels_there.cpu())
        # The mean is a sum of 3,072 values in another order: a few units in the last place of values below 1.
        torch.testing.assert_close(images, images_there.cpu(), rtol=0, atol=1e-6)


def test_a_captured_batch_of_image_files_is_that_of_the_host() -> None:
    recipe = replace(config_of("exact").dataset, colour=True)
    split = ImageFiles(Files(Path(), [], []), Workers(0), CUDA)
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    changes = torch.cat([torch.arange(6)[:, None] % 2, draw_changes(6, generator=generator)], dim=1)
    inputs = crops, torch.arange(6), changes
    there = steps.to_device(inputs, CUDA)
    made: list[Tensor] = []

    def batch() -> Tensor:
        made[:] = split.batch(there, recipe)
        return made[0]

    stream = steps.own_stream(CUDA)
    steps.run_on_stream(batch, stream)
    graph, images = steps.capture(batch, stream)
    graph.replay()
    expected, labels = split.batch(inputs, recipe)
    assert torch.equal(made[1].cpu(), labels)
    # The means are sums of 1,024 values in another order, and 0.22 divides: a few units in the last place.
    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-5)


def test_pinned_batches_of_image_files_are_read_before_they_are_filled_again() -> None:
    split = ImageFiles(Files(Path(), [], []), Workers(0), CUDA)
    batches = [(torch.full((4, 3, 256, 256), number, dtype=torch.uint8),) for number in range(20)]
    slow = torch.zeros(4096, 4096, device=CUDA)
    there = []
    for (batch,) in split._pinned(iter(batches)):
        assert batch.is_pinned()
        slow = slow @ slow  # the device reads the batch long after it was launched
        there.append(batch.to(CUDA, non_blocking=True))
    assert [int(batch.float().mean()) for batch in there] == list(range(20))
