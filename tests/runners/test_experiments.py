"""Every experiment runs from the command line to its records: its first cell, in miniature."""

from pathlib import Path

import pytest
from support import composed

from runners import cli, records
from runners.config import options
from runners.option_files import option

TINY = {
    "dataset": "digits", "dataset.iterations": "1", "dataset.batch_size": "2", "depth": "11", "width": "0.25",
    "gpu": "cpu", "gpu.kernels": "torch", "gpu.memory_gib": "0.502", "gpu.precision": "fp32",
}  # fmt: skip
"""In place of what an experiment lists or sets. Of that memory 2 MiB are for the network."""

OF_TASK = {
    "train": ["mode=4bit"],
    "converted-runtime": [
        "mode=4bit", "task.steps=1", "task.modes=[]", "task.model=resnet18", "task.image_size=32", "gpu.kernels=auto",
        "width=1.0",
    ],
    "explain": ["mode=4bit", "task.model=resnet18", "task.image_size=64", "width=1.0"],
    "gradient-error": ["mode=4bit", "task.steps=1"],
    "kernels": ["mode=4bit", "task.steps=1", "task.elements=4096"],
    "max-batch": ["mode=exact", "task.resolution=0.5"],
    "memory": ["mode=4bit"],
    "runtime": ["mode=exact", "task.steps=1", "task.modes=[]"],
}  # fmt: skip
"""What makes a task short."""


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_leaves_its_records(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)  # of the stock BN-ReLU-conv in task=kernels
    task = composed([f"experiment={experiment}", "gpu.memory_gib=1"])[0].task
    listed = option("experiment", experiment).get("hydra", {}).get("sweeper", {}).get("params", {})
    first = {key: str(values).partition(",")[0] for key, values in listed.items() if key not in ("network", "mode")}
    tiny = [f"{key}={value}" for key, value in (first | TINY).items()]
    if getattr(task, "largest_batch", False):
        assert cli.main([*tiny, "task=max-batch", *OF_TASK["max-batch"]]) == 0
    assert cli.main([f"experiment={experiment}", *tiny, *OF_TASK[task.name], "-m"]) == 0
    found = [record for record in records.collect(Path("results")) if record.task == task.name]
    assert found and not any(record.failure for record in found)
