"""Which precision a run is in, by name or by PyTorch's default for the device, and that records tell it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from runners import cli, config, fresh, records
from runners.config import GpuConfig
from runners.training import checkpoints, network, steps

TINY = ["dataset=digits", "depth=11", "width=0.25", "gpu=cpu", "gpu.kernels=torch", "dataset.batch_size=4", "run=a"]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("asked", "device", "capability", "used"),
    [
        ("auto", CUDA, (9, 0), "tf32"),
        ("auto", CUDA, (8, 0), "tf32"),
        ("auto", CUDA, (7, 5), "fp32"),
        ("auto", CPU, None, "fp32"),
        ("auto", network.META, None, "fp32"),
        ("tf32", CUDA, (9, 0), "tf32"),
        ("tf32", CUDA, (7, 5), "fp32"),
        ("tf32", CPU, None, "fp32"),
        ("tf32", network.META, None, "fp32"),
        *((name, device, (7, 5), name) for name in ("fp32", "bf16") for device in (CUDA, CPU, network.META)),
    ],
)
def test_auto_is_pytorch_s_default_for_convolutions(
    asked: str, device: torch.device, capability: tuple[int, int] | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device is asked for what it has unless it is a CUDA one."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = GpuConfig(name="auto", precision=asked)
    assert network.precision(gpu, device) == used
    assert network.used(gpu, device) == dataclasses.replace(gpu, precision=used)


def allows_tf32_for_convolutions() -> bool:
    return torch.backends.cudnn.allow_tf32


def test_pytorch_s_default_is_what_auto_takes_it_for() -> None:
    """In a process that has set nothing."""
    assert fresh.call(allows_tf32_for_convolutions)


def test_torch_is_not_configured_for_a_precision_that_is_none() -> None:
    with pytest.raises(AssertionError):
        steps.configure_torch(GpuConfig(name="cpu"))


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["dataset.iterations=2"], "a"),
        (["task=runtime", "task.steps=1"], "a-runtime-batch4-torch"),
        (["task=gradient-error", "task.steps=1"], "a-gradient-error-batch4"),
        (["task=memory"], "a-memory-batch4-torch"),
        (["task=max-batch", "gpu.memory_gib=0.5"], "a-max-batch-0.5gib-torch"),
    ],
    ids=["train", "runtime", "gradient-error", "memory", "max-batch"],
)
@pytest.mark.parametrize("asked", ["auto", "tf32", "bf16"])
def test_records_hold_the_precision_that_was_used(asked: str, arguments: list[str], folder: str) -> None:
    assert cli.main([*TINY, "mode=2bit", f"gpu.precision={asked}", *arguments]) == 0
    used = "bf16" if asked == "bf16" else "fp32"
    assert {record.precision for record in records.read(Path("results/runs") / folder / "records.json")} == {used}


def test_a_training_run_says_its_precision_and_its_checkpoints_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "mode=exact", "dataset.iterations=2"]) == 0
    assert "precision: fp32\n" in capsys.readouterr().err
    state = torch.load(checkpoints.checkpoints(Path("results/runs/a"))[-1], weights_only=True)
    assert state["configuration"]["gpu.precision"] == "fp32"
    assert cli.main([*TINY, "mode=exact", "dataset.iterations=2", "gpu.precision=fp32"]) == 0
    err = capsys.readouterr().err
    assert "finished before" in err  # the same run, by name
    assert "precision: " not in err


def test_the_default_is_auto() -> None:
    assert config.GpuConfig().precision == "auto"


def test_a_backend_that_cannot_run_here_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "mode=4bit", "gpu.kernels=triton"]) == 1
    line = "kernels = triton: it is for CUDA GPUs, and the run is on the cpu; use kernels auto or torch"
    assert capsys.readouterr().err.splitlines() == [f"blpa-run: error: {line}"]
