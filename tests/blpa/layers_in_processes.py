"""What test_processes.py runs in each of two processes: python layers_in_processes.py STORE RANK; hand-built layers."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import CLASSES, IMAGES, assert_near, backward, by_halves, run, whole

from blpa import BatchNormReLU, Codec, CodedLayers, PreActResNet, StockLayers
from blpa.memory import step_bytes
from blpa.saved import MaxPool

LABELS = torch.arange(8) % CLASSES
LAST = torch.channels_last


class Network(nn.Module):
    """Each way in which layers are put together: pooled, by two readers, fused, with a shortcut, after a sum."""

    units = 5

    def __init__(self, layers: CodedLayers | StockLayers) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = layers.batch_norm_relu_max_pool(8, MaxPool(2, 2, 0)), layers.conv2d(8, 8, 1)
        self.bn2, self.conv2, self.other = layers.batch_norm_relu(8), layers.conv2d(8, 8, 3), layers.conv2d(8, 8, 1)
        self.bn3, self.conv3 = layers.batch_norm_relu(8), layers.conv2d(8, 8, 1)
        self.bn4, self.conv4 = layers.batch_norm_relu(8), layers.conv2d(8, 8, 3)
        self.bn5 = layers.last_batch_norm_relu(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.bn1(self.stem(x), overwrite_x=True))
        activation = self.bn2(x)
        x = self.conv2(activation) + self.other(activation)
        out, x = self.conv3.after_with_shortcut(self.bn3, x)
        out, x = self.conv4.after_with_shortcut(self.bn4, self.conv3.add_shortcut(out, x))
        return self.head(self.bn5(self.conv4.add_shortcut(out, x)).value.mean((2, 3)))


def made(layers: CodedLayers | StockLayers, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    net = Network(layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.to(dtype)


def resnet(**layers: Any) -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet(11, layers=CodedLayers(**layers), classes=CLASSES, width=0.25).double()


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count calls of collectives, by name."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    counts: Counter[str] = Counter()
    functions = {name: getattr(dist, name) for name in (gather, "all_reduce")}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["gather" if name == gather else name] += 1
            return functions[name](*args, **kwargs)

        return call

    for name in functions:
        setattr(dist, name, counted(name))
    try:
        yield counts
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)


# ---- synchronised statistics


def sync(rank: int) -> None:
    """Two processes are one that has the samples of both.

    In float64 only the order of sums differs, of at most 8 x 144 terms: some 1e-15, which a few layers and three steps
    multiply by ten each. A code that fell on the other side of an edge would show as 1e-3; none lies that close. In
    fp32 that would happen, and so it is tried without codes, and for one step: 1e-5 is some tens of roundings.
    """
    for codec in (None, Codec(4), Codec(8)):
        for first in (4, 5):  # samples of rank 0: half of them, and more
            two_are_one(rank, CodedLayers(codec, codes_max_pool=True), torch.float64, first, steps=3, bound=1e-12)
    two_are_one(rank, CodedLayers(None), torch.float32, 4, steps=1, bound=1e-5)
    distributed_data_parallel(rank)
    one_row_each(rank)
    collectives_of_a_step(rank)
    half_precision(rank)


def two_are_one(rank: int, layers: CodedLayers, dtype: torch.dtype, first: int, *, steps: int, bound: float) -> None:
    one, two = made(layers, dtype), made(CodedLayers(layers.codec, codes_max_pool=True, sync=True), dtype)
    mine = slice(0, first) if rank == 0 else slice(first, 8)
    for step in range(steps):
        x = (IMAGES * (1 + step)).to(dtype)
        loss = F.cross_entropy(one(x), LABELS)
        own_loss = F.cross_entropy(two(x[mine]), LABELS[mine], reduction="sum") / 8
        for net, value in ((one, loss), (two, own_loss)):
            net.zero_grad()
            value.backward()
        dist.all_reduce(own_loss := own_loss.detach())
        assert_near(own_loss, loss.detach(), bound)
        for parameter, expected in zip(two.parameters(), one.parameters(), strict=True):
            dist.all_reduce(whole(parameter))
            assert_near(whole(parameter), whole(expected), bound)
        with torch.no_grad():
            for parameter in (*one.parameters(), *two.parameters()):
                parameter.sub_(whole(parameter), alpha=0.1)
        for value, expected in zip(two.state_dict().values(), one.state_dict().values(), strict=True):
            assert_near(value.double(), expected.double(), bound)


def distributed_data_parallel(rank: int) -> None:
    """Which averages what the processes have summed."""
    one, two = resnet(), resnet(sync=True)
    parallel = DistributedDataParallel(two)
    F.cross_entropy(one(IMAGES), LABELS).backward()
    F.cross_entropy(parallel(IMAGES.chunk(2)[rank]), LABELS.chunk(2)[rank]).backward()
    for parameter, expected in zip(two.parameters(), one.parameters(), strict=True):
        assert_near(whole(parameter), whole(expected), 1e-12)


def one_row_each(rank: int) -> None:
    """Together they have statistics."""
    x = IMAGES[:2, :, :1, :1]
    one, two = BatchNormReLU(3).double(), BatchNormReLU(3, sync=True).double()
    assert_near(two(x[rank : rank + 1]).value, one(x).value[rank : rank + 1], 1e-12)
    assert_near(two.running_var, one.running_var, 1e-12)


def collectives_of_a_step(rank: int) -> None:
    """One each way for a batch norm; none in evaluation, among one process, and where bytes are counted."""
    half, layers = IMAGES.chunk(2)[rank], CodedLayers(sync=True)
    net, own = made(layers), made(CodedLayers())
    with collectives() as counts:
        backward(net, half)
        assert counts == {"gather": net.units, "all_reduce": net.units}
        counts.clear()
        for one in (net, own):
            one.load_state_dict(made(layers).state_dict())
            one.zero_grad()
            one.eval()
        outs = [backward(one, half) for one in (net, own)]
        assert_same_gradients(net, own, outs)
        for module in net.train().modules():
            if isinstance(module, BatchNormReLU):
                module.process_group = ALONE[rank]
        outs = [backward(one, half) for one in (net, own.train())]
        assert_same_gradients(net, own, outs)
        images, labels = half.float().to("meta").contiguous(memory_format=LAST), LABELS[:4].to("meta")
        counted = [step_bytes(made(each, torch.float32).to("meta"), images, labels) for each in (layers, CodedLayers())]
        assert counted[0].peak_bytes == counted[1].peak_bytes
        assert not counts


def assert_same_gradients(net: nn.Module, other: nn.Module, outs: list[Tensor]) -> None:
    assert torch.equal(*outs)
    for parameter, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(parameter), whole(expected))


def half_precision(rank: int) -> None:
    """Under autocast: outputs of a bfloat16 are good to 2^-8, after five layers to some of these."""
    one, two = (made(CodedLayers(sync=sync), torch.float32) for sync in (False, True))
    outs = []
    for net, x in ((one, IMAGES), (two, IMAGES.chunk(2)[rank])):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(net(x.float()).float())
        outs[-1].sum().backward()
    assert_near(outs[1], outs[0].chunk(2)[rank], 2**-5)
    assert all(whole(parameter).isfinite().all() for parameter in two.parameters())


# ---- DistributedDataParallel and FSDP2: the gradient is the mean of the halves' gradients, to the bit


def ddp(rank: int) -> None:
    for plain in (made(CodedLayers()), resnet()):
        for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
            net = copy.deepcopy(plain)
            backward(DistributedDataParallel(net, **options), IMAGES.chunk(2)[rank])
            for parameter, expected in zip(net.parameters(), by_halves(plain), strict=True):
                assert torch.equal(whole(parameter), expected)
                assert whole(parameter).stride() == parameter.stride()  # else it warns of copies


def code_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of codes that a forward pass saves."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            found[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(net, x)
    net.zero_grad()
    return sum(found.values())


def fsdp(rank: int) -> None:
    """Channels-last images: with others the first block copies its input, and FSDP's view of it is not at risk."""
    images = IMAGES.contiguous(memory_format=LAST)
    half = images.chunk(2)[rank]
    plain = resnet()
    expected_bytes = code_bytes(copy.deepcopy(plain), half)
    blocks = [f"blocks.{index}" for index in range(len(plain.blocks))]
    layers = [name for name, module in plain.named_modules() if list(module.parameters(recurse=False))]
    for names, reshards in (
        (blocks, True), (blocks, False), (blocks[1::2], True), (layers, True), (["blocks"], True)
    ):  # fmt: skip
        net = copy.deepcopy(plain)
        for name in names:
            fully_shard(net.get_submodule(name), reshard_after_forward=reshards)
        fully_shard(net, reshard_after_forward=reshards)
        backward(net, half)
        for parameter, expected in zip(net.parameters(), by_halves(plain, images), strict=True):
            assert torch.equal(whole(parameter), expected)
        assert code_bytes(net, half) == expected_bytes
    one, net = resnet(), resnet(sync=True)
    for block in (*net.blocks, net):
        fully_shard(block)
    for each, x in ((net, half), (one, IMAGES)):
        backward(each, x)
    for parameter, expected in zip(net.parameters(), one.parameters(), strict=True):
        assert_near(2 * whole(parameter), whole(expected), 1e-12)
    try:
        fully_shard(resnet().to(memory_format=LAST))
    except NotImplementedError as error:
        assert "non-contiguous parameters" in str(error)
    else:
        raise AssertionError("FSDP takes channels-last weights: say so in the README")


def layers(rank: int) -> None:
    ALONE.extend(dist.new_group([k]) for k in range(2))
    sync(rank)
    ddp(rank)
    fsdp(rank)


ALONE: list[Any] = []
"""A group for each process."""

if __name__ == "__main__":
    run({"layers": layers})
