"""A mode: which layers a model is made of, which code they keep, and how wide they are.

    mode            layers      kept for the backward pass, one unit         width
    exact           stock       batch norm's input and ReLU's output         1
    fewer-features  stock       the same                                     1/4
    naive-8bit      coded       8-bit codes, fed forward as well             1
    8bit 4bit 2bit  coded       the codes                                    1
    exact-one-copy  coded       one full-precision tensor                    1
    checkpoint      checkpoint  nothing inside a segment of blocks           1
    offload         offload     the same as exact, in the host's memory      1
    compiled        compiled    what torch.compile chooses                   1
    compiled-...    compiled    the same within a budget, or in 8 bits       1

The names and their values are the files of conf/mode.
"""

from dataclasses import dataclass, replace

from blpa.codec import Code
from blpa.compiling import Compiler
from blpa.kernels import Kernels
from blpa.kernels.reference import REFERENCE
from blpa.layers import BatchNormReLU, Conv2d, StockBatchNormReLU, StockConv2d
from runners.config import ModeConfig

EPS = 1e-3  # the paper's, in every mode


@dataclass(frozen=True)
class Mode:
    """What a model asks when it is built.

    Args:
        layers: stock, coded, checkpoint, offload or compiled.
        code: what coded layers keep; None keeps one full-precision tensor a unit.
        forward_from_code: whether coded layers feed the decoded activation forward.
        width_factor: factor on every channel count, on top of the model's own.
        segments: checkpointed segments of the network; None takes the square root of the number of blocks.
        compiler: what compiles each block of compiled layers.
        kernels: back end of coded layers.
    """

    layers: str = "stock"
    code: Code | None = None
    forward_from_code: bool = False
    width_factor: float = 1.0
    segments: int | None = None
    compiler: Compiler | None = None
    kernels: Kernels = REFERENCE

    def batch_norm_relu(self, channels: int) -> BatchNormReLU | StockBatchNormReLU:
        """A unit's batch norm and ReLU: x -> Activation."""
        if self.layers != "coded":
            return StockBatchNormReLU(channels, eps=EPS)
        return BatchNormReLU(
            channels, eps=EPS, code=self.code, forward_from_code=self.forward_from_code, kernels=self.kernels
        )

    def last_batch_norm_relu(self, channels: int) -> BatchNormReLU | StockBatchNormReLU:
        """The network's last one, read by no convolution: x -> Activation.

        Its backward pass is the first to run, so a code would be made only to be decoded at once: it keeps its input.
        """
        return replace(self, code=self.code if self.forward_from_code else None).batch_norm_relu(channels)

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> Conv2d | StockConv2d:
        """A unit's convolution, padded by half its kernel: Activation -> out."""
        layer = Conv2d if self.layers == "coded" else StockConv2d
        return layer(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


def from_config(config: ModeConfig, kernels: Kernels) -> Mode:
    """The mode that the configuration describes.

    Raises:
        ValueError: bits or clip for which there is no code.
    """
    return Mode(
        layers=config.layers,
        code=None if config.bits is None else Code(config.bits, config.clip),
        forward_from_code=config.forward_from_code,
        width_factor=config.width_factor,
        segments=config.segments,
        compiler=Compiler(config.activation_memory_budget, config.fp8) if config.layers == "compiled" else None,
        kernels=kernels,
    )
