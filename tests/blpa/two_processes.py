"""What test_processes.py runs in each of two processes: python two_processes.py STORE RANK CHECK."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import blpa
from blpa.convert import is_converted

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
CLASSES = 5


def block(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
    )  # fmt: skip


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        block(3, 8, 1), block(8, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    ).double()  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net


def synced(net: nn.Module, **kwargs: Any) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net), **kwargs)


def backward(net: nn.Module, x: Tensor) -> Tensor:
    """Output; the loss is a sum over samples."""
    out: Tensor = net(x)
    (out.square() * torch.linspace(-1, 1, CLASSES, dtype=out.dtype)).sum().backward()
    return out.detach()


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.detach().requires_grad_()
    out = backward(net, x)
    assert x.grad is not None
    return out, x.grad


def whole(parameter: nn.Parameter) -> Tensor:
    """Gradient of a parameter, not sharded."""
    grad: Any = parameter.grad
    assert grad is not None
    result: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return result


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= bound * expected.norm(), (actual, expected)


def saved_code_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of codes; nothing else that is large may be saved, but the input."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            found[tensor.untyped_storage()._cdata] = tensor.numel()
        elif tensor.untyped_storage()._cdata != x.untyped_storage()._cdata:
            assert tensor.numel() <= 8 * 8 * 9, tensor.shape  # a weight
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
        total = sum(found.values())
    out.sum().backward()
    net.zero_grad()
    return total


# ---- SyncBatchNorm


def sync(rank: int) -> None:
    """Two processes are one with the samples of both.

    fp32 without codes: some roundings of sums of 800 terms. With codes float64: in fp32 another order of a sum may move
    a value over the edge of a bin, and a code is then off by one.
    """
    cases = [
        (torch.float32, None, 1e-5), (torch.float64, None, 1e-10), (torch.float64, 8, 1e-10), (torch.float64, 4, 1e-10)
    ]  # fmt: skip
    for dtype, bits, bound in cases:
        for momentum, first in ((0.1, 4), (None, 5), (0.1, 8)):  # samples of rank 0: half, more, all
            x = IMAGES.to(dtype)
            mine = slice(0, first) if rank == 0 else slice(first, len(x))
            one = network(momentum).to(dtype)
            two = blpa.convert(synced(one), bits)
            if bits is not None:
                blpa.convert(one, bits)
            for _ in range(2 if momentum is None else 1):  # a second step's statistics average two batches
                (out, dx), (expected_out, expected_dx) = step(two, x[mine]), step(one, x)
            assert_near(out, expected_out[mine], bound)
            assert_near(dx, expected_dx[mine], bound)
            for parameter, expected in zip(two.parameters(), one.parameters(), strict=True):
                grad = whole(parameter)
                dist.all_reduce(grad)
                assert_near(grad, whole(expected), bound)
            for buffer, expected_buffer in zip(two.buffers(), one.buffers(), strict=True):
                assert_near(buffer.double(), expected_buffer.double(), bound)
            for net in (one.eval(), two.eval()):
                net.zero_grad()
            assert_near(step(two, x[:4])[1], step(one, x[:4])[1], bound)  # by running statistics, without the other
    sync_saves_codes_alone(rank)
    order_of_calls(rank)


class NormAct(nn.SyncBatchNorm):
    """As timm's: an activation after the norm's own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def sync_saves_codes_alone(rank: int) -> None:
    x = IMAGES.float()
    one = network().float()
    two = blpa.convert(synced(one, process_group=dist.new_group([0, 1])))
    assert saved_code_bytes(two, x) == saved_code_bytes(blpa.convert(copy.deepcopy(one)), x)
    apart = blpa.convert(synced(one, process_group=[dist.new_group([k]) for k in range(2)][rank]))
    out, dx = step(apart, x[rank::2])
    expected, expected_dx = step(blpa.convert(one), x[rank::2])
    assert torch.equal(out, expected)
    assert torch.equal(dx, expected_dx)
    for norm in (NormAct(3), NormAct(3, affine=False), NormAct(3, track_running_stats=False, momentum=None)):
        y = blpa.convert(norm)(x[rank::2].bfloat16().requires_grad_())
        assert y.dtype == torch.bfloat16
        assert "NormBackward" in str(y.grad_fn.next_functions)
        y.sum().backward()


def order_of_calls(rank: int) -> None:
    """Modules that were added after `convert` are PyTorch's own, which refuse a CPU, until it is called again."""
    net = synced(blpa.convert(network()))
    half = IMAGES.chunk(2)[rank]
    try:
        net(half)
    except ValueError as error:
        assert "expected input tensor to be on GPU" in str(error)
    else:
        raise AssertionError
    expected = step(blpa.convert(synced(network())), half)
    assert all(map(torch.equal, step(blpa.convert(net), half), expected))
    explained = blpa.explain(net, half)
    assert explained.coded == blpa.explain(network(), half).coded
    assert explained.stock == blpa.explain(network(), half).stock


# ---- sharded networks


def by_halves(net: nn.Module, images: Tensor = IMAGES) -> Iterator[Tensor]:
    """Mean of two gradients."""
    grads = []
    for half in images.chunk(2):
        one = copy.deepcopy(net)
        backward(one, half)
        grads.append([whole(parameter) for parameter in one.parameters()])
    return ((first + second) / 2 for first, second in zip(*grads, strict=True))


def shard(net: nn.Sequential, *, layers: bool = False, **kwargs: Any) -> nn.Module:
    blocks = [layer for part in net[:2] for layer in part if list(layer.parameters())] if layers else net[:2]
    for part in (*blocks, net):
        fully_shard(part, **kwargs)
    return net


def fsdp(rank: int) -> None:
    """Sharding changes no bit of the gradient, and saves no code more."""
    mesh = init_device_mesh("cpu", (2,))
    half = IMAGES.chunk(2)[rank]
    plain = blpa.convert(network())
    code_bytes = saved_code_bytes(copy.deepcopy(plain), half)
    for options in ({"reshard_after_forward": True}, {"reshard_after_forward": False}, {"layers": True}):
        net = shard(copy.deepcopy(plain), mesh=mesh, **options)
        assert is_converted(net)
        backward(net, half)
        for parameter, expected in zip(net.parameters(), by_halves(plain), strict=True):
            assert torch.equal(whole(parameter), expected)
        assert saved_code_bytes(net, half) == code_bytes
        state: dict[str, Any] = net.state_dict()
        assert state.keys() == plain.state_dict().keys()
        assert all(torch.equal(state[name].full_tensor(), value) for name, value in plain.named_parameters())
    refuses(lambda: blpa.restore(net), "a module became a FSDPSequential after it was converted")
    refuses(lambda: blpa.convert(net), "model is sharded by FSDP: must be a plain module; convert, then shard")
    fsdp_with_sync(rank)
    half_precision(rank)
    tensor_parallel()


def refuses(call: Callable[[], object], words: str) -> None:
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)


def fsdp_with_sync(rank: int) -> None:
    one = blpa.convert(network())
    net = shard(blpa.convert(synced(network())))
    backward(net, IMAGES.chunk(2)[rank])
    backward(one, IMAGES)
    for parameter, expected in zip(net.parameters(), one.parameters(), strict=True):
        assert_near(2 * whole(parameter), whole(expected), 1e-10)


def half_precision(rank: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2)))
    outputs = []
    for converted in (False, True):
        one = copy.deepcopy(net)
        if converted:
            blpa.convert(one, 8)
        for part in (*one, one):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        out = one(torch.linspace(-1, 1, 64 * 16).view(64, 16))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert all(whole(parameter).isfinite().all() for parameter in one.parameters())
        outputs.append(out)
    assert torch.equal(*outputs)


def tensor_parallel() -> None:
    """DTensors are left to PyTorch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32))
    x, expected = torch.randn(64, 16), copy.deepcopy(net)
    parallelize_module(blpa.convert(net, None), init_device_mesh("cpu", (2,)), {"1": ColwiseParallel()})
    net(x)[:, :8].sum().backward()
    for half in expected(x).chunk(2, 1):
        half[:, :8].sum().backward(retain_graph=True)
    for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
        assert_near(whole(parameter), whole(other), 1e-5)


# ---- DistributedDataParallel


def ddp(rank: int) -> None:
    """The gradient is the mean of the halves' gradients, to the bit."""
    half = IMAGES.chunk(2)[rank]
    plain = blpa.convert(network())
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        net = network()
        parallel = DistributedDataParallel(net, **options)
        blpa.convert(net if options else parallel)  # within, or from outside
        backward(parallel, half)
        for parameter, expected in zip(net.parameters(), by_halves(plain), strict=True):
            assert torch.equal(whole(parameter), expected)
    net = copy.deepcopy(plain).eval()  # running statistics would change between the steps
    parallel = DistributedDataParallel(net)
    with parallel.no_sync():
        backward(parallel, half)
    backward(parallel, half)
    for parameter, expected in zip(net.parameters(), by_halves(plain.eval()), strict=True):
        assert torch.equal(whole(parameter), 2 * expected)


def run(checks: dict[str, Callable[[int], None]]) -> None:
    """Run the check that the command line names, in a group of two."""
    _, store, number, check = sys.argv
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method="file://" + store, rank=int(number), world_size=2, timeout=timedelta(minutes=2)
    )
    checks[check](int(number))
    dist.barrier()  # a process that ends closes what the other may still read from
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # all checks have passed; PyTorch's threads may still run, and it sometimes aborts at its own exit


if __name__ == "__main__":
    run({"sync": sync, "fsdp": fsdp, "ddp": ddp})
