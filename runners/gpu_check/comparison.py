"""Compare kernels with the reference, at the shapes of the network; and those of any layout with plain PyTorch."""

from functools import partial

import torch

from blpa import kernels
from blpa.codec import Codec
from blpa.convert import DEFAULT_CODECS
from blpa.kernels import Kernels, RunningStats, any_layout, library
from blpa.kernels.any_layout import Elementwise
from blpa.kernels.library import AnyLayoutKernels
from blpa.kernels.order import Order, dense
from blpa.kernels.reference import REFERENCE
from runners.training.network import EPS

SHAPES = ((131072, 16), (131072, 64), (32768, 32), (8192, 256), (40001, 20))
"""Rows and channels: activations of the network at batch 128, and one of odd size."""

LAYOUTS = (
    ((32, 64, 112, 112), 1, True), ((32, 64, 112, 112), 1, False), ((32, 256, 56, 56), 1, True),
    ((32, 2048, 7, 7), 1, False), ((5, 20, 13, 13), 1, True), ((32, 197, 768), 2, False),
)  # fmt: skip
"""Shapes, channel dimensions and whether channels are last: activations of a ResNet-50, an odd one, and tokens."""

CODECS = (Codec(4), Codec(8), Codec(2), None)
"""Codecs whose kernels are compared; None saves x itself."""


def wrong_cases(is_dry: bool, codec: Codec | None) -> tuple[int, list[str]]:
    """Compare the kernel functions with the reference.

    Args:
        is_dry: run at small size on the CPU.
        codec: codec of the saved codes; None saves x itself.

    Returns:
        The number of cases, and what is wrong.
    """
    device = torch.device("cpu" if is_dry else "cuda")
    backend = kernels.choose("auto", device, elements=0)
    shapes = ((333, 16), (40, 5)) if is_dry else SHAPES
    cases = [(rows, channels, dtype) for rows, channels in shapes for dtype in (torch.float32, torch.bfloat16)]
    wrong = [
        f"{name} at [{rows}, {channels}], {dtype}"
        for rows, channels, dtype in cases
        for name in differences(backend, rows, channels, dtype=dtype, codec=codec, device=device)
    ]
    return len(cases), wrong


def differences(
    backend: Kernels, rows: int, channels: int, *, dtype: torch.dtype, codec: Codec | None, device: torch.device
) -> list[str]:
    """Compare a backend with the reference: codes and activations bit by bit, sums and gradients within a tolerance.

    Args:
        backend: the backend.
        rows: rows of the activation.
        channels: channels of the activation.
        dtype: dtype of the activation.
        codec: of the saved codes; None saves x itself.
        device: where to compute.

    Returns:
        Names of the results that differ; empty where all agree.
    """
    x, grad, other = (3 * torch.randn(3, rows, channels, device=device) + 1).to(dtype)
    counter = torch.zeros(channels, dtype=torch.int32, device=device)  # as in a layer
    gamma, beta = torch.randn(2, channels, device=device)
    vectors = backend.channel_stats(x, gamma, beta, eps=EPS, codec=codec, counter=counter)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    # NaN shows an output that is not written.
    a, reference_a, decoded, reference_decoded, reference_dx = (torch.full_like(x, torch.nan) for _ in range(5))
    codes = backend.normalise_rectify_encode(x, vectors, codec=codec, out=a)
    reference_codes = REFERENCE.normalise_rectify_encode(x, vectors, codec=codec, out=reference_a)
    saved = x if reference_codes is None else reference_codes
    backend.decode(saved, vectors, codec=codec, out=decoded)
    REFERENCE.decode(saved, vectors, codec=codec, out=reference_decoded)
    dx = grad.clone()  # written over, as in the network
    backward = partial(
        backend.backward, saved=saved, vectors=vectors, codec=codec, constant_stats=False, counter=counter
    )
    sums = backward(dx, out=dx, add=other)
    sums_again = backward(grad, out=torch.empty_like(grad))
    reference_sums = REFERENCE.backward(
        grad, saved, vectors, codec=codec, constant_stats=False, out=reference_dx, add=other
    )
    # The sum x + other, written over a copy of x, and its statistics; dW [16, C] of a 1x1 convolution.
    total = x.clone()
    of_total = backend.channel_stats(total, gamma, beta, eps=EPS, codec=codec, add=other)
    of_sum = backend.channel_stats(x + other, gamma, beta, eps=EPS, codec=codec)
    grad_out = torch.randn(rows, 16, device=device).to(dtype)
    weight_grad = backend.pointwise_weight_grad(grad_out, saved, vectors, codec=codec)
    products = grad_out.double().T @ reference_decoded.double()
    sizes = grad_out.double().abs().T @ reference_decoded.double().abs()
    # tf32 truncates each factor by at most 2^-10; float32 sums round by at most rows 2^-24 of their sizes.
    bound = (2.0**-9 + rows * 2.0**-24) * sizes
    # dX = gamma rstd (dY - ...) + other: it is rounded to the activation's dtype, after sums in another order.
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    are_right = {
        "mean": torch.allclose(vectors[0].double(), mean, rtol=1e-5, atol=1e-5),
        "variance": torch.allclose(vectors[1].double(), var, rtol=1e-4, atol=1e-5),
        "activation": torch.equal(a, reference_a),
        "codes": codes is None or reference_codes is None or torch.equal(codes, reference_codes),
        "decoded activation": torch.equal(decoded, reference_decoded),
        "sums": torch.allclose(sums, reference_sums, rtol=1e-3, atol=rows * 1e-5),
        "input gradient": torch.allclose(dx.float(), reference_dx.float(), rtol=near, atol=near),
        "sums once more": torch.equal(sums_again, sums) and not counter.any(),
        "sum": torch.equal(total, x + other),
        "statistics of the sum": torch.equal(of_total, of_sum),
        "weight gradient": weight_grad is None or bool(((weight_grad - products).abs() <= bound).all()),
    }
    return [name for name, is_right in are_right.items() if not is_right]


def wrong_cases_of_any_layout(is_dry: bool, codec: Codec | None) -> tuple[int, list[str]]:
    """Compare the kernels that converted networks run on with plain PyTorch; as `wrong_cases`, in convert's codecs."""
    device = torch.device("cpu" if is_dry else "cuda")
    backend = library.kernels_for(device)
    if backend is any_layout:
        return 0, ["not compared: Triton does not support this GPU, and plain PyTorch is what runs"]
    codec = DEFAULT_CODECS[codec.bits] if codec else None
    layouts = (((32, 6, 15, 16), 1, True), ((13, 60, 40), 2, False)) if is_dry else LAYOUTS
    cases = [(layout, dtype) for layout in layouts for dtype in (torch.float32, torch.bfloat16)]
    wrong = [
        f"{name} at {list(shape)}{', channels-last' if channels_last else ''}, {dtype}"
        for (shape, channel, channels_last), dtype in cases
        for name in differences_of_any_layout(
            backend, torch.randn(shape, device=device).to(dtype), channel, channels_last, codec
        )
    ]
    return len(cases), wrong


def differences_of_any_layout(
    backend: AnyLayoutKernels, x: torch.Tensor, channel: int, channels_last: bool, codec: Codec | None
) -> list[str]:
    """Compare a backend with any_layout: grids, codes and what they decode to bit by bit, sums within a tolerance.

    Args:
        backend: the backend.
        x: an activation.
        channel: its channel dimension.
        channels_last: whether to lay it out with channels last.
        codec: of the saved codes; None saves full precision.

    Returns:
        Names of the results that differ; empty where all agree.
    """
    order, bits = Order.of(x.shape, channel, channels_last), codec.bits if codec else 0
    x = dense(3 * x + 1, channels_last)
    grad = torch.randn_like(x)
    gamma, beta = torch.randn(2, order.channels, device=x.device)
    stats = backend.channel_stats(x, order)
    centre, scale = stats[0], (stats[1] + 1e-5).rsqrt()
    signs = dense(x.flip(0), channels_last)  # of any y

    def results(functions: AnyLayoutKernels) -> dict[str, torch.Tensor]:
        own = functions.grid_vectors(stats, None, None, None, None, codec)
        vectors = functions.grid_vectors(stats, gamma, beta, centre, scale, codec)
        y, a, dy, dx, normed = (torch.full_like(x, torch.nan) for _ in range(5))  # NaN shows what is not written
        of_norm = functions.normalise_encode(x, vectors, order, bits, centre, scale, False, normed)
        codes = functions.encode(x, signs, vectors, order, bits, centre.unsqueeze(0), scale.unsqueeze(0))
        functions.decode(codes, vectors, order, bits, None, y)
        functions.decode(codes, vectors, order, bits, Elementwise("silu"), a)
        functions.elementwise_grad(grad, codes, vectors, order, bits, Elementwise("relu"), dy)
        means = stats[:2].unsqueeze(1)  # any
        functions.input_grad(grad, codes, vectors, order, bits, scale.unsqueeze(0), means, dx, rectified=True)
        found = {
            "grid": vectors, "grid of an input": own, "batch norm": normed, "its codes": of_norm, "codes": codes,
            "codes of an input": functions.encode(x, x, own, order, bits, None, None), "decoded": y,
            "gradient of ReLU": dy, "input gradient": dx, "SiLU": a,
        }  # fmt: skip
        for per_sample in (False, True):
            sums = functions.gradient_sums(grad, codes, vectors, order, bits, per_sample=per_sample, rectified=True)
            found["sums per sample" if per_sample else "sums"] = sums
        if order.inner == 1:
            found["means of rows"] = functions.row_means(grad, codes, vectors, order, bits)
        return found

    found, expected = results(backend), results(any_layout)
    # The sign is that of y as the backend rounded it.
    expected["its codes"] = any_layout.encode(
        x, found["batch norm"], expected["grid"], order, bits, centre.unsqueeze(0), scale.unsqueeze(0)
    )
    rows = order.outer * order.inner
    wide = any_layout.channel_stats(x.double(), order)
    # The exponential of a GPU is within 1e-6 (1 + |y|), a batch norm may multiply and add at once (PyTorch's on a CPU
    # does), and neighbours in bfloat16 are up to 2^-7 of their size apart. A sum of n terms of size 1 to 10 rounds by
    # some sqrt(n) 2^-24 of them in any order, ten times less than is allowed; a lost term is more.
    of_sums, of_rounding = 1e-5 * rows**0.5, 2.0**-7 if x.dtype == torch.bfloat16 else 1e-5
    near = {
        "SiLU": (of_rounding, 1e-5), "batch norm": (of_rounding, 1e-5), "sums": (1e-5, of_sums),
        "sums per sample": (1e-5, of_sums), "means of rows": (1e-5, 1e-5),
    }  # fmt: skip
    wrong = [] if torch.allclose(stats.double(), wide, rtol=1e-5, atol=1e-5) else ["statistics"]
    batch_norm_vectors = getattr(backend, "batch_norm_vectors", None)  # on a CPU batch norms have PyTorch's bits
    if batch_norm_vectors is not None:
        averages = RunningStats(torch.zeros_like(gamma), torch.zeros_like(gamma), 0.5)
        vectors, mean, rstd = batch_norm_vectors(x, order, gamma, beta, averages, 1e-5, codec, 0.0)
        all_found = torch.stack((mean, rstd, 2 * averages.mean, 2 * averages.var)).double()
        all_wide = torch.stack((wide[0], (wide[1] + 1e-5).rsqrt(), wide[0], wide[1] * rows / (rows - 1)))
        is_right = torch.equal(vectors, backend.grid_vectors(stats, gamma, beta, mean, rstd, codec))
        is_right = is_right and torch.allclose(all_found, all_wide, rtol=1e-5, atol=1e-5)
        wrong += [] if is_right else ["vectors of a batch norm"]
    for name, one in found.items():
        if name in near:
            relative, absolute = near[name]
            is_right = torch.allclose(one.float(), expected[name].float(), rtol=relative, atol=absolute)
        else:
            is_right = torch.equal(one, expected[name])
        wrong += [] if is_right else [name]
    return wrong
