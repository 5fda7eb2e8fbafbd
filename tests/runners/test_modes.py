"""Each mode's file means what METHOD's table says, and gives the layers that do it."""

from collections.abc import Callable

import pytest

from blpa.codec import Code
from blpa.compiling import Compiler
from blpa.kernels.compiled import COMPILED
from blpa.kernels.reference import REFERENCE
from blpa.layers import BatchNormReLU, Conv2d, StockBatchNormReLU, StockConv2d
from blpa.modes import EPS, Mode, from_config
from runners.config import ModeConfig, options

MODES = {
    "exact": Mode(),
    "fewer-features": Mode(width_factor=0.25),
    "naive-8bit": Mode("coded", Code(8), forward_from_code=True),
    "8bit": Mode("coded", Code(8)),
    "4bit": Mode("coded", Code(4)),
    "2bit": Mode("coded", Code(2, clip=1.7)),
    "exact-one-copy": Mode("coded", None),
    "checkpoint": Mode("checkpoint"),
    "offload": Mode("offload"),
    "compiled": Mode("compiled", compiler=Compiler()),
    "compiled-budget-0.5": Mode("compiled", compiler=Compiler(activation_memory_budget=0.5)),
    "compiled-budget-0.2": Mode("compiled", compiler=Compiler(activation_memory_budget=0.2)),
    "compiled-fp8": Mode("compiled", compiler=Compiler(fp8=True)),
}
all_modes = pytest.mark.parametrize("name", MODES)


def test_these_are_all_modes() -> None:
    assert sorted(MODES) == options("mode")


@all_modes
def test_file_describes_the_mode(name: str, mode: Callable[[str], Mode]) -> None:
    assert mode(name) == MODES[name]


@all_modes
def test_layers_are_of_the_modes_kind(name: str) -> None:
    mode = MODES[name]
    coded = mode.layers == "coded"
    for unit in (mode.batch_norm_relu(8), mode.last_batch_norm_relu(8)):
        assert type(unit) is (BatchNormReLU if coded else StockBatchNormReLU)
        assert (unit.num_features, unit.eps, unit.momentum) == (8, EPS, 0.1)
    conv = mode.conv2d(8, 4, 3, stride=2)
    assert type(conv) is (Conv2d if coded else StockConv2d)
    assert (conv.in_channels, conv.out_channels, conv.stride, conv.padding) == (8, 4, (2, 2), (1, 1))
    assert conv.bias is None


@pytest.mark.parametrize("name", ["8bit", "4bit", "2bit", "exact-one-copy"])
def test_last_unit_keeps_no_code(name: str) -> None:
    """No convolution reads it: its code would be made only to be decoded at once."""
    assert MODES[name].batch_norm_relu(8).code == MODES[name].code
    assert MODES[name].last_batch_norm_relu(8).code is None


def test_last_unit_of_the_naive_mode_is_naive_too() -> None:
    unit = MODES["naive-8bit"].last_batch_norm_relu(8)
    assert unit.code == Code(8)
    assert unit.forward_from_code


@pytest.mark.parametrize("kernels", [REFERENCE, COMPILED], ids=lambda kernels: kernels.name)
def test_units_run_on_the_back_end_that_was_chosen(kernels: object, mode: Callable[..., Mode]) -> None:
    four_bits = mode("4bit", kernels)
    assert four_bits.batch_norm_relu(8).kernels is four_bits.last_batch_norm_relu(8).kernels is kernels


def test_segments_are_handed_on() -> None:
    assert from_config(ModeConfig(name="mine", layers="checkpoint", segments=5), REFERENCE).segments == 5


@pytest.mark.parametrize(("bits", "clip"), [(3, 3.0), (4, 0.0)])
def test_code_that_does_not_exist_is_refused(bits: int, clip: float) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        from_config(ModeConfig(name="mine", layers="coded", bits=bits, clip=clip), REFERENCE)
