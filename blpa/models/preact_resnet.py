"""Pre-activation ResNets of bottleneck blocks for CIFAR-size images (He et al. 2016, "Identity Mappings").

    stem      3x3 convolution, 16 channels
    3 groups  n blocks each, c = 16, 32, 64; the first block of groups 2 and 3 halves height and width
    block     x + conv1x1(4c) . relu . bn . conv3x3(c) . relu . bn . conv1x1(c) . relu . bn (x)
    head      batch norm, ReLU, average over the image, linear

depth = 9 n + 2. The first block's shortcut starts after its first batch norm and ReLU. Difference from He et al.:
shortcuts have no parameters, only average pooling by the stride and zero channels, equally many on both sides.
"""

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from blpa.layers import Activation, Layers, ResidualSum, check_has_relu
from blpa.ops import average_pool

STEM_CHANNELS = 16
GROUP_CHANNELS = (16, 32, 64)
EXPANSION = 4


class Bottleneck(nn.Module):
    """One block: 1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU, added to the shortcut.

    Args:
        in_channels: channels of x.
        channels: channels c inside; the output has 4 c.
        stride: of the first convolution and the shortcut.
        layers: factory of the layers.
        shortcut_from_activation: the shortcut starts after the first batch norm and ReLU, not at x.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, layers: Layers, *, shortcut_from_activation: bool = False
    ) -> None:
        super().__init__()
        self.bn1 = layers.batch_norm_relu(in_channels)
        self.conv1 = layers.conv2d(in_channels, channels, 1, stride=stride)
        self.bn2 = layers.batch_norm_relu(channels)
        self.conv2 = layers.conv2d(channels, channels, 3)
        self.bn3 = layers.batch_norm_relu(channels)
        self.conv3 = layers.conv2d(channels, EXPANSION * channels, 1)
        self.stride = stride
        self.added_channels = EXPANSION * channels - in_channels
        self.shortcut_from_activation = shortcut_from_activation

    def forward(self, x: Tensor | ResidualSum) -> Tensor | ResidualSum:
        """Compute [N, 4 c, H / stride, W / stride] from [N, C, H, W]; coded layers defer the sum to the next block."""
        # Rebinding names frees memory: no name here outlives the last use of its tensor.
        if self.shortcut_from_activation:
            activation: Activation = self.bn1(x, overwrite_x=True)
            shortcut = self.shortcut(activation.value)
            out = self.conv1(activation)
            del activation
        else:
            out, x = self.conv1.after_with_shortcut(self.bn1, x)
            shortcut = self.shortcut(x)
        out = self.conv2.after(self.bn2, out, overwrite_x=True)
        out = self.conv3.after(self.bn3, out, overwrite_x=True)
        return self.conv3.add_shortcut(out, shortcut)  # no layer saves its output, so the sum overwrites it

    def shortcut(self, x: Tensor) -> Tensor:
        """Pool x and add zero channels, to the shape of the block's output."""
        if self.stride > 1:
            x = average_pool(x, self.stride)
        if self.added_channels:
            before = self.added_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.added_channels - before))
        return x


class PreActResNet(nn.Module):
    """The network of the paper's CIFAR tables.

    Args:
        depth: 9 n + 2 layers.
        layers: factory of the layers, blpa.StockLayers or blpa.CodedLayers, with eps=1e-3 in the paper.
        classes: number of classes.
        image_channels: channels of an image.
        width: factor on every channel count.

    Raises:
        ValueError: depth is not 9 n + 2 with n >= 1, or the narrowest layer would have no channel.

    Source: Chakrabarti and Moseley, section 4; their code for the shortcuts and the initialisation.
    """

    def __init__(
        self, depth: int, *, layers: Layers, classes: int, image_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        blocks_per_group, rest = divmod(depth - 2, 9)
        if rest or blocks_per_group < 1:
            raise ValueError(f"depth = {depth}: must be 9 n + 2 with n >= 1 (11, 20, 29, ..., 164, ...)")
        if round(STEM_CHANNELS * width) < 1:
            raise ValueError(f"width = {width:g}: {STEM_CHANNELS} channels times that is less than one")

        in_channels = round(STEM_CHANNELS * width)
        self.stem = nn.Conv2d(image_channels, in_channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for group, base_channels in enumerate(GROUP_CHANNELS):
            channels = round(base_channels * width)
            for index in range(blocks_per_group):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride, layers, shortcut_from_activation=not blocks))
                in_channels = EXPANSION * channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = layers.last_batch_norm_relu(in_channels)
        self.classifier = nn.Linear(in_channels, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise convolutions N(0, 2 / (k k C_in)), classifier N(0, 1 / C_in), gamma 1, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(1 / module.in_features))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: floating point [N, image_channels, H, W], H and W multiples of 4.

        Returns:
            [N, classes].

        Raises:
            TypeError: the batch norms were replaced by layers without ReLU.
        """
        check_has_relu(self.bn)  # what replaced its layers replaced this one too
        x = self.blocks(self.stem(images))
        activation = self.bn(x, overwrite_x=True).value
        # Average over [N, H, W, C], so that the gradient is channels-last.
        return cast(Tensor, self.classifier(activation.permute(0, 2, 3, 1).mean((1, 2))))
