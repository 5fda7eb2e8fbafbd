"""The baselines save the memory they are to save, are really compiled or checkpointed, and give the gradients."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import composed, gradients, images, prepared
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from blpa import memory
from blpa.layers import StockLayers
from blpa.models.preact_resnet import Bottleneck, PreActResNet
from runners import cli
from runners.training import baselines, network

META = torch.device("meta")
Step = Callable[..., memory.StepBytes]
Build = Callable[..., PreActResNet]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def step(build: Build) -> Step:
    """How to count a training step of a mode's network."""

    def of_mode(name: str, batch: int = 8, depth: int = 11) -> memory.StepBytes:
        with META:
            labels = torch.empty(batch, dtype=torch.int64)
            return memory.step_bytes(build(name, depth), torch.empty(batch, 3, 32, 32), labels)

    return of_mode


def test_the_compiler_keeps_what_it_is_told_to(step: Step) -> None:
    saved = {name: step(name).forward_bytes for name in ("exact", "compiled", "compiled-budget-0.5",
                                                              "compiled-budget-0.2", "compiled-fp8")}  # fmt: skip
    assert saved["compiled"] == saved["exact"]
    # A block's input is saved whatever the budget; of the rest, half or less.
    assert saved["compiled-budget-0.2"] < saved["compiled-budget-0.5"] < 0.6 * saved["exact"]
    # A quarter of the bytes, and a scale in float32 for each row of 8 to 32 pixels.
    assert 1 / 4 < saved["compiled-fp8"] / saved["exact"] < 1 / 4 + 1 / 8 + 0.02


def test_blocks_of_one_shape_share_a_graph(step: Step) -> None:
    step("compiled", depth=29)
    assert counters["stats"]["unique_graphs"] == 6  # first and later blocks of three groups


def test_every_run_of_a_process_begins_without_the_graphs_of_the_others(
    step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "VARIANTS", 3)  # those of one batch size at this depth
    (config,) = composed(["mode=compiled", f"results={tmp_path}"])
    for batch in (2, 3):
        network.run_folder(config)
        step("compiled", batch)
    with pytest.raises(FailOnRecompileLimitHit):
        step("compiled", 4)


def test_more_batch_sizes_than_dynamo_s_limit_are_compiled_too(step: Step) -> None:
    """Past its limit of 8, dynamo quietly runs the source instead; each size has three graphs."""
    per_sample = {step("compiled-budget-0.2", batch).forward_bytes // batch for batch in (4, 8, 16)}
    assert max(per_sample) < 1.01 * min(per_sample)


def test_a_copy_of_a_compiled_network_computes_with_its_own_weights(build: Build) -> None:
    model = build("compiled", 11)
    copied = copy.deepcopy(model)
    for (name, block), (_, of_copy) in zip(model.blocks.named_children(), copied.blocks.named_children(), strict=True):
        assert of_copy.forward.block is of_copy is not block, name
    assert copied.state_dict().keys() == build("exact", 11).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"activation_memory_budget": 0.2}, 1e-5),  # some hundred roundings to float32 of 6e-8
        ({"fp8": True}, 2**-3),  # float8_e5m2 has two bits behind the point: it rounds by up to 1/8
    ],
    ids=str,
)
def test_gradients_are_those_of_stock_layers(options: dict[str, Any], tolerance: float) -> None:
    torch.manual_seed(0)
    stock = Bottleneck(32, 8, 1, StockLayers())
    compiled = copy.deepcopy(stock)
    baselines.compile_blocks(nn.Sequential(compiled), **options)
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last)

    def gradients(block: Bottleneck, dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        loss = F.mse_loss(block.to(dtype)(inputs * 1), torch.zeros_like(inputs))
        return torch.autograd.grad(loss, [inputs, *block.parameters()])

    ours = gradients(compiled, torch.float32)
    for found, expected in zip(ours, gradients(stock, torch.float64), strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_mode_that_does_not_compile_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(name: str) -> object:
        raise NotImplementedError("no code for this machine")

    monkeypatch.setattr(baselines, "lookup_backend", refuse)
    arguments = ["task=memory", "mode=compiled", "depth=11", "dataset.batch_size=2", f"results={tmp_path}"]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("blpa-run: error: does not compile: ")
    assert err.count("\n") == 1


# ---- checkpointed blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [None, 1, 2, 6])
def test_gradients_under_checkpoint_equal_the_exact_ones_to_the_bit(segments: int | None, build: Build) -> None:
    exact, checkpointed = (prepared(build("exact", 20, width=0.5)) for _ in range(2))
    keys = list(checkpointed.state_dict())
    checkpointed.blocks = baselines.CheckpointedBlocks(checkpointed.blocks, segments)
    assert list(checkpointed.state_dict()) == keys
    assert all(map(torch.equal, gradients(checkpointed), gradients(exact)))


def test_without_gradients_every_block_runs_once(build: Build) -> None:
    model, calls = prepared(build("checkpoint", 20, width=0.5)), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, *others: calls.append(block))
    with torch.no_grad():
        model(images())
    assert calls == list(model.blocks)
    gradients(model)
    assert len(calls) > 2 * len(model.blocks)
