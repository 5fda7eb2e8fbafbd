"""The operations of torch.library: their fakes tell the truth, and so do their schemas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blpa.codec import Codec
from blpa.coded.tensors import Coded
from blpa.kernels.library import OPERATIONS

BITS = [8, 4, 2, 0]
LAYOUTS: dict[str, tuple[Tensor, int, bool]] = {
    "images": (torch.randn(4, 6, 5, 7), 1, False),
    "images, channels last": (torch.randn(3, 6, 5, 7).to(memory_format=torch.channels_last), 1, True),
    "strided images": (torch.randn(4, 12, 5, 7)[:, ::2], 1, False),
    "tokens": (torch.randn(3, 11, 6), 2, False),
    "bf16": (torch.randn(4, 6, 5, 7, dtype=torch.bfloat16), 1, False),
    "fp64": (torch.randn(4, 6, 5, 7, dtype=torch.float64), 1, False),
}


def calls(x: Tensor, channel: int, channels_last: bool, bits: int) -> dict[str, tuple[Any, ...]]:
    """Each operation with arguments as a coded network gives it."""
    layout = channel, channels_last, bits
    coded = Coded.of(x, channel, Codec(bits) if bits else None)
    values, vectors = coded.tensors
    stats = OPERATIONS.channel_stats(x, *layout[:2], None, None)
    centre, scale = stats[:2, None].sqrt().nan_to_num_().unbind(0)
    found = {
        "channel_stats": (x, *layout[:2], centre, scale),
        "grid_vectors": (stats, None, None, stats[0], stats[1].sqrt(), bits, None, 0.0),
        "encode_own": (x, *layout, None),
        "encode": (x, x, vectors, *layout, centre, scale),
        "decode": (values, vectors, x.shape, x.dtype, *layout, "", ()),
        "elementwise_grad": (x, values, vectors, *layout, "relu", ()),
        "gradient_sums": (x, values, vectors, *layout, channel == 1, True),
        "input_grad": (x, values, vectors, *layout, scale, None, False),
    }
    if channel == x.dim() - 1:
        found["row_means"] = (x, values, vectors, bits)
    if channel == 1:
        found["batch_stats"] = (x, channels_last, bits == 8)
    if x.dim() == 4:
        mask = x > 0
        windows = (2, 3), (1, 2), (1, 0), (2, 1)
        found["pack_bits"] = (mask,)
        found["pack_between"] = (x, -0.5, 1.0, channels_last)
        found["masked"] = (x, OPERATIONS.pack_between(*found["pack_between"]), channels_last)
        found["unpack_bits"] = (OPERATIONS.pack_bits(mask), x.shape)
        found["max_pool"] = (x, *windows, True)
        maxima, places = OPERATIONS.max_pool(*found["max_pool"])
        found["max_pool_grad"] = (maxima, x, places, *windows, True)
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_operation_does_what_its_schema_and_its_fake_say(name: str, bits: int) -> None:
    x, channel, channels_last = LAYOUTS[name]
    for operation, args in calls(x, channel, channels_last, bits).items():
        torch.library.opcheck(
            getattr(OPERATIONS, operation).default, args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_on_the_meta_device_the_results_are_as_large(name: str, bits: int) -> None:
    x, channel, channels_last = LAYOUTS[name]
    for operation, args in calls(x, channel, channels_last, bits).items():
        result = getattr(OPERATIONS, operation)(*args)
        on_meta = getattr(OPERATIONS, operation)(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        for one, other in zip(tree_leaves(on_meta), tree_leaves(result), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_every_operation_is_tried() -> None:
    tried = {name for x, channel, last in LAYOUTS.values() for name in calls(x, channel, last, 4)}
    assert tried == {
        name
        for name in torch._C._dispatch_get_all_op_names()
        for _, _, name in [name.partition("blpa_any_layout::")]
        if name
    }
