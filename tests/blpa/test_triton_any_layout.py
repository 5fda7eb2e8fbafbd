"""triton_any_layout.py against any_layout.py: on a GPU where there is one, else in Triton's interpreter."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import blpa
from blpa.codec import Codec
from blpa.kernels import RunningStats, any_layout, cpu, library
from blpa.kernels.any_layout import Elementwise
from blpa.kernels.order import Order, dense, empty

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA: it is not installed")
tl = pytest.importorskip("triton.language")
from blpa.kernels import triton_any_layout, triton_elements  # noqa: E402

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS = [8, 4, 2, 0]
LAYOUTS: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "four images": ((4, 3, 5, 7), 1, False),
    "three images": ((3, 2, 4, 4), 1, False),
    "one image": ((1, 2, 7, 9), 1, False),
    "two images, channels last": ((2, 5, 3, 3), 1, True),
    "three images, channels last": ((3, 5, 4, 4), 1, True),
    "tokens": ((1, 7, 70), 2, False),
    "sequences": ((1, 3, 13), 1, False),
}
"""Shape, channel and whether channels are last in memory. Three images share no byte: their pixels do."""
if DEVICE.type == "cuda":  # the interpreter takes some 10 ms for a program
    LAYOUTS |= {
        "many images": ((34, 64, 28, 28), 1, False),
        "many images, channels last": ((34, 96, 28, 28), 1, True),
        "many odd images": ((31, 67, 27, 25), 1, False),
        "one large image, channels last": ((1, 64, 255, 255), 1, True),
        "many tokens": ((31, 197, 768), 2, False),
    }
SMALL_TILES = {
    "TILE_ELEMENTS": 64, "SUM_TILE_ELEMENTS": 32, "TILE_CHANNELS": 2, "ROW_CHANNELS": 2, "TILES_ALONE": 1,
    "PROGRAMS": 4, "VECTOR_CHANNELS": 2,
}  # fmt: skip
FUNCTIONS = [
    Elementwise("relu"), Elementwise("leaky_relu", (0.2,)), Elementwise("hardtanh", (-0.5, 0.7)), Elementwise("silu"),
    Elementwise("gelu"), Elementwise("gelu_tanh"), Elementwise("hardswish"),
]  # fmt: skip

all_bits = pytest.mark.parametrize("bits", BITS)
all_layouts = pytest.mark.parametrize("name", LAYOUTS)
in_small_tiles = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="there large tensors need several programs; every size of a tile costs compiling"
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors come full of NaN or 0xFF, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # training unsets it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that every loop runs more than once and several programs share a sum."""
    computed_once = (triton_any_layout._tiles, triton_any_layout._sum_tiles, triton_any_layout._row_tiles)
    for name, size in SMALL_TILES.items():
        monkeypatch.setattr(triton_any_layout, name, size)
    for function in computed_once:
        function.cache_clear()
    yield
    for function in computed_once:
        function.cache_clear()


class Case(NamedTuple):
    """A normalised activation on the CPU, all that any_layout's functions take."""

    x: Tensor
    y: Tensor
    grad: Tensor
    centre: Tensor
    scale: Tensor
    stats: Tensor
    vectors: Tensor
    values: Tensor
    order: Order
    channels_last: bool

    @staticmethod
    def of(name: str, bits: int, dtype: torch.dtype = torch.float32) -> "Case":
        shape, channel, channels_last = LAYOUTS[name]
        generator = torch.Generator().manual_seed(bits)
        order = Order.of(shape, channel, channels_last)
        view = [order.channels if k == channel else 1 for k in range(len(shape))]
        deviation, mean, gamma, beta = (torch.randn(order.channels, generator=generator) for _ in range(4))
        x = torch.randn(shape, generator=generator) * (0.5 + deviation.abs()).view(view) + 3 * mean.view(view)
        x, grad = (dense(t.to(dtype), channels_last) for t in (x, torch.randn(shape, generator=generator)))
        stats = any_layout.channel_stats(x, order)
        centre, scale = stats[0], (stats[1] + 1e-3).rsqrt()
        vectors = any_layout.grid_vectors(stats, gamma, beta, centre, scale, Codec(bits) if bits else None)
        y = ((x - centre.view(view)) * scale.view(view) * gamma.view(view) + beta.view(view)).to(dtype)
        centre, scale = centre.unsqueeze(0), scale.unsqueeze(0)
        values = any_layout.encode(x, y, vectors, order, bits, centre, scale)
        return Case(x, y, grad, centre, scale, stats, vectors, values, order, channels_last)

    def moved(self) -> "Case":
        """Return the same on the device."""
        return Case(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in self))

    def empty(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        return empty(self.x.shape, self.channels_last, dtype or self.x.dtype, device)


def per_outer(case: Case, channels: int) -> Tensor:
    """Make positive numbers for each sample, and for each channel or all."""
    return 0.5 + torch.rand(2, case.order.outer, channels, generator=torch.Generator().manual_seed(0))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Assert the same bits, but for the sign of a zero and the kind of a NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Assert equality but for rounding: of sums of a few hundred terms in the interpreter, of few parts on a GPU."""
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest, as a GPU does; Triton's interpreter rounds to bfloat16 towards zero."""
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def assert_codes_are_the_references(name: str, bits: int, dtype: torch.dtype = torch.float32) -> None:
    case = Case.of(name, bits, dtype)
    on = case.moved()
    values = triton_any_layout.encode(on.x, on.y, on.vectors, case.order, bits, on.centre, on.scale)
    assert_same(values, case.values)
    of_x = any_layout.encode(case.x, case.x, case.vectors, case.order, bits, None, None)
    assert_same(triton_any_layout.encode(on.x, on.x, on.vectors, case.order, bits, None, None), of_x)
    expected = case.empty(CPU, torch.float32)
    any_layout.decode(case.values, case.vectors, case.order, bits, None, expected)
    out = case.empty(DEVICE)
    triton_any_layout.decode(on.values, on.vectors, case.order, bits, None, out)
    assert_same(out, rounded(expected, dtype))
    for rectify in (False, True):
        mean, rstd = case.centre[0], case.scale[0]
        of_norm = any_layout.normalise_encode(case.x, case.vectors, case.order, bits, mean, rstd, rectify, expected)
        over = on.x.clone(memory_format=torch.preserve_format)
        mean, rstd = mean.to(DEVICE), rstd.to(DEVICE)
        found = triton_any_layout.normalise_encode(over, on.vectors, case.order, bits, mean, rstd, rectify, over)
        assert_same(over, rounded(expected, dtype))
        if bits or dtype == torch.float32:  # y itself is saved as rounded by the interpreter, where there are no codes
            assert_same(found, of_norm)


@all_bits
@all_layouts
def test_codes_and_what_they_decode_to_are_the_references_to_the_bit(name: str, bits: int) -> None:
    assert_codes_are_the_references(name, bits)


@all_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_of_16_bit_activations_are_the_references(dtype: torch.dtype, bits: int) -> None:
    assert_codes_are_the_references("three images, channels last", bits, dtype)


@all_bits
@pytest.mark.parametrize("name", ["three images", "tokens"])
@pytest.mark.parametrize("has_channels", [False, True])
def test_codes_normalised_per_sample_are_the_references(name: str, bits: int, has_channels: bool) -> None:
    case = Case.of(name, bits)
    on, (centre, scale) = case.moved(), per_outer(case, case.order.channels if has_channels else 1)
    for given in ((centre, scale), (None, scale)):
        expected = any_layout.encode(case.x, case.y, case.vectors, case.order, bits, *given)
        moved = (t if t is None else t.to(DEVICE) for t in given)
        assert_same(triton_any_layout.encode(on.x, on.y, on.vectors, case.order, bits, *moved), expected)


@pytest.mark.parametrize("bits", [4, 0])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_functions_of_what_codes_decode_to_are_the_references(function: Elementwise, bits: int) -> None:
    case = Case.of("tokens", bits)
    on, expected, out = case.moved(), case.empty(CPU), case.empty(DEVICE)
    y = case.empty(CPU)
    any_layout.decode(case.values, case.vectors, case.order, bits, None, y)
    bound = 1e-6 * (1 + y.abs()) if function.is_smooth else torch.zeros(())
    any_layout.decode(case.values, case.vectors, case.order, bits, function, expected)
    triton_any_layout.decode(on.values, on.vectors, case.order, bits, function, out)
    assert ((out.cpu() - expected).abs() <= bound).all()
    if function.name == "hardtanh":  # its mask is saved instead
        return
    any_layout.elementwise_grad(case.grad, case.values, case.vectors, case.order, bits, function, expected)
    triton_any_layout.elementwise_grad(on.grad, on.values, on.vectors, case.order, bits, function, out)
    assert ((out.cpu() - expected).abs() <= bound * case.grad.abs()).all()


@pytest.mark.parametrize("bits", [4, 0])
def test_a_gradient_of_no_size_is_zero_where_a_rectified_tensor_is(bits: int) -> None:
    case = Case.of("two images, channels last", bits)
    on, expected, out = case.moved(), case.empty(CPU), case.empty(DEVICE)
    infinite = torch.full_like(case.grad, torch.inf)
    any_layout.elementwise_grad(infinite, case.values, case.vectors, case.order, bits, FUNCTIONS[0], expected)
    triton_any_layout.elementwise_grad(
        infinite.to(DEVICE), on.values, on.vectors, case.order, bits, FUNCTIONS[0], out
    )  # fmt: skip
    assert_same(out, expected)
    assert set(expected.unique().tolist()) == {0, torch.inf}


def assert_gradients_are_the_references(name: str, bits: int, dtype: torch.dtype = torch.float32) -> None:
    case = Case.of(name, bits, dtype)
    on = case.moved()
    saved, on_saved = (case.values, case.vectors, case.order, bits), (on.values, on.vectors, case.order, bits)
    for per_sample, rectified in ((False, False), (False, True), (True, False)):
        of = {"per_sample": per_sample, "rectified": rectified}
        expected = any_layout.gradient_sums(case.grad, *saved, **of)
        assert_near(triton_any_layout.gradient_sums(on.grad, *on_saved, **of), expected)
    if case.order.inner == 1:
        assert_near(triton_any_layout.row_means(on.grad, *on_saved), any_layout.row_means(case.grad, *saved))
    means = torch.stack((case.centre, case.scale))
    of_samples, of_rows = per_outer(case, case.order.channels), per_outer(case, 1)
    for scale, some_means in (
        (case.scale, means), (case.scale, None), (of_samples[0], of_samples), (case.scale, of_rows),
    ):  # fmt: skip
        expected, out = case.empty(CPU, torch.float32), case.empty(DEVICE)
        any_layout.input_grad(case.grad, *saved, scale, some_means, expected)
        moved = scale.to(DEVICE), None if some_means is None else some_means.to(DEVICE)
        triton_any_layout.input_grad(on.grad, *on_saved, *moved, out)
        assert_same(out, rounded(expected, dtype))
    any_layout.input_grad(case.grad, *saved, case.scale, means, expected, rectified=True)
    triton_any_layout.input_grad(on.grad, *on_saved, on.scale, means.to(DEVICE), out, rectified=True)
    assert_same(out, rounded(expected, dtype))


@all_bits
@all_layouts
def test_gradients_are_the_references(name: str, bits: int) -> None:
    assert_gradients_are_the_references(name, bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits_are_the_references(dtype: torch.dtype) -> None:
    assert_gradients_are_the_references("two images, channels last", 4, dtype)


def assert_stats_are_the_references(name: str, dtype: torch.dtype = torch.float32) -> None:
    case = Case.of(name, 0, dtype)
    of_samples, of_rows = per_outer(case, case.order.channels), per_outer(case, 1)
    for given in ((None, None), (case.centre, case.scale), tuple(of_samples), (None, of_rows[0])):
        wide = (t if t is None else t.double() for t in given)
        expected = any_layout.channel_stats(case.x.double(), case.order, *wide).float()
        moved = (t if t is None else t.to(DEVICE) for t in given)
        actual = triton_any_layout.channel_stats(case.x.to(DEVICE), case.order, *moved)
        assert_near(actual[1], expected[1])
        assert_near(
            actual[[0, 2, 3]], expected[[0, 2, 3]]
        )  # a mean may be 0 but for rounding of what it is the mean of


@all_layouts
def test_statistics_are_the_references(name: str) -> None:
    assert_stats_are_the_references(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_16_bit_activations_are_the_references(dtype: torch.dtype) -> None:
    assert_stats_are_the_references("two images, channels last", dtype)


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("name", "bits"), [("three images", 4), ("three images, channels last", 4), ("sequences", 0)])
def test_in_small_tiles_all_is_the_references(name: str, bits: int) -> None:
    assert_codes_are_the_references(name, bits)
    assert_gradients_are_the_references(name, bits)
    assert_stats_are_the_references(name)


@pytest.mark.parametrize("is_small", [False, pytest.param(True, marks=in_small_tiles)])
@pytest.mark.parametrize("extreme", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_value_of_no_size_is_seen_in_its_channel_only(
    extreme: float, is_small: bool, request: pytest.FixtureRequest
) -> None:
    if is_small:
        request.getfixturevalue("small_tiles")
    case = Case.of("two images, channels last", 4)
    case.x[1, 3, 0, 0] = extreme
    expected, actual = (
        functions.channel_stats(case.x.to(device), case.order)
        for functions, device in ((any_layout, CPU), (triton_any_layout, DEVICE))
    )
    others = [0, 1, 2, 4]
    for one, other in zip(actual.cpu()[:, others], expected[:, others], strict=True):
        assert_near(one, other)
    assert_same(actual[2:], expected[2:])
    for codec in (Codec(4), Codec(4, "range")):
        vectors = any_layout.grid_vectors(expected, None, None, None, None, codec)
        vectors[any_layout.Vectors._fields.index("width"), 0] = torch.inf
        values = any_layout.encode(case.x, case.x, vectors, case.order, 4, None, None)
        on_x, on_vectors = case.x.to(DEVICE), vectors.to(DEVICE)
        assert_same(triton_any_layout.encode(on_x, on_x, on_vectors, case.order, 4, None, None), values)
        out, expected_out = case.empty(DEVICE), case.empty(CPU)
        triton_any_layout.decode(values.to(DEVICE), on_vectors, case.order, 4, None, out)
        any_layout.decode(values, vectors, case.order, 4, None, expected_out)
        assert_same(out, expected_out)


def test_one_outlier_spoils_no_statistics() -> None:
    for place in (0, 17, 62):
        x = torch.randn(1, 2, 7, 9, generator=torch.Generator().manual_seed(place)) + 1e3
        x[0, 1].view(-1)[place] = 1e6
        order = Order.of(x.shape, 1, False)
        actual, expected = (
            triton_any_layout.channel_stats(x.to(DEVICE), order),
            any_layout.channel_stats(x.double(), order),
        )
        # The mean of channel 0 has 14 bits before those that the deviation has.
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=0)


def grid_cases() -> tuple[Tensor, Tensor, Tensor]:
    """Return stats [4, C] that have exact square roots, for PyTorch's on a CPU may be a bit off, and gamma and beta."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(1, 200, (100,), generator=generator) / 64
    mean = 3 * size * torch.randn(100, generator=generator).sign()
    low, high = (mean + sign * size * (4 + 8 * torch.rand(100, generator=generator)) for sign in (-1, 1))
    low[:10], low[10:20] = 0, 0.1  # rectified, and positive
    gamma, beta = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    gamma[20:26] = torch.tensor([0.0, -0.0, 0.0, 1e-6, 1e6, -1.0])
    beta[20:26] = torch.tensor([1.0, -1.0, 0.0, 1e6, 1e-6, 0.0])
    gamma[26:30], beta[26:30] = 0, torch.tensor([1e-9, -1e-9, 2.0**-24, 1e-38])
    gamma[54:58], beta[54:58] = 1e-45 * torch.tensor([1.0, -1, -1, 1]), torch.tensor([1.0, -1, 1, 0])  # underflow
    size[54:58] = 1 / 16
    beta[30:40] = -gamma[30:40] * mean[30:40]  # the edge at the mean
    beta[40:50] = -gamma[40:50] * low[40:50]  # at the end of the range
    stats = torch.stack((mean, (4 * size).square(), low, high))
    stats[:, 50] = torch.nan
    stats[1:, 51] = torch.tensor([torch.nan, -1.0, torch.inf])
    stats[:, 52] = torch.tensor([5.0, 0.0, 5.0, 5.0])  # constant
    stats[:, 53] = torch.tensor([0.0, 0.0, 0.0, 0.0])
    return stats, gamma, beta


@pytest.mark.parametrize("codec", [Codec(8, "range"), Codec(4, "range"), Codec(2, "range"), Codec(8, 3.9), Codec(4),
                                   Codec(2, 1.7), None], ids=str)  # fmt: skip
def test_the_grid_is_the_references_to_the_bit(codec: Codec | None) -> None:
    stats, gamma, beta = grid_cases()
    centre, scale = torch.randn(100, generator=torch.Generator().manual_seed(1)), torch.full((100,), 0.25)
    for given in (
        (None, None, None, None), (gamma, beta, None, None), (gamma.bfloat16(), None, centre, scale),
        (gamma, beta, centre, scale), (None, beta, stats[0], scale),
    ):  # fmt: skip
        moved = [t if t is None else t.to(DEVICE) for t in given]
        for least in map(any_layout.largest_rounded_to_zero, (torch.float32, torch.float16, torch.bfloat16)):
            expected = any_layout.grid_vectors(stats, *given, codec, least)
            assert_same(triton_any_layout.grid_vectors(stats.to(DEVICE), *moved, codec, least), expected)


def assert_batch_norm_vectors_are_the_references(name: str, codec: Codec | None, dtype: torch.dtype) -> None:
    """The statistics but for rounding, and the grid that the reference places by those to the bit."""
    on, momentum, eps = Case.of(name, 4, dtype).moved(), 0.3, 1e-3
    gamma, beta, *averages = torch.randn(4, on.order.channels, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    averages[1] = averages[1].abs()
    given = [RunningStats(*(one.clone() for one in averages), momentum) for _ in range(2)]
    least = any_layout.largest_rounded_to_zero(dtype)
    found, expected = (
        kernels.batch_norm_vectors(on.x, on.order, gamma, beta, running, eps, codec, least)
        for kernels, running in zip((triton_any_layout, any_layout), given, strict=True)
    )
    for ours, theirs in zip((*found[1:], *given[0][:2]), (*expected[1:], *given[1][:2]), strict=True):
        assert_near(ours, theirs)
    stats, (vectors, mean, rstd) = triton_any_layout.channel_stats(on.x, on.order), found
    assert_same(mean, stats[0].cpu())
    assert_same(vectors, any_layout.grid_vectors(stats, gamma, beta, mean, rstd, codec, least).cpu())
    without, *_ = triton_any_layout.batch_norm_vectors(on.x, on.order, gamma, beta, None, eps, codec, least)
    assert_same(without, vectors.cpu())


ALL_CODECS = pytest.mark.parametrize("codec", [Codec(8, "range"), Codec(4), None], ids=str)


@ALL_CODECS
@pytest.mark.parametrize("name", ["two images, channels last", "four images"])
def test_a_batch_norm_s_vectors_are_the_references(name: str, codec: Codec | None) -> None:
    assert_batch_norm_vectors_are_the_references(name, codec, torch.float32)


@in_small_tiles
@pytest.mark.usefixtures("small_tiles")
@ALL_CODECS
def test_a_batch_norm_s_vectors_of_several_programs_are_the_references(codec: Codec | None) -> None:
    assert_batch_norm_vectors_are_the_references("two images, channels last", codec, torch.bfloat16)


def test_the_same_input_gives_the_same_bits() -> None:
    name = "many images" if DEVICE.type == "cuda" else "three images"
    case = Case.of(name, 4)
    on = case.moved()
    results = [
        (
            triton_any_layout.channel_stats(on.x, case.order),
            triton_any_layout.gradient_sums(on.grad, on.values, on.vectors, case.order, 4, per_sample=False),
        )
        for _ in range(3)
    ]
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


class Launches(TorchDispatchMode):
    """Names in order what launches a kernel; ours are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def launched(self, kernel: Any, *others: object, **constants: object) -> None:
        """Stand in for triton_any_layout._launch."""
        self.names.append(kernel.__name__)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its name."""
        name = func._schema.name.removeprefix("aten::")
        if name not in ("new_empty", "select", "slice", "unbind", "unsqueeze"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_norm_takes_few_launches(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, is_shared in (((128, 64, 32, 32), True), ((4, 64, 8, 8), False)):
        x, order = torch.empty(shape, device="meta"), Order.of(shape, 1, channels_last)
        vectors, values = x.new_empty(7, 64), x.new_empty(order.saved_elements(4), dtype=torch.uint8)
        saved, scale = (values, vectors, order, 4), x.new_empty(1, 64)
        launches = Launches()
        monkeypatch.setattr(triton_any_layout, "_launch", launches.launched)
        with launches:
            stats = triton_any_layout.channel_stats(x, order)
            triton_any_layout.grid_vectors(stats, scale[0], scale[0], scale[0], scale[0], Codec(4))
            triton_any_layout.encode(x, x, vectors, order, 4, scale, scale)
            triton_any_layout.gradient_sums(x, *saved, per_sample=False)
            triton_any_layout.input_grad(x, *saved, scale, vectors[:2, None], x)
            running = RunningStats(scale[0], scale[0], 0.1)
            triton_any_layout.batch_norm_vectors(x, order, scale[0], scale[0], running, 1e-5, Codec(4), 0.0)
            triton_any_layout.normalise_encode(x, vectors, order, 4, scale[0], scale[0], True, x)
        expected = ["_channel_stats", "_grid_vectors", "_encode", "_gradient_sums", "_input_grad"]
        in_training = ["_batch_norm_vectors", "_normalise_encode"]
        if is_shared:  # by several programs: a counter is set to zero, and partial sums are added
            expected = ["new_zeros", *expected[:4], "sum", *expected[4:]]
            in_training = ["new_zeros", *in_training]
        assert launches.names == expected + in_training


def test_float64_is_left_to_plain_pytorch() -> None:
    case = Case.of("four images", 4, torch.float64).moved()
    stats = triton_any_layout.channel_stats(case.x, case.order)
    assert stats.dtype == torch.float64
    vectors = triton_any_layout.grid_vectors(stats, None, None, None, None, Codec(4))
    values, out = triton_any_layout.encode(case.x, case.x, vectors, case.order, 4, None, None), torch.empty_like(case.x)
    triton_any_layout.decode(values, vectors, case.order, 4, None, out)
    expected = torch.empty_like(out)
    any_layout.decode(values, vectors, case.order, 4, None, expected)
    assert_same(out, expected.cpu())


def test_the_device_chooses_the_kernels() -> None:
    assert library.kernels_for(CPU) is cpu
    if DEVICE.type == "cuda":
        assert library.kernels_for(DEVICE) is triton_any_layout


@triton.jit
def _offsets(bytes_, elements, first, C, outer, inner, packed_outer, packed_inner, CHANNELS_LAST: tl.constexpr,
             OUTER_FIRST: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    c = tl.arange(0, CHANNELS)
    offset, mask, o, i = triton_elements._bytes(
        first, packed_outer * packed_inner, c, C, packed_inner, 8, CHANNELS_LAST
    )  # fmt: skip
    element, element_mask, _ = triton_elements._elements(
        first, offset, mask, o, i, c, C, outer, inner, packed_outer, packed_inner, 2, CHANNELS_LAST, OUTER_FIRST
    )
    place = tl.arange(0, 8)[:, None] * CHANNELS + c[None, :]
    tl.store(bytes_ + place, tl.where(mask, offset, -1))
    place = tl.arange(0, 2)[:, None, None] * (8 * CHANNELS) + place[None, :, :]
    tl.store(elements + place, tl.where(element_mask, element, -1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("outer_first", [False, True])
def test_offsets_beyond_two_to_the_31_are_right(channels_last: bool, outer_first: bool) -> None:
    order = Order(2**17, 16, 2**12, channels_last) if outer_first else Order(2**17 + 1, 16, 2**12, channels_last)
    assert order.outer_first(4) == outer_first
    packed = order.packed(4)
    first, c = packed.outer * packed.inner - 8, torch.arange(16)
    bytes_, elements = (torch.empty(n, 8, 16, dtype=torch.int64, device=DEVICE) for n in (1, 2))
    _offsets[(1,)](bytes_, elements, first, 16, order.outer, order.inner, packed.outer, packed.inner,
                   CHANNELS_LAST=channels_last, OUTER_FIRST=outer_first, CHANNELS=16)  # fmt: skip
    p = first + torch.arange(8)[:, None]
    o, i = p // packed.inner, p % packed.inner

    def offset(inner: int, o: Tensor, i: Tensor) -> Tensor:
        return (o * inner + i) * 16 + c if channels_last else (o * 16 + c) * inner + i

    assert torch.equal(bytes_.cpu()[0], offset(packed.inner, o, i))
    for k in range(2):
        place = (o + k * packed.outer, i) if outer_first else (o, i + k * packed.inner)
        assert torch.equal(elements.cpu()[k], offset(order.inner, *place))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU with 30 GiB")
def test_an_activation_of_more_than_two_to_the_31_elements() -> None:
    """Its last rows are those of a small activation that ends alike."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of the GPU")
    channels, few, half = 16, 1024, 2**26 + 2**25 + 1024
    small = torch.randn(2 * few, channels, device=DEVICE, dtype=torch.bfloat16)
    x = torch.zeros(2 * half, channels, device=DEVICE, dtype=torch.bfloat16)
    x[half - few : half], x[-few:] = small[:few], small[few:]
    vectors = any_layout.grid_vectors(
        torch.tensor([[0.0], [1], [-4], [4]], device=DEVICE).repeat(1, channels), None, None, None, None, Codec(4)
    )
    results = []
    for tensor in (small, x):
        order, out = Order.of(tensor.shape, 1, False), torch.empty_like(tensor)
        values = triton_any_layout.encode(tensor, tensor, vectors, order, 4, None, None)
        triton_any_layout.decode(values, vectors, order, 4, None, out)
        packed = len(tensor) // 2
        results.append((values[-few * channels :], torch.cat((out[packed - few : packed], out[-few:]))))
    assert all(map(torch.equal, *results))


def test_a_converted_network_s_gradients_are_those_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gradients = []
    for kernels in (triton_any_layout, any_layout):
        monkeypatch.setattr(library, "kernels_for", lambda _, kernels=kernels: kernels)
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1),
            torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Flatten(1), torch.nn.Linear(64, 40),
            torch.nn.LayerNorm(40), torch.nn.GELU(), torch.nn.Linear(40, 2),
        ).to(DEVICE)  # fmt: skip
        blpa.convert(model, bits=4)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        # Statistics differ in their last bits, and so do codes next to an edge; a single one moves a gradient little.
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-6


class Block(torch.nn.Module):
    """A residual block: a batch norm with its ReLU, and one without, both over what a convolution alone makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = (torch.nn.BatchNorm2d(3) for _ in range(2))
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        return self.relu(out + x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_batch_norms_are_computed_in_one_pass_with_their_codes(
    bits: int | None, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launch = triton_any_layout._launch

    def recorded(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(library, "kernels_for", lambda _: triton_any_layout)
    monkeypatch.setattr(triton_any_layout, "_launch", recorded)
    images = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.manual_seed(0)
    stock = Block().to(DEVICE)
    coded = blpa.convert(copy.deepcopy(stock), bits)
    outputs = [model(images) for model in (stock, coded)]
    assert launched.count("_normalise_encode") == 2
    # Both round each product and sum of the formula; the second convolution and its norm pass the first's on.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(coded.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for out in outputs:
        out.square().sum().backward()
    if bits is None:
        for ours, theirs in zip(coded.parameters(), stock.parameters(), strict=True):
            # A convolution's bias before a batch norm has the gradient 0 but for rounding.
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
