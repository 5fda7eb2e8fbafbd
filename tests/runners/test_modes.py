"""Each mode's file means what the table of training/network.py says, and gives the layers that do it."""

import pytest

from blpa.codec import Codec
from blpa.kernels.automatic import AUTOMATIC
from blpa.kernels.compiled import COMPILED
from blpa.layers import CodedLayers, Layers, StockLayers
from runners.config import ModeConfig, options
from runners.option_files import mode
from runners.training import network
from runners.training.network import EPS

STOCK = StockLayers(eps=EPS)
MODES: dict[str, tuple[ModeConfig, Layers]] = {
    "exact": (ModeConfig(layers="stock"), STOCK),
    "fewer-features": (ModeConfig(layers="stock", width_factor=0.25), STOCK),
    "naive-8bit": (
        ModeConfig(layers="coded", bits=8, forward_from_code=True),
        CodedLayers(codec=Codec(8), forward_from_code=True, eps=EPS),
    ),
    "8bit": (ModeConfig(layers="coded", bits=8), CodedLayers(codec=Codec(8), eps=EPS)),
    "4bit": (ModeConfig(layers="coded", bits=4), CodedLayers(codec=Codec(4), eps=EPS)),
    "4bit-pool": (
        ModeConfig(layers="coded", bits=4, codes_max_pool=True),
        CodedLayers(codec=Codec(4), codes_max_pool=True, eps=EPS),
    ),
    "2bit": (ModeConfig(layers="coded", bits=2, clip=1.7), CodedLayers(codec=Codec(2, clip=1.7), eps=EPS)),
    "exact-one-copy": (ModeConfig(layers="coded"), CodedLayers(codec=None, eps=EPS)),
    "checkpoint": (ModeConfig(layers="checkpoint"), STOCK),
    "offload": (ModeConfig(layers="offload"), STOCK),
    "compiled": (ModeConfig(layers="compiled"), STOCK),
    "compiled-budget-0.5": (ModeConfig(layers="compiled", activation_memory_budget=0.5), STOCK),
    "compiled-budget-0.2": (ModeConfig(layers="compiled", activation_memory_budget=0.2), STOCK),
    "compiled-fp8": (ModeConfig(layers="compiled", fp8=True), STOCK),
}


def test_these_are_all_modes() -> None:
    assert sorted(MODES) == options("mode")


@pytest.mark.parametrize("name", MODES)
def test_file_describes_the_mode_and_its_layers(name: str) -> None:
    described, layers = MODES[name]
    described.name = name
    assert mode(name) == described
    assert network.layers(described, AUTOMATIC) == layers


def test_layers_compute_on_the_backend_that_was_chosen() -> None:
    layers = network.layers(mode("4bit"), COMPILED)
    assert layers.batch_norm_relu(8).kernels is layers.last_batch_norm_relu(8).kernels is COMPILED


@pytest.mark.parametrize(("bits", "clip"), [(3, 3.0), (4, 0.0)])
def test_code_that_does_not_exist_is_refused(bits: int, clip: float) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        network.layers(ModeConfig(name="mine", layers="coded", bits=bits, clip=clip), AUTOMATIC)
