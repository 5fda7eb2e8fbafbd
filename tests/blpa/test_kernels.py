"""The four functions: the reference against their formulas, the compiled ones against the reference."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import (
    CHANNELS,
    CODECS,
    EPS,
    assert_backward_is_the_references,
    assert_stats_are_accurate,
    assert_the_means_of_others_reach_dx,
    kernel_inputs,
    recovered,
)
from torch import Tensor

from blpa import ops
from blpa.codec import Codec
from blpa.kernels import NotAvailable, automatic, available, choose, compiled
from blpa.kernels.compiled import COMPILED
from blpa.kernels.reference import REFERENCE, RowBlockKernels, decode

CPU = torch.device("cpu")
ODD_SHAPES = [(1, 1), (1, 5), (2, 3), (3, 17), (5, 1), (63, 16), (64, 64), (65, 3), (127, 5), (130, 1), (130, 17)]

all_codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
odd_shapes = pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors come full of NaN or 0xFF, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-12 of values of size 10: float64 rounds to 1e-15 of them, over sums of at most 130."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@odd_shapes
@all_codecs
def test_normalise_rectify_encode(shape: tuple[int, int], codec: Codec | None) -> None:
    i = kernel_inputs(shape, codec)
    out = torch.empty_like(i.x)
    codes = REFERENCE.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=out)
    assert_same(out, (i.norm.gamma * (i.x - i.norm.mean) * i.norm.rstd + i.norm.beta).relu())
    if codec is None:
        assert codes is None
    else:
        assert codes is not None
        assert (codes.dtype, codes.shape) == (torch.uint8, (codec.packed_rows(shape[0]), shape[1]))


@odd_shapes
@all_codecs
def test_decode(shape: tuple[int, int], codec: Codec | None) -> None:
    i = kernel_inputs(shape, codec)
    out = torch.empty_like(i.x)
    REFERENCE.decode(i.saved, i.vectors, codec=codec, out=out)
    x_hat, relu_mask = recovered(i, codec)
    assert_same(out, (i.norm.gamma * x_hat + i.norm.beta).relu() * relu_mask)


@odd_shapes
@all_codecs
@pytest.mark.parametrize("constant_stats", [False, True])
def test_backward(shape: tuple[int, int], codec: Codec | None, constant_stats: bool) -> None:
    i = kernel_inputs(shape, codec)
    out = torch.empty_like(i.grad)
    dbeta, dgamma = REFERENCE.backward(i.grad, i.saved, i.vectors, codec=codec, constant_stats=constant_stats, out=out)
    x_hat, relu_mask = recovered(i, codec)
    dy = i.grad * relu_mask
    assert_same(dbeta, dy.sum(0))
    assert_same(dgamma, (dy * x_hat).sum(0))
    through_statistics = 0 if constant_stats else dy.mean(0) + x_hat * (dy * x_hat).mean(0)
    dx = i.norm.gamma * i.norm.rstd * (dy - through_statistics)
    assert_same(out, dx)
    options = {"codec": codec, "constant_stats": constant_stats, "out": out}
    REFERENCE.backward(i.grad, i.saved, i.vectors, **options, add=i.x)
    assert_same(out, dx + i.x)


@all_codecs
def test_backward_takes_the_means_of_others(codec: Codec | None) -> None:
    for shape, dtype in (((130, 5), torch.float64), ((3, 2), torch.bfloat16)):
        assert_the_means_of_others_reach_dx(REFERENCE, kernel_inputs(shape, codec, dtype), codec)


@all_codecs
def test_writing_over_the_input_changes_no_bit(codec: Codec | None) -> None:
    i = kernel_inputs((130, 5), codec, torch.float32)
    fresh, in_place = torch.empty_like(i.x), i.x.clone()
    codes = REFERENCE.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=fresh)
    codes_in_place = REFERENCE.normalise_rectify_encode(in_place, i.vectors, codec=codec, out=in_place)
    assert torch.equal(in_place, fresh)
    assert codes is codes_in_place is None or torch.equal(codes_in_place, codes)

    in_place = i.grad.clone()
    sums = REFERENCE.backward(i.grad, i.saved, i.vectors, codec=codec, constant_stats=False, out=fresh)
    sums_in_place = REFERENCE.backward(in_place, i.saved, i.vectors, codec=codec, constant_stats=False, out=in_place)
    assert torch.equal(in_place, fresh)
    assert torch.equal(sums_in_place, sums)


@all_codecs
def test_bf16_is_float32_arithmetic_rounded_once(codec: Codec | None) -> None:
    half = kernel_inputs((130, 5), codec, torch.bfloat16)
    single = half._replace(x=half.x.float(), grad=half.grad.float(), saved=half.saved if codec else half.saved.float())
    results = []
    for i in (half, single):
        a, decoded, dx = (torch.empty_like(i.x) for _ in range(3))
        codes = REFERENCE.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=a)
        REFERENCE.decode(i.saved, i.vectors, codec=codec, out=decoded)
        sums = REFERENCE.backward(i.grad, i.saved, i.vectors, codec=codec, constant_stats=False, out=dx)
        vectors = REFERENCE.channel_stats(i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=codec)
        results.append([a.bfloat16(), decoded.bfloat16(), dx.bfloat16(), sums, vectors, codes])
    for of_half, of_single in zip(*results, strict=True):
        assert of_half is of_single is None or torch.equal(of_half, of_single)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 130, 50_001])
@pytest.mark.parametrize("channel", CHANNELS)
def test_channel_stats_are_accurate_in_float32(rows: int, channel: str) -> None:
    mean, deviation = CHANNELS[channel]
    x = mean + deviation * torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    assert_stats_are_accurate(REFERENCE, x)


@pytest.mark.parametrize("row", [0, 1, 64, 129])
def test_one_outlier_spoils_no_statistics(row: int) -> None:
    x = torch.randn(130, 3, generator=torch.Generator().manual_seed(row))
    x[row] = 1e5
    assert_stats_are_accurate(REFERENCE, x)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler: none found"
)
# Compiling costs seconds a body: few shapes are enough where the shape decides little of the code.
FEW_SHAPES = [(131, 5), (64, 64), (1, 1)]
Shapes = list[tuple[int, int]]


def compiled_cases(shapes: Shapes) -> pytest.MarkDecorator:
    """Parametrize with one codec in these shapes and the others in one shape."""
    cases = [
        (Codec(4), torch.float32, shapes),
        (Codec(2), torch.bfloat16, [(131, 5)]),
        (Codec(8), torch.float32, [(131, 5)]),
        (None, torch.float64, [(131, 5)]),
    ]
    names = ["4bit-float32", "2bit-bfloat16", "8bit-float32", "exact-float64"]
    return pytest.mark.parametrize(("codec", "dtype", "shapes"), cases, ids=names)


@needs_compiler
@compiled_cases(FEW_SHAPES)
def test_compiled_activations_are_the_references(codec: Codec | None, dtype: torch.dtype, shapes: Shapes) -> None:
    for shape in shapes:
        i = kernel_inputs(shape, codec, dtype)
        expected, actual = torch.empty_like(i.x), i.x.clone()
        REFERENCE.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=expected)
        codes = COMPILED.normalise_rectify_encode(actual, i.vectors, codec=codec, out=actual)
        assert torch.equal(actual, expected)  # to the bit: contraction of a * b + c is off in compiled code
        assert codes is None or torch.equal(codes, i.saved)


@needs_compiler
@compiled_cases(FEW_SHAPES[:2])
def test_compiled_decode_is_the_references(codec: Codec | None, dtype: torch.dtype, shapes: Shapes) -> None:
    for shape in shapes:
        i = kernel_inputs(shape, codec, dtype)
        expected, actual = torch.empty_like(i.x), torch.empty_like(i.x)
        for kernels, out in ((REFERENCE, expected), (COMPILED, actual)):
            kernels.decode(i.saved, i.vectors, codec=codec, out=out)
        assert torch.equal(actual, expected)


@needs_compiler
@compiled_cases([*FEW_SHAPES, (128, 5)])
def test_compiled_backward_is_the_references(codec: Codec | None, dtype: torch.dtype, shapes: Shapes) -> None:
    for shape in shapes:
        assert_backward_is_the_references(COMPILED, kernel_inputs(shape, codec, dtype), codec, False, adds=True)


@needs_compiler
@pytest.mark.parametrize("constant_stats", [False, True])
def test_compiled_backward_without_a_shortcut_is_the_references(constant_stats: bool) -> None:
    i = kernel_inputs((131, 5), Codec(4), torch.float32)
    assert_backward_is_the_references(COMPILED, i, Codec(4), constant_stats)


@needs_compiler
@pytest.mark.parametrize("channel", CHANNELS)
def test_compiled_channel_stats_are_accurate(channel: str) -> None:
    mean, deviation = CHANNELS[channel]
    for shape in (*FEW_SHAPES, (63, 16), (50_001, 3)):
        x = mean + deviation * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        assert_stats_are_accurate(COMPILED, x)


@needs_compiler
def test_one_compilation_serves_every_number_of_channels() -> None:
    """Given Parameters, as layers give them, of which torch.compile would fix the sizes."""
    codec = Codec(4)
    with torch.no_grad():
        for channels in (16, 12, 20):
            x, gamma = torch.randn(640, channels), torch.nn.Parameter(torch.ones(channels))
            # The second sizes tell the compiler that sizes change; from the third on nothing may be compiled.
            with torch.compiler.set_stance("fail_on_recompile" if channels == 20 else "default"):
                vectors = COMPILED.channel_stats(x, gamma, gamma, eps=EPS, codec=codec)
                codes = COMPILED.normalise_rectify_encode(x, vectors, codec=codec, out=torch.empty_like(x))
                COMPILED.decode(codes, vectors, codec=codec, out=x)
                COMPILED.backward(x, codes, vectors, codec=codec, constant_stats=False, out=x)


@needs_compiler
def test_compiled_functions_allocate_no_activation(allocator_peak: Callable[[Callable[[], object]], int]) -> None:
    codec = Codec(4)
    i = kernel_inputs((8192, 16), codec, torch.float32)
    functions = {
        "channel_stats": lambda: COMPILED.channel_stats(i.x, i.norm.gamma, i.norm.beta, eps=EPS, codec=codec),
        "normalise_rectify_encode": lambda: COMPILED.normalise_rectify_encode(i.x, i.vectors, codec=codec, out=i.x),
        "decode": lambda: COMPILED.decode(i.saved, i.vectors, codec=codec, out=i.x),
        "backward": lambda: COMPILED.backward(
            i.grad, i.saved, i.vectors, codec=codec, constant_stats=False, out=i.grad
        ),
    }
    for name, function in functions.items():
        function()  # compiled first
        allowed = i.saved.nbytes if name == "normalise_rectify_encode" else 0  # the codes that it returns
        # Sums are made over strips of 64 rows first, and a few such sums are less than an eighth of the activation.
        assert allocator_peak(function) - allowed <= i.x.nbytes / 8, name


@needs_compiler
def test_every_name_gives_its_backend() -> None:
    assert choose("torch", CPU) is REFERENCE
    assert choose("inductor", CPU) is COMPILED
    assert choose("auto", CPU) is COMPILED
    assert [kernels.name for kernels in (REFERENCE, COMPILED)] == ["torch", "inductor"]


def test_a_gpu_gets_the_kernels_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(available, "_triton_failure", lambda device: "")
    for name in ("auto", "triton"):
        assert choose(name, torch.device("cuda"), elements=1).name == "triton"


@pytest.mark.parametrize("has_triton", [False, True])
def test_layers_that_name_no_backend_follow_the_device(has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: has_triton)
    monkeypatch.setattr(available, "_triton_failure", lambda device: "")
    automatic._runs_triton.cache_clear()
    cuda = torch.device("cuda")
    try:
        assert automatic.kernels_for(cuda, torch.float32).name == ("triton" if has_triton else "torch")
        for device, dtype in ((cuda, torch.float64), (CPU, torch.float32), (torch.device("meta"), torch.float32)):
            assert automatic.kernels_for(device, dtype) is REFERENCE
    finally:
        automatic._runs_triton.cache_clear()


def test_triton_is_refused_on_a_cpu() -> None:
    with pytest.raises(NotAvailable, match=r"kernels = triton: it is for CUDA GPUs, and the run is on the cpu; use"):
        choose("triton", CPU)


def test_auto_compiles_for_long_work_only() -> None:
    assert choose("auto", CPU, elements=1e6) is REFERENCE


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels = cuda: must be auto, torch, inductor or triton"):
        choose("cuda", CPU)


def test_missing_compiler_is_an_error_only_for_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose("auto", CPU) is REFERENCE
    with pytest.raises(NotAvailable, match=r"kernels = inductor: no C\+\+ compiler found"):
        choose("inductor", CPU)


def test_missing_triton_is_an_error_only_for_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    cuda = torch.device("cuda")
    assert choose("auto", cuda) is REFERENCE
    for name in ("inductor", "triton"):
        with pytest.raises(NotAvailable, match=rf"kernels = {name}: triton is missing"):
            choose(name, cuda)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_one_compiled_body_serves_every_number_of_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives up after eight variants of a function, and a process may run more batch sizes."""
    codec = Codec(bits)
    variants = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        variants.append(graph)
        return graph

    decoded = traced(decode, codec, backend=backend, monkeypatch=monkeypatch)
    for rows in (256, 512, 1024, 4096):
        x = torch.randn(rows, 3)
        vectors = REFERENCE.channel_stats(x, torch.ones(3), torch.zeros(3), eps=EPS, codec=codec)
        saved = REFERENCE.normalise_rectify_encode(x, vectors, codec=codec, out=torch.empty_like(x))
        assert saved is not None
        out = torch.empty_like(x)
        decoded(codec.row_blocks(out), saved, vectors)
        expected = torch.empty_like(x)
        REFERENCE.decode(saved, vectors, codec=codec, out=expected)
        assert torch.equal(out, expected)
    assert len(variants) == 1


def test_both_parts_of_backward_can_be_compiled_and_the_whole_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fuse(body: Callable[..., None], _: object, *constants: object) -> Callable[..., None]:
        calls.append(body.__name__)
        return traced(body, *constants, backend="eager", monkeypatch=monkeypatch)

    i, kernels = kernel_inputs((64, 5), Codec(8), torch.float32), RowBlockKernels("traced", fuse=fuse)
    results = []
    for means in (None, lambda sums: sums * (1 / 64)):
        out = torch.empty_like(i.grad)
        options: dict[str, Any] = {"codec": Codec(8), "constant_stats": False, "out": out, "means": means}
        results.append((out, kernels.backward(i.grad, i.saved, i.vectors, **options)))
    assert all(map(torch.equal, *results))
    assert calls == ["backward", "gradient_sums", "input_grad"]


def test_a_body_can_be_compiled_for_the_first_time_on_a_sum_made_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses to say whether such a view is a leaf, which its compiler asks."""
    kernels = RowBlockKernels(
        "traced", fuse=lambda body, _, *constants: traced(body, *constants, backend="eager", monkeypatch=monkeypatch)
    )
    leaf = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    gamma, beta = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    expected, vectors = ops.add_shortcut(leaf * 2, leaf * 3, gamma, beta, ops.BatchNorm(Codec(4), kernels=REFERENCE))
    total, found = ops.add_shortcut(leaf * 2, leaf * 3, gamma, beta, ops.BatchNorm(Codec(4), kernels=kernels))
    assert torch.equal(total, expected)
    assert found is not None and torch.equal(found, vectors)


def traced(
    body: Callable[..., None], *constants: object, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """A body as COMPILED compiles it, up to the code: that takes seconds."""

    def without_code(function: Callable[..., None]) -> Callable[..., None]:
        return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)

    monkeypatch.setattr(compiled, "_compiled", without_code)
    made: Callable[..., None] = compiled._compile.__wrapped__(body, (), *constants)
    return made
