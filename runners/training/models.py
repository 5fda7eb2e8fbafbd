"""Networks besides the paper's, by name: torchvision's, and a U-Net."""

import copy
import difflib

import torch
import torchvision
from torch import Tensor, nn

from blpa.codec import Codec
from runners.config import Config, ModeConfig
from runners.errors import UserError, first_line


def check(config: Config) -> None:
    """Check the mode, the width and the size of a task on another network.

    Raises:
        UserError: the first mistake.
    """
    check_mode("mode", config.mode)
    if config.width != 1 or config.mode.width_factor != 1:
        raise UserError(f"width={config.width * config.mode.width_factor}: is of the paper's networks; leave it out")
    if config.task.image_size < 1:
        raise UserError(f"task.image_size={config.task.image_size}: must be a number of pixels above 0")


def check_mode(key: str, mode: ModeConfig) -> None:
    """Raise UserError, which names the key, for a mode that is none of `convert`."""
    if mode.bits is None or mode.forward_from_code or mode.name == "exact":
        raise UserError(f"{key}={mode.name}: does not convert a network; choose 8bit, 4bit or 2bit")


def codec(mode: ModeConfig) -> int | Codec | None:
    """Return what `convert` takes for a mode: its bits, and its clip where that is another than the paper's."""
    if mode.bits is None or mode.clip == ModeConfig.clip:
        return mode.bits
    return Codec(mode.bits, mode.clip)


def build(name: str, shape: torch.Size) -> nn.Module:
    """Make a network with random weights.

    Args:
        name: one of torchvision's classifiers, such as resnet50, or unet.
        shape: of its images, [N, 3, H, W].

    Raises:
        UserError: there is no such network, or it does not take such images.
    """
    names = ["unet", *torchvision.models.list_models(module=torchvision.models)]
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names)) or "resnet50"
        raise UserError(f"task.model={name}: must be unet or a classifier of torchvision ({near}, ...)")
    model: nn.Module = UNet() if name == "unet" else torchvision.models.get_model(name, weights=None)
    trial = copy.deepcopy(model).to("meta")
    try:
        with torch.no_grad():
            trial(torch.empty(shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:  # torchvision asserts a transformer's size
        raise UserError(
            f"task.model={name} does not take {shape[0]} images of {shape[-1]} pixels: {first_line(error)}"
        ) from error
    return model


class UNet(nn.Module):
    """The U-Net of Ronneberger, Fischer and Brox (2015) with batch norm: five levels, two classes per pixel."""

    def __init__(self, channels: int = 64, levels: int = 5) -> None:
        super().__init__()
        widths = [channels << level for level in range(levels)]
        self.down = nn.ModuleList(map(_two_convolutions, [3, *widths], widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for wide, narrow in pairs)
        self.merge = nn.ModuleList(_two_convolutions(wide, narrow) for wide, narrow in pairs)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [N, 2, H, W] from images [N, 3, H, W]; H and W are multiples of 16."""
        *skips, bottom = self.down
        skipped = []
        for block in skips:
            x = block(x)
            skipped.append(x)
            x = self.pool(x)
        x = bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skipped.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            layer
            for channels in (inputs, outputs)
            for layer in (
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            )
        )
    )
