"""The examples run as they are printed, on fewer and smaller images."""

from pathlib import Path

import pytest
import torch

import runners

EXAMPLES = Path(runners.__file__).parent / "examples"


def test_fine_tuning_without_a_network_starts_from_random_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    source = (EXAMPLES / "finetune_resnet50.py").read_text()
    assert len(source.splitlines()) < 40
    small = source.replace("STEPS, BATCH, SIZE = 60, 32, 64", "STEPS, BATCH, SIZE = 1, 8, 32")
    assert small != source
    torch.manual_seed(0)
    exec(compile(small, "finetune_resnet50.py", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert "random weights, since there is no network (no route to host)" in printed
    assert printed.count("ResNet, 4 bits, input [8, 3, 32, 32] float32") == 2
    assert "relative error of the gradient" in printed
    assert "test error" in printed
