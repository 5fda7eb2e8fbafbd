"""Pre-activation ResNets of bottleneck blocks for images of CIFAR's and of ImageNet's size (He et al. 2016).

               CIFAR                             ImageNet
    stem       3x3 convolution, 16 channels      7x7 convolution with stride 2, 64 channels
    groups     n blocks each, c = 16, 32, 64     3, 4, 6, 3 blocks (depth 50), c = 64, 128, 256, 512
    depth      9 n + 2                           26, 50, 101 or 152

    block      x + conv1x1(4c) . relu . bn . conv3x3(c) . relu . bn . conv1x1(c) . relu . bn (x)
    head       batch norm, ReLU, average over the image, linear

The first block of every group but the first halves height and width. For ImageNet a max pool follows the first batch
norm and ReLU and halves them too. The first block's shortcut starts after these. Difference from He et al.: shortcuts
have no parameters, only average pooling by the stride and zero channels, equally many on both sides.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from blpa.layers import Activation, Layers, ResidualSum, as_tensor, check_has_relu, is_sharded
from blpa.ops import average_pool
from blpa.saved import MaxPool

EXPANSION = 4


class Architecture(NamedTuple):
    """What differs between the networks for images of two sizes."""

    stem_channels: int
    stem_kernel_size: int
    stem_stride: int
    max_pool: MaxPool | None
    """After the first batch norm and ReLU."""
    group_channels: tuple[int, ...]
    """Channels c inside the blocks of each group."""
    groups: Mapping[int, tuple[int, ...]] | None
    """Number of blocks of each group, by depth; None: n each for the depth 9 n + 2."""

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the number of blocks of each group.

        Raises:
            ValueError: there is no network of this depth.
        """
        if self.groups is not None:
            if depth not in self.groups:
                raise ValueError(f"depth = {depth}: must be one of {', '.join(map(str, self.groups))}")
            return self.groups[depth]
        per_group, rest = divmod(depth - 2, 9)
        if rest or per_group < 1:
            raise ValueError(f"depth = {depth}: must be 9 n + 2 with n >= 1 (11, 20, 29, ..., 164, ...)")
        return (per_group,) * len(self.group_channels)


CIFAR = Architecture(16, 3, 1, None, (16, 32, 64), None)
IMAGENET = Architecture(
    64, 7, 2, MaxPool(3, 2, 1), (64, 128, 256, 512),
    {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)},
)  # fmt: skip
ARCHITECTURES = {"cifar": CIFAR, "imagenet": IMAGENET}


class Bottleneck(nn.Module):
    """One block: 1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU, added to the shortcut.

    Args:
        in_channels: channels of x.
        channels: channels c inside; the output has 4 c.
        stride: of the first convolution and the shortcut.
        layers: factory of the layers.
        shortcut_from_activation: the shortcut starts after the first batch norm and ReLU, not at x.
        max_pool: after the first batch norm and ReLU; then the shortcut starts after it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        layers: Layers,
        *,
        shortcut_from_activation: bool = False,
        max_pool: MaxPool | None = None,
    ) -> None:
        super().__init__()
        if max_pool is None:
            self.bn1 = layers.batch_norm_relu(in_channels)
        else:
            self.bn1 = layers.batch_norm_relu_max_pool(in_channels, max_pool)
        self.conv1 = layers.conv2d(in_channels, channels, 1, stride=stride)
        self.bn2 = layers.batch_norm_relu(channels)
        self.conv2 = layers.conv2d(channels, channels, 3)
        self.bn3 = layers.batch_norm_relu(channels)
        self.conv3 = layers.conv2d(channels, EXPANSION * channels, 1)
        self.stride = stride
        self.added_channels = EXPANSION * channels - in_channels
        self.shortcut_from_activation = shortcut_from_activation or max_pool is not None

    def forward(self, x: Tensor | ResidualSum) -> Tensor | ResidualSum:
        """Compute [N, 4 c, H / stride, W / stride] from [N, C, H, W].

        Coded layers defer the sum to the next block, unless FSDP shards this one.
        """
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
        total = self.conv3.add_shortcut(out, shortcut)  # no layer saves its output, so the sum overwrites it
        return as_tensor(total) if is_sharded(self) else total

    def shortcut(self, x: Tensor) -> Tensor:
        """Pool x and add zero channels, to the shape of the block's output."""
        if self.stride > 1:
            x = average_pool(x, self.stride)
        if self.added_channels:
            before = self.added_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.added_channels - before))
        return x


class Blocks(nn.Sequential):
    """Blocks, one after the other, that return a tensor if FSDP shards them as one."""

    def forward(self, x: Tensor) -> Tensor | ResidualSum:  # type: ignore[override]
        """Compute the output of the last block."""
        out: Tensor | ResidualSum = super().forward(x)  # type: ignore[no-untyped-call]
        return as_tensor(out) if is_sharded(self) else out


class PreActResNet(nn.Module):
    """The network of the paper's tables.

    Args:
        depth: number of layers, 9 n + 2 for CIFAR; 26, 50, 101 or 152 for ImageNet.
        layers: factory of the layers, blpa.StockLayers or blpa.CodedLayers, with eps=1e-3 in the paper.
        classes: number of classes.
        image_channels: channels of an image.
        width: factor on every channel count.
        architecture: cifar or imagenet, a key of ARCHITECTURES.

    Raises:
        ValueError: there is no such architecture or depth, or the narrowest layer would have no channel.

    Source: Chakrabarti and Moseley, section 4; their code for the shortcuts and the initialisation. Departure: their
    7x7 convolution pads its image by 2 and 3 pixels and their max pool by 0 and 1; here both sides have the same.
    """

    def __init__(
        self,
        depth: int,
        *,
        layers: Layers,
        classes: int,
        image_channels: int = 3,
        width: float = 1.0,
        architecture: str = "cifar",
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture = {architecture!r}: must be one of {', '.join(ARCHITECTURES)}")
        plan = ARCHITECTURES[architecture]
        blocks_of_groups = plan.blocks(depth)
        if round(plan.stem_channels * width) < 1:
            raise ValueError(f"width = {width:g}: {plan.stem_channels} channels times that is less than one")

        in_channels, kernel_size = round(plan.stem_channels * width), plan.stem_kernel_size
        self.stem = nn.Conv2d(
            image_channels, in_channels, kernel_size, stride=plan.stem_stride, padding=kernel_size // 2, bias=False
        )
        blocks: list[nn.Module] = []
        for group, (count, base_channels) in enumerate(zip(blocks_of_groups, plan.group_channels, strict=True)):
            channels = round(base_channels * width)
            for index in range(count):
                is_first, stride = not blocks, 2 if group > 0 and index == 0 else 1
                block = Bottleneck(
                    in_channels,
                    channels,
                    stride,
                    layers,
                    shortcut_from_activation=is_first,
                    max_pool=plan.max_pool if is_first else None,
                )
                blocks.append(block)
                in_channels = EXPANSION * channels
        self.blocks: nn.Sequential = Blocks(*blocks)
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
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: floating point [N, image_channels, H, W], H and W multiples of 4; of 32 for ImageNet.

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
