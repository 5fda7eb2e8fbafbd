"""blpa/kernels/triton_ops.py against the reference: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support import (
    CHANNELS,
    CODECS,
    EPS,
    KernelInputs,
    assert_backward_is_the_references,
    assert_stats_are_accurate,
    assert_the_means_of_others_reach_dx,
    kernel_inputs,
)
from torch import Tensor

from blpa import memory
from blpa.codec import Codec
from blpa.kernels import RunningStats
from blpa.kernels.reference import REFERENCE
from blpa.layers import CodedLayers
from blpa.models.preact_resnet import PreActResNet

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA: it is not installed")
tl = pytest.importorskip("triton.language")
from blpa.kernels import triton_ops  # noqa: E402
from blpa.kernels.triton_ops import TRITON  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 17), (64, 16), (67, 5)]  # the interpreter takes some 20 ms for a tile
if DEVICE.type == "cuda":  # whole tiles too, enough of them that every loop runs more than once
    SHAPES += [(1, 5), (2, 3), (130, 1), (259, 5), (300_001, 16), (70_001, 130)]
SMALL_TILES = {"TILE_ELEMENTS": 64, "SUM_TILE_ELEMENTS": 128, "TILE_CHANNELS": 4, "PROGRAMS": 2}
SHAPES_OF_SMALL_TILES = [(1, 1), (3, 5), (67, 5)]

all_codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_small_tiles = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="there large activations make the loops turn; every size of a tile costs compiling"
)
"""In tiles so small that every loop runs more than once; of one dtype, which decides what a tile loads and stores."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors come full of NaN or 0xFF, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # training unsets it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SMALL_TILES.items():
        monkeypatch.setattr(triton_ops, name, size)


def on_device(i: KernelInputs) -> KernelInputs:
    return KernelInputs(*(tensor.to(DEVICE) for tensor in i))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest, as a GPU does; Triton's interpreter rounds to bfloat16 towards zero."""
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def assert_activations_are_the_references(
    shapes: list[tuple[int, int]], codec: Codec | None, dtype: torch.dtype
) -> None:
    """To the bit, as are the codes and what is decoded."""
    for shape in shapes:
        i = on_device(kernel_inputs(shape, codec, dtype))
        expected, out, in_place = torch.empty_like(i.x, dtype=torch.float32), torch.empty_like(i.x), i.x.clone()
        expected_codes = REFERENCE.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=expected)
        for x, to in ((i.x, out), (in_place, in_place)):
            codes = TRITON.normalise_rectify_encode(x, i.vectors, codec=codec, out=to)
            assert torch.equal(to, rounded(expected, dtype))
            assert codes is expected_codes is None or torch.equal(codes, expected_codes)
        REFERENCE.decode(i.saved, i.vectors, codec=codec, out=expected)
        TRITON.decode(i.saved, i.vectors, codec=codec, out=out)
        assert torch.equal(out, rounded(expected, dtype))


@all_codecs
@all_dtypes
def test_activations_and_codes_are_the_references_to_the_bit(codec: Codec | None, dtype: torch.dtype) -> None:
    assert_activations_are_the_references(SHAPES, codec, dtype)


@all_codecs
@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
def test_activations_of_small_tiles_are_the_references(codec: Codec | None) -> None:
    assert_activations_are_the_references(SHAPES_OF_SMALL_TILES, codec, torch.float32)


@all_codecs
@all_dtypes
@pytest.mark.parametrize("constant_stats", [False, True])
def test_backward_is_the_references(codec: Codec | None, dtype: torch.dtype, constant_stats: bool) -> None:
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds to bfloat16 towards zero")
    for shape in SHAPES:
        for adds in (False, True):
            i = on_device(kernel_inputs(shape, codec, dtype))
            assert_backward_is_the_references(TRITON, i, codec, constant_stats, adds=adds)


@all_codecs
@pytest.mark.parametrize("constant_stats", [False, True])
@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
def test_backward_of_small_tiles_is_the_references(codec: Codec | None, constant_stats: bool) -> None:
    for shape in SHAPES_OF_SMALL_TILES:
        i = kernel_inputs(shape, codec, torch.float32)
        assert_backward_is_the_references(TRITON, i, codec, constant_stats, adds=constant_stats)


@all_codecs
@all_dtypes
def test_backward_takes_the_means_of_others(codec: Codec | None, dtype: torch.dtype) -> None:
    assert_the_means_of_others_reach_dx(TRITON, on_device(kernel_inputs((67, 5), codec, dtype)), codec)


@all_codecs
@all_dtypes
def test_a_pointwise_weight_gradient_is_the_product_with_the_decoded_activation(
    codec: Codec | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each factor is the reference's to the bit, so only the rounding of sums differs.

    Sums of m products round by m 2^-24 of the sum of their sizes at most, in either order; on a GPU float32 factors are
    cut to tf32 besides, each by 2^-10 at most. 16-bit factors have products that float32 holds whole.
    """
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as whole numbers")
    monkeypatch.setattr(triton_ops, "PROGRAMS", 2)  # so that a program goes through several tiles
    for (rows, channels), outputs in (((1, 5), 3), ((130, 16), 64), ((259, 70), 20), ((64, 16), 16)):
        i = on_device(kernel_inputs((rows, channels), codec, dtype))
        grad = torch.randn(rows, outputs, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        a = torch.empty_like(i.x)
        TRITON.decode(i.saved, i.vectors, codec=codec, out=a)
        actual = TRITON.pointwise_weight_grad(grad, i.saved, i.vectors, codec=codec)
        assert actual is not None
        assert actual.dtype == torch.float32
        expected, sizes = grad.double().T @ a.double(), grad.double().abs().T @ a.double().abs()
        is_cut = DEVICE.type == "cuda" and dtype == torch.float32
        bound = rows * 2.0**-24 + (2.0**-9 if is_cut else 0)
        assert ((actual - expected).abs() <= bound * sizes).all()


def test_a_weight_gradient_that_products_would_be_better_for_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    i = on_device(kernel_inputs((64, 16), Codec(4), torch.float32))
    wide = torch.ones(64, triton_ops.PRODUCT_ELEMENTS // 16 + 1, device=DEVICE)
    assert TRITON.pointwise_weight_grad(wide, i.saved, i.vectors, codec=Codec(4)) is None
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(conv=SimpleNamespace(fp32_precision="ieee")))
    assert TRITON.pointwise_weight_grad(i.grad, i.saved, i.vectors, codec=Codec(4)) is None
    assert TRITON.pointwise_weight_grad(i.grad.half(), i.saved, i.vectors, codec=Codec(4)) is not None


@pytest.mark.parametrize("channel", CHANNELS)
def test_channel_stats_are_accurate(channel: str) -> None:
    mean, deviation = CHANNELS[channel]
    for shape in ((1, 1), (2, 3), (63, 16), (259, 5)):
        x = mean + deviation * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        assert_stats_are_accurate(TRITON, x.to(DEVICE))


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("channel", CHANNELS)
def test_channel_stats_of_small_tiles_are_accurate(channel: str) -> None:
    mean, deviation = CHANNELS[channel]
    x = mean + deviation * torch.randn(131, 5, generator=torch.Generator().manual_seed(0))
    assert_stats_are_accurate(TRITON, x)


def with_an_outlier(row: int) -> Tensor:
    x = torch.randn(130, 3, generator=torch.Generator().manual_seed(row))
    x[row] = 1e5
    return x.to(DEVICE)


@pytest.mark.parametrize("row", [0, 1, 64, 129])
def test_one_outlier_spoils_no_statistics(row: int) -> None:
    assert_stats_are_accurate(TRITON, with_an_outlier(row))


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("row", [0, 1, 64, 129])
def test_one_outlier_in_small_tiles_spoils_no_statistics(row: int) -> None:
    assert_stats_are_accurate(TRITON, with_an_outlier(row))


def assert_a_sum_has_the_bits_of_either_alone(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    for shape in shapes:
        i = on_device(kernel_inputs(shape, None, dtype))
        x, expected = i.x.clone(), i.x + i.grad
        vectors = TRITON.channel_stats(x, i.norm.gamma, i.norm.beta, eps=EPS, codec=None, add=i.grad)
        assert torch.equal(x, expected)
        assert torch.equal(vectors, TRITON.channel_stats(x, i.norm.gamma, i.norm.beta, eps=EPS, codec=None))


@all_dtypes
def test_a_sum_and_its_statistics_have_the_bits_of_either_alone(dtype: torch.dtype) -> None:
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds to bfloat16 towards zero")
    assert_a_sum_has_the_bits_of_either_alone(SHAPES, dtype)


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
def test_a_sum_in_small_tiles_has_the_bits_of_either_alone() -> None:
    assert_a_sum_has_the_bits_of_either_alone(SHAPES_OF_SMALL_TILES, torch.float32)


def assert_a_counter_is_zero_again_and_changes_no_bit() -> None:
    i = on_device(kernel_inputs((67, 5), Codec(4), torch.float32))
    counter = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    results = []
    for given in (None, counter, counter):
        out = torch.empty_like(i.x)
        vectors = TRITON.channel_stats(i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=Codec(4), counter=given)
        sums = TRITON.backward(
            i.grad, i.saved, i.vectors, codec=Codec(4), constant_stats=False, out=out, counter=given
        )  # fmt: skip
        results.append((vectors, out, sums))
        assert not counter.any()
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_a_counter_is_zero_again_and_changes_no_bit() -> None:
    assert_a_counter_is_zero_again_and_changes_no_bit()


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
def test_a_counter_of_several_programs_is_zero_again_and_changes_no_bit() -> None:
    assert_a_counter_is_zero_again_and_changes_no_bit()


@all_codecs
def test_the_grid_is_the_references_also_where_gamma_is_zero_and_the_edge_between_two_bins(codec: Codec | None) -> None:
    clip = codec.bin_width if codec else 0.375
    gamma = torch.tensor([0.0, 0.0, -0.0, 1.0, 1.0, -1.0, 1e-6, 1e6, 2.0], device=DEVICE)
    beta = torch.tensor([0.0, 1.0, -1.0, 0.5 * clip, 1.5 * clip, -2.5 * clip, 1e6, 1e-6, 0.49999997 * 2 * clip],
                        device=DEVICE)  # fmt: skip
    x = torch.randn(5, len(gamma), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    actual, expected = (k.channel_stats(x, gamma, beta, eps=EPS, codec=codec) for k in (TRITON, REFERENCE))
    assert torch.equal(actual[3:], expected[3:])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_averages_move_as_the_references(momentum: float, dtype: torch.dtype) -> None:
    i = on_device(kernel_inputs((130, 5), None, torch.float32))
    results = []
    for kernels in (TRITON, REFERENCE):
        batches = torch.tensor(2**40, device=DEVICE)
        running_stats = RunningStats(
            torch.arange(5.0).to(DEVICE, dtype), torch.ones(5).to(DEVICE, dtype), momentum, batches
        )
        vectors = kernels.channel_stats(
            i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=None, running_stats=running_stats
        )
        results.append(torch.stack(running_stats[:2]).float())
        assert batches == 2**40 + 1
        if momentum == 1 and dtype == torch.float32:
            assert torch.equal(results[-1], torch.stack([vectors[0], vectors[1] * (130 / 129)]))
    # Some roundings to float32, or one to bfloat16, which the interpreter makes in the other direction.
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_a_value_that_is_not_a_number_stays_one() -> None:
    i = on_device(kernel_inputs((130, 5), Codec(4), torch.float32))
    i.x[7, 3] = float("nan")
    TRITON.normalise_rectify_encode(i.x, i.vectors, codec=Codec(4), out=i.x)
    assert i.x.isnan().sum() == 1


@all_codecs
def test_the_same_input_gives_the_same_bits(codec: Codec | None) -> None:
    rows = 300_000 if DEVICE.type == "cuda" else 67
    i = on_device(kernel_inputs((rows, 17), codec, torch.float32))
    results = []
    for _ in range(3):
        out = torch.empty_like(i.grad)
        sums = TRITON.backward(i.grad, i.saved, i.vectors, codec=codec, constant_stats=False, out=out)
        vectors = TRITON.channel_stats(i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=codec)
        results.append((sums, out, vectors))
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_float64_is_refused() -> None:
    i = on_device(kernel_inputs((2, 3), None))
    with pytest.raises(ValueError, match=r"kernels = triton: computes in float32, not float64; use"):
        TRITON.channel_stats(i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=None)


@triton.jit
def _offsets_of_the_last_tile(offsets, byte_offsets, M, C, R, program, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    _, offset, _, byte_offset, _ = triton_ops._tile(program, 0, M, C, R, 2, ROWS, CHANNELS)
    local = tl.arange(0, ROWS)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    block = tl.arange(0, 2)[:, None, None]
    tl.store(offsets + block * (ROWS * CHANNELS) + local[None, :, :], offset)
    tl.store(byte_offsets + local, byte_offset)


def test_offsets_beyond_two_to_the_31_are_right() -> None:
    rows, channels, tile_rows = 3 * 2**29, 16, 8
    packed_rows, first = rows // 2, rows // 2 - tile_rows
    offsets = torch.empty(2, tile_rows, channels, dtype=torch.int64, device=DEVICE)
    byte_offsets = torch.empty(tile_rows, channels, dtype=torch.int64, device=DEVICE)
    _offsets_of_the_last_tile[(1,)](
        offsets, byte_offsets, rows, channels, packed_rows, first // tile_rows, ROWS=tile_rows, CHANNELS=channels
    )
    tile = torch.arange(tile_rows * channels, device=DEVICE).view(tile_rows, channels)
    assert torch.equal(byte_offsets, first * channels + tile)
    assert torch.equal(offsets, torch.stack([byte_offsets, packed_rows * channels + byte_offsets]))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU with 30 GiB")
def test_an_activation_of_more_than_two_to_the_31_elements() -> None:
    """Its last rows are those of a small activation that ends alike."""
    codec, channels, few = Codec(4), 16, 1024
    rows = 2**27 + 2**26 + 2 * few
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of the GPU")
    small = on_device(kernel_inputs((2 * few, channels), codec, torch.bfloat16))
    x = torch.zeros(rows, channels, dtype=torch.bfloat16, device=DEVICE)
    packed = codec.packed_rows(rows)
    x[packed - few : packed], x[-few:] = small.x[:few], small.x[few:]
    codes = TRITON.normalise_rectify_encode(x, small.vectors, codec=codec, out=x)
    a, expected = torch.empty_like(small.x), torch.empty_like(small.x)
    small_codes = TRITON.normalise_rectify_encode(small.x, small.vectors, codec=codec, out=a)
    assert torch.equal(codes[-few:], small_codes)
    assert torch.equal(torch.cat([x[packed - few : packed], x[-few:]]), a)
    TRITON.decode(small_codes, small.vectors, codec=codec, out=expected)
    TRITON.decode(codes, small.vectors, codec=codec, out=x)
    assert torch.equal(torch.cat([x[packed - few : packed], x[-few:]]), expected)
    x[packed - few : packed], x[-few:] = small.grad[:few], small.grad[few:]
    TRITON.backward(x, codes, small.vectors, codec=codec, constant_stats=True, out=x)
    TRITON.backward(small.grad, small_codes, small.vectors, codec=codec, constant_stats=True, out=expected)
    assert torch.equal(torch.cat([x[packed - few : packed], x[-few:]]), expected)


def _all_four(x: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    codec, a, dx = Codec(4), torch.empty_like(x), torch.empty_like(x)
    vectors = TRITON.channel_stats(x, gamma, beta, eps=EPS, codec=codec)
    codes = TRITON.normalise_rectify_encode(x, vectors, codec=codec, out=a)
    assert codes is not None
    sums = TRITON.backward(grad, codes, vectors, codec=codec, constant_stats=False, out=dx)
    TRITON.decode(codes, vectors, codec=codec, out=a)
    return a, dx, sums


def test_compile_and_export_see_one_node_a_function() -> None:
    i = on_device(kernel_inputs((130, 5), Codec(4), torch.float32))
    arguments = i.x, i.grad, i.norm.gamma, i.norm.beta
    expected = _all_four(*arguments)
    graphs = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    assert all(map(torch.equal, torch.compile(_all_four, backend=look, fullgraph=True)(*arguments), expected))
    assert all(map(torch.equal, torch.compile(_all_four, backend="aot_eager", fullgraph=True)(*arguments), expected))

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return _all_four(*tensors)

    exported = torch.export.export(Module(), arguments)
    assert all(map(torch.equal, exported.module()(*arguments), expected))
    names = {"channel_stats", "normalise_rectify_encode", "backward", "decode"}
    for graph in (graphs[0], exported.graph_module):
        targets = [str(node.target) for node in graph.graph.nodes]
        assert {name for name in names for target in targets if f"blpa.{name}" in target} == names


def test_the_operations_keep_their_promises_to_torch_library() -> None:
    i = on_device(kernel_inputs((13, 5), Codec(4), torch.float32))
    mean, var, gamma, beta, *_ = i.vectors
    sums, codes = torch.empty(4, 5, device=DEVICE), torch.empty_like(i.saved)
    batches, counter = torch.tensor(0, device=DEVICE), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        triton_ops.channel_stats,
        (i.x, gamma, beta, i.vectors.clone(), counter, mean.clone(), var.clone(), batches, 0.1, EPS, 0.375, 16),
    )
    torch.library.opcheck(
        triton_ops.add_channel_stats,
        (i.x.clone(), i.grad, gamma, beta, i.vectors.clone(), None, None, None, None, 0.0, EPS, 0.375, 16),
    )
    without = (i.x, gamma, beta, i.vectors.clone(), None, None, None, None, 0.0, EPS, 0.0, 0)
    torch.library.opcheck(triton_ops.channel_stats, without)
    torch.library.opcheck(triton_ops.normalise_rectify_encode, (i.x, i.vectors, torch.empty_like(i.x), codes, 4))
    torch.library.opcheck(triton_ops.decode, (i.saved, i.vectors, torch.empty_like(i.x), 4))
    torch.library.opcheck(
        triton_ops.backward, (i.grad, i.saved, i.vectors, counter, torch.empty_like(i.x), sums, None, 4, False)
    )
    partial = torch.empty(1, 5, 5, device=DEVICE)
    torch.library.opcheck(triton_ops.pointwise_weight_grad, (i.grad, i.saved, i.vectors, partial, 4, 1))


def test_the_meta_device_counts_what_it_counts_of_the_reference() -> None:
    counted = []
    for kernels in (TRITON, REFERENCE):
        with torch.device("meta"):
            model = PreActResNet(11, layers=CodedLayers(kernels=kernels, eps=EPS), classes=10)
            images, labels = torch.empty(8, 3, 32, 32), torch.empty(8, dtype=torch.int64)
            counted.append(memory.step_bytes(model, images, labels))
    assert counted[0].forward_bytes == counted[1].forward_bytes
    # The sums have two rows more, the means; nothing else lives longer or is larger than the reference's.
    assert counted[0].peak_bytes <= counted[1].peak_bytes


def test_a_network_s_gradients_are_the_references() -> None:
    gradients = []
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for kernels in (TRITON, REFERENCE):
        torch.manual_seed(0)
        model = PreActResNet(11, layers=CodedLayers(kernels=kernels, eps=EPS), classes=10, width=0.25)
        model = model.to(DEVICE, memory_format=torch.channels_last)
        model(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        # Statistics differ in their last bits, and so do codes next to an edge; a single one moves a gradient little.
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-6
