"""What `import blpa` gives, and what it needs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import blpa

OTHERS = ("triton", "hydra", "omegaconf", "pandas", "matplotlib", "jinja2", "tqdm", "torchvision", "sklearn", "runners")


def test_every_public_name_is_there_and_is_named_once() -> None:
    assert len(set(blpa.__all__)) == len(blpa.__all__)
    assert all(hasattr(blpa, name) for name in blpa.__all__)


def test_import_needs_torch_only() -> None:
    """Where the other packages are not installed: their names cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OTHERS}))\n"
        "import blpa\n"
        "blpa.PreActResNet(11, layers=blpa.CodedLayers(), classes=10)\n"
        "print(blpa.__version__, 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"{blpa.__version__} False\n"


@pytest.mark.parametrize("layers", [blpa.StockLayers(), blpa.CodedLayers()], ids=str)
def test_a_network_trains_by_the_public_names_alone(layers: blpa.StockLayers | blpa.CodedLayers) -> None:
    network = blpa.PreActResNet(11, layers=layers, classes=10, width=0.25)
    F.cross_entropy(network(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.device("meta"):
        network = blpa.PreActResNet(11, layers=layers, classes=10)
        counted = blpa.memory.training_bytes(network, torch.empty(2, 3, 32, 32), torch.empty(2, dtype=torch.int64))
    assert counted.total_bytes > counted.step.peak_bytes > 0
    assert blpa.kernels.choose("torch", torch.device("cpu")).name == "torch"
