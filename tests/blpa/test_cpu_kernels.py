"""The C++ kernels for CPUs: equal to the reference, and replaced by it where they cannot be built."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blpa.codec import Codec
from blpa.coded.tensors import Coded
from blpa.kernels import RunningStats, any_layout, compute_dtype, cpu, cpu_build
from blpa.kernels import bits as reference_bits
from blpa.kernels.any_layout import Elementwise
from blpa.kernels.library import batch_stats_and_averages, rstd_of
from blpa.kernels.order import Order

CODECS = [Codec(8, "range"), Codec(4), Codec(2, 1.7)]
ORDERS = {
    "images": Order(16, 6, 35, False),
    "images, the last byte not full": Order(5, 6, 35, False),
    "pixels share bytes": Order(1, 5, 63, False),
    "long channels": Order(2, 3, 2500, False),
    "one channel": Order(3, 1, 41, False),
    "channels last": Order(6, 19, 35, True),
    "channels last, pixels share bytes": Order(3, 7, 63, True),
    "tokens": Order(37, 33, 1, False),
    "wide tokens": Order(9, 1100, 1, True),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXACT = [None, Elementwise("relu"), Elementwise("leaky_relu", (0.2,))]
SMOOTH = [Elementwise(name) for name in ("silu", "gelu", "gelu_tanh", "hardswish")]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Have PyTorch fill what it allocates with NaN, or the largest number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the C++ serve tensors of any size."""
    if cpu._load() is None:
        pytest.skip("no compiler here")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 0)
    return cpu


def activation(order: Order, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels of different means and deviations, in memory as the order says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(order.outer, order.inner, order.channels, generator=generator)
    x = x * torch.logspace(-1, 1, order.channels) + torch.linspace(-2, 3, order.channels)
    return (x if order.channels_last else x.mT).flatten().to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )  # fmt: skip


def rows(order: Order, name: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Centre and scale of a batch norm, a group norm, a layer norm, a root mean square norm, or none."""
    outer, channels = {
        "batch": (1, order.channels), "group": (order.outer, order.channels), "layer": (order.outer, 1),
        "rms": (order.outer, 1), "none": (1, 1),
    }[name]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    centre, scale = (torch.rand(outer, channels, generator=generator).to(dtype) + 0.5 for _ in range(2))
    return None if name in ("rms", "none") else centre, None if name == "none" else scale


def grids(x: Tensor, order: Order, codec: Codec) -> Tensor:
    dtype = compute_dtype(x.dtype)
    gamma, beta = torch.linspace(-2, 2, order.channels, dtype=dtype), torch.linspace(1, -1, order.channels, dtype=dtype)
    return any_layout.grid_vectors(any_layout.channel_stats(x, order), gamma, beta, None, None, codec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ORDERS)
def test_codes_and_decoded_values_are_the_reference_s_to_the_bit(
    name: str, codec: Codec, dtype: torch.dtype, library: Any
) -> None:
    order, bits = ORDERS[name], codec.bits
    x, y = activation(order, dtype), activation(order, dtype, 1)
    x[::97], y[::89] = torch.nan, torch.nan
    x[1::101], y[::103] = torch.inf, -torch.inf
    vectors = grids(activation(order, dtype), order, codec)
    for norm in ("none", "batch", "group", "layer", "rms"):
        centre, scale = rows(order, norm, vectors.dtype)
        with poisoned():
            values = library.encode(x, y, vectors, order, bits, centre, scale)
        assert torch.equal(values, any_layout.encode(x, y, vectors, order, bits, centre, scale))
    vectors[:, 1 % order.channels] = torch.nan  # as the statistics of a channel with a NaN make them
    assert torch.equal(
        library.encode(x, x, vectors, order, bits, None, None),
        any_layout.encode(x, x, vectors, order, bits, None, None),
    )
    found, expected = torch.full_like(x, torch.nan), torch.empty_like(x)
    for function in EXACT:
        library.decode(values, vectors, order, bits, function, found.fill_(7))
        any_layout.decode(values, vectors, order, bits, function, expected)
        assert same(found, expected)
        if function is not None:
            library.elementwise_grad(y, values, vectors, order, bits, function, found.fill_(7))
            any_layout.elementwise_grad(y, values, vectors, order, bits, function, expected)
            assert same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORDERS)
def test_smooth_functions_are_the_reference_s_but_for_rounding(name: str, dtype: torch.dtype, library: Any) -> None:
    # PyTorch computes a function in vectors, and in another way at their ends; dY is the rounded derivative times dA
    # where the reference rounds twice more. erf and tanh near -1 are off by some units in the last place of 1, which f
    # multiplies by |y| / 2, and f' too: here |y| is at most 30.
    order = ORDERS[name]
    tolerance = 8 * torch.finfo(dtype).eps
    grad, found, expected = activation(order, dtype, 1), *torch.empty(2, order.numel, dtype=dtype)
    for codec in CODECS:
        x = activation(order, dtype)
        vectors = grids(x, order, codec)
        values = any_layout.encode(x, x, vectors, order, codec.bits, None, None)
        for function in (*SMOOTH, Elementwise("hardtanh", (0.0, 6.0))):
            library.decode(values, vectors, order, codec.bits, function, found.fill_(torch.nan))
            any_layout.decode(values, vectors, order, codec.bits, function, expected)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=15 * tolerance)
        for function in SMOOTH:
            library.elementwise_grad(grad, values, vectors, order, codec.bits, function, found.fill_(torch.nan))
            any_layout.elementwise_grad(grad, values, vectors, order, codec.bits, function, expected)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=15 * tolerance)


def test_a_derivative_of_zero_stops_an_infinite_gradient(library: Any) -> None:
    order = Order(4, 8, 64, False)
    x = activation(order, torch.float32) - 3
    for codec in CODECS:
        vectors = grids(x, order, codec)
        values, dy = any_layout.encode(x, x, vectors, order, codec.bits, None, None), torch.empty_like(x)
        library.elementwise_grad(
            torch.full_like(x, torch.inf), values, vectors, order, codec.bits, Elementwise("relu"), dy
        )
        assert torch.equal(dy, torch.where(x > 0, torch.inf, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ORDERS)
def test_sums_and_input_gradients(name: str, bits: int, dtype: torch.dtype, library: Any) -> None:
    order, codec = ORDERS[name], Codec(bits)
    x, grad = activation(order, dtype), activation(order, dtype, 1)
    vectors = grids(x, order, codec)
    values = any_layout.encode(x, x, vectors, order, bits, None, None)
    # A sum of n terms: theirs rounded once each, and the result; the reference's, of fp32 terms, less exactly.
    unit = torch.finfo(vectors.dtype).eps
    for per_sample, rectified in ((False, False), (False, True), (True, False), (True, True)):
        of = {"per_sample": per_sample, "rectified": rectified}
        with poisoned():
            found = library.gradient_sums(grad, values, vectors, order, bits, **of)
        wide = any_layout.gradient_sums(grad.double(), values, vectors.double(), order, bits, **of)
        sizes = any_layout.gradient_sums(grad.double().abs(), values, vectors.double(), order, bits, **of)
        largest = (vectors[2].abs() * codec.levels + vectors[3].abs()).double()
        bound = unit * 4 * sizes[0] * torch.stack((torch.ones_like(largest), largest)).unsqueeze(1) + unit
        assert ((found.double() - wide).abs() <= bound).all()
    if order.inner == 1:
        found = library.row_means(grad, values, vectors, order, bits)
        wide = any_layout.row_means(grad.double(), values, vectors.double(), order, bits)
        size = (grad.double().view(order.outer, -1).abs() * vectors[4].abs()).mean(-1, keepdim=True)
        bound = unit * 4 * torch.stack((size, size * float(largest.max()))) + unit
        assert ((found.double() - wide).abs() <= bound).all()
    dx, expected = torch.empty_like(x), torch.empty_like(x)
    for norm in ("batch", "group", "layer"):
        means, scale = rows(order, norm, vectors.dtype)
        assert means is not None and scale is not None
        for both in (torch.stack((means, means - 1)), None):
            library.input_grad(grad, values, vectors, order, bits, scale, both, dx.fill_(torch.nan))
            any_layout.input_grad(grad, values, vectors, order, bits, scale, both, expected)
            assert torch.equal(dx, expected)
        both = torch.stack((means, means - 1))
        library.input_grad(grad, values, vectors, order, bits, scale, both, dx.fill_(torch.nan), rectified=True)
        any_layout.input_grad(grad, values, vectors, order, bits, scale, both, expected, rectified=True)
        assert torch.equal(dx, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 24, 13, 17), (3, 7, 61, 31), (512, 40), (4, 9, 1000), (1, 3, 70, 80)], ids=str)
def test_a_batch_norm_has_the_bits_of_pytorch_s(shape: tuple[int, ...], dtype: torch.dtype, library: Any) -> None:
    """So whether the kernels serve a tensor is nowhere to be seen, and what follows PyTorch's is not affected."""
    channels, view = shape[1], (1, shape[1], *(1,) * (len(shape) - 2))
    generator = torch.Generator().manual_seed(len(shape))
    gamma, beta, spread, middle = torch.randn(4, channels, generator=generator)
    contiguous = (torch.randn(shape, generator=generator) * spread.view(view) + 2 * middle.view(view)).to(dtype)
    layouts = [(contiguous, False)]
    if len(shape) == 4:
        layouts.append((contiguous.contiguous(memory_format=torch.channels_last), True))
    for x, channels_last in layouts:
        averages = torch.rand(2, channels, generator=generator)
        expected_averages = averages.clone()
        expected = F.batch_norm(x, *expected_averages, gamma, beta, training=True, momentum=0.3)
        stats = batch_stats_and_averages(x, channels_last, True, RunningStats(*averages, 0.3))
        assert torch.equal(averages, expected_averages)
        mean, rstd = stats[0], rstd_of(stats, 1e-5)
        order = Order.of(shape, 1, channels_last)
        for bits in (8, 4, 2):
            assert library.normalises_as_pytorch(order, bits, dtype)
            vectors = any_layout.grid_vectors(stats, gamma, beta, mean, rstd, Codec(bits))
            codes = any_layout.encode(x, expected, vectors, order, bits, mean.unsqueeze(0), rstd.unsqueeze(0))
            y, a = torch.full_like(x, torch.nan), x.clone(memory_format=torch.preserve_format)
            assert torch.equal(library.normalise_encode(x, vectors, order, bits, mean, rstd, False, y), codes)
            assert torch.equal(library.normalise_encode(a, vectors, order, bits, mean, rstd, True, a), codes)
            assert torch.equal(y, expected)
            assert torch.equal(a, F.relu(expected))
            a.copy_(x)
            with poisoned():
                saved = library.batch_norm(a, order, Codec(bits), stats, gamma, beta, 1e-5, True, a)
            assert all(
                torch.equal(*pair) for pair in zip((a, *saved), (F.relu(expected), codes, vectors, rstd), strict=False)
            )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ORDERS)
def test_own_codes_are_those_of_their_parts(name: str, codec: Codec, library: Any) -> None:
    order = ORDERS[name]
    for x in (activation(order, torch.float32), activation(order, torch.bfloat16).relu()):
        vectors = library.grid_vectors(library.channel_stats(x, order), None, None, None, None, codec)
        expected = library.encode(x, x, vectors, order, codec.bits, None, None), vectors
        with poisoned():
            found = library.encode_own(x, order, codec)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert library.encode_own(activation(order, torch.float64), order, codec) is None


WINDOWS = {
    "usual": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "VGG's": ((2, 2), (2, 2), (0, 0), (1, 1)),
    "apart": ((2, 3), (3, 4), (1, 0), (1, 1)),
    "dilated": ((4, 3), (1, 2), (2, 1), (3, 2)),
    "large": ((16, 16), (5, 1), (8, 8), (1, 2)),
}


@pytest.mark.parametrize("values", ["usual", "ties", "nan", "minus infinity"])
@pytest.mark.parametrize("windows", WINDOWS)
def test_max_pooling_has_the_bits_of_pytorch_s(windows: str, values: str, library: Any) -> None:
    arguments = WINDOWS[windows]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 41, 57, generator=generator)
    if values == "ties":
        x = x.round()
    elif values != "usual":
        some = torch.rand(x.shape, generator=generator) < 0.5
        x[some] = float(values.replace("minus ", "-"))
        x[0, 0] = x[some][0]
    x.requires_grad_()
    expected, index = F.max_pool2d(x, *arguments, return_indices=True)
    grad = torch.randn(expected.shape, generator=generator)
    expected.backward(grad)
    with poisoned():
        found, places = library.max_pool(x.detach(), *arguments)
        dx = library.max_pool_grad(grad, places, x.shape, *arguments)
    assert same(found, expected.detach())
    assert torch.equal(places, reference_bits.places_of(index, x.shape[2:], *arguments))
    assert torch.equal(dx, x.grad)


@pytest.mark.parametrize("size", [1 << 14, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_what_lies_between(dtype: torch.dtype, size: int, library: Any) -> None:
    y = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    ends = (-0.3, 0.7)
    y[:3] = torch.tensor([*ends, torch.nan], dtype=dtype)
    grad = torch.linspace(-1, 1, size).to(dtype)
    grad[5:7] = torch.nan
    expected = reference_bits.pack_between(y, *ends)
    with poisoned():
        packed = library.pack_between(y, *ends)
        found = library.masked(grad, packed)
    assert torch.equal(packed, expected)
    assert same(found, reference_bits.masked(grad, expected))
    assert library.masked(grad.double(), packed) is library.pack_between(y.double(), *ends) is None


def test_windows_that_pytorch_refuses_or_that_may_miss_the_input_are_left_to_it(library: Any) -> None:
    x = torch.zeros(64, 64, 4, 4)
    for arguments in (
        ((2, 2), (2, 2), (2, 2), (1, 1)),
        ((2, 2), (0, 2), (0, 0), (1, 1)),
        ((0, 2), (1, 1), (0, 0), (1, 1)),
        ((6, 6), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (5, 1)),
        ((17, 17), (1, 1), (8, 8), (1, 1)),
        ((2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    ):
        assert library.max_pool(x, *arguments) is None
    missing = (2, 2), (1, 1), (1, 1), (2, 2)  # of a plane of one pixel
    places = torch.zeros(1 << 14, 1, 1, 1, dtype=torch.uint8)
    assert library.max_pool_grad(places.float(), places, places.shape, *missing) is None
    assert library.max_pool(x.double(), *WINDOWS["usual"]) is None
    assert library.max_pool(x.contiguous(memory_format=torch.channels_last), *WINDOWS["usual"]) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORDERS)
def test_statistics(name: str, dtype: torch.dtype, library: Any) -> None:
    order = ORDERS[name]
    for offset in (0, 300):
        x = activation(order, dtype) + offset
        for norm in ("none", "batch", "group", "layer", "rms"):
            centre, scale = rows(order, norm, compute_dtype(dtype))
            with poisoned():
                found = library.channel_stats(x, order, centre, scale)
            z = any_layout.normalised(
                order.rows(x, 0), (slice(None), slice(None)),
                *(None if one is None else order.of_rows(one, 0) for one in (centre, scale)),
            ).double()  # fmt: skip
            var, mean = torch.var_mean(z, (0, 1), correction=0)
            # Sums are in double about a value of the channel: in float32 only the results are rounded, in float64 each
            # of the terms, and of PyTorch's own, which are as large as the mean.
            is_double = dtype == torch.float64
            unit = torch.finfo(found.dtype).eps * (order.numel if is_double else 2)
            assert ((found[0] - mean).abs() <= unit * (mean.abs() + var.sqrt())).all()
            assert ((found[1] - var).abs() <= unit * (var + is_double * mean.abs() * var.sqrt())).all()
            assert torch.equal(found[2:].double(), torch.stack((z.amin((0, 1)), z.amax((0, 1)))))


@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("name", ORDERS)
def test_statistics_of_a_channel_with_a_nan_are_nan(name: str, place: int, library: Any) -> None:
    order = ORDERS[name]
    x = activation(order, torch.float32)
    x[place] = torch.nan
    found, expected = library.channel_stats(x, order), any_layout.channel_stats(x, order)
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codec", [*CODECS, Codec(4, "range"), Codec(8, 3.9)])
def test_grids_are_the_reference_s_to_the_bit(codec: Codec, dtype: torch.dtype, library: Any) -> None:
    order = Order(11, 301, 13, True)
    x = activation(order, dtype).view(-1, order.channels)
    x[:, 5] = 1
    gamma, beta = torch.linspace(-2, 2, order.channels, dtype=dtype), torch.linspace(9, -9, order.channels, dtype=dtype)
    gamma[7], gamma[8], gamma[9] = 0.0, -0.0, torch.inf
    gamma[15:20], beta[15:20] = 0, torch.tensor([1e-9, -1e-9, 2.0**-24, 1e-42, 0.0], dtype=dtype)
    gamma[20:22] = torch.tensor([1e-45, -1e-45])  # gamma deviation is 0 where the deviation is below 1/2
    for values in (x, x.relu(), x.abs() + 0.1):
        stats = any_layout.channel_stats(values.flatten(), order)
        stats[0, 11], stats[1, 12], stats[2, 13], stats[3, 14] = torch.nan, torch.inf, -torch.inf, torch.nan
        centre, scale = stats[0].clone(), (stats[1] + 1e-5).rsqrt()
        for args in ((None,) * 4, (gamma, beta, None, None), (gamma, beta, centre, scale), (None, beta, centre, scale)):
            for least in map(any_layout.largest_rounded_to_zero, (torch.float32, torch.float16, torch.bfloat16)):
                with poisoned():
                    found = library.grid_vectors(stats, *args, codec, least)
                assert same(found, any_layout.grid_vectors(stats, *args, codec, least))


def test_the_number_of_threads_changes_no_bit(library: Any) -> None:
    order, codec = Order(16, 64, 100, False), Codec(4)
    results = []
    for order in (Order(16, 64, 100, False), Order(16, 64, 100, True)):
        x = activation(order, torch.float32)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                stats = library.channel_stats(x, order)
                vectors = library.grid_vectors(stats, None, None, None, None, codec)
                values = library.encode(x, x, vectors, order, 4, None, None)
                sums = [library.gradient_sums(x, values, vectors, order, 4, per_sample=one) for one in (False, True)]
            finally:
                torch.set_num_threads(before)
            results.append([stats, vectors, values, *sums])
        assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
        results.clear()


def test_a_norm_of_constant_statistics_reads_no_means(library: Any) -> None:
    """So many channels that a read behind one zero would end the process."""
    order = Order(2, 1_000_000, 2, False)
    x = activation(order, torch.float32)
    vectors = grids(x, order, Codec(4))
    values = library.encode(x, x, vectors, order, 4, None, None)
    found, expected = torch.empty(2, order.numel)
    scale = torch.ones(1, order.channels)
    library.input_grad(x, values, vectors, order, 4, scale, None, found)
    any_layout.input_grad(x, values, vectors, order, 4, scale, None, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_the_user_s(dtype: torch.dtype, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_found", None)
    monkeypatch.setattr(cpu, "_is_found", False)
    monkeypatch.setattr(cpu, "_has_exact_stats", False)
    torch.set_default_dtype(dtype)
    try:
        assert cpu._load() is not None and cpu._has_exact_stats
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the process find the library again, in an empty cache."""
    monkeypatch.setattr(cpu, "_found", None)
    monkeypatch.setattr(cpu, "_is_found", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blpa"


def decoded(elements: int = cpu.MIN_ELEMENTS) -> Tensor:
    x = torch.randn(16, 8, elements // 128, generator=torch.Generator().manual_seed(0))
    return Coded.of(x, 1, Codec(4)).value()


def test_without_a_compiler_plain_pytorch_computes_the_same(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = decoded(cpu.MIN_ELEMENTS // 2)
    assert not cpu._is_found, "a small tensor compiles nothing"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.INFO, logger="blpa"):
        decoded()
        decoded()
    assert cpu._is_found and cpu._found is None
    assert [record.message for record in caplog.records] == [
        "coded networks run on plain PyTorch kernels, which are slower: no C++ compiler found "
        "(looked for $CXX, c++, g++, clang++)"
    ]
    assert torch.equal(decoded(cpu.MIN_ELEMENTS // 2), expected)


def test_a_compiler_that_fails_is_no_compiler(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert cpu._load() is None
    assert not list(unloaded.glob("*"))


@pytest.fixture
def compiled(library: Any) -> Path:
    return Path(library._found._name)


@pytest.fixture
def copied(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """In place of compiling, copy what was compiled before; returns where to."""
    made = []

    def copy(file: Path, *_: Any) -> None:
        made.append(file)
        shutil.copy(compiled, file.with_suffix(".new")).replace(file)

    monkeypatch.setattr(cpu_build, "_compile", copy)
    return made


def test_a_broken_file_in_the_cache_is_compiled_anew(copied: list[Path], compiled: Path, unloaded: Path) -> None:
    unloaded.mkdir()
    file = unloaded / compiled.name
    file.write_bytes(b"garbage")
    assert cpu._load() is not None
    assert copied == [file]


def test_a_cache_that_cannot_be_written_is_done_without(
    copied: list[Path], unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloaded.write_bytes(b"a file where the folder should be")
    assert cpu._load() is not None
    (file,) = copied
    assert not file.exists() and unloaded not in file.parents


def test_a_library_that_computes_something_else_is_not_used(
    library: Any, unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def built() -> Any:
        functions = {f"blpa_{name}": lambda *_: None for name in cpu_build.FUNCTIONS}
        return SimpleNamespace(**functions, blpa_has_half=lambda: 1)

    monkeypatch.setattr(cpu, "built", built)
    with caplog.at_level(logging.INFO, logger="blpa"), poisoned():
        assert cpu._load() is None
    assert "something else" in caplog.text
