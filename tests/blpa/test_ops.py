"""The autograd functions against the closed form and against PyTorch's own layers, and what they refuse.

Almost all in float64, where a wrong formula and a rounding are ten orders of magnitude apart.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.codec import Codec
from blpa.convolution import Convolution
from blpa.ops import (
    BatchNorm,
    add_shortcut,
    average_pool,
    batch_norm_relu,
    batch_norm_relu_conv2d,
    batch_norm_relu_conv2d_with_shortcut,
    conv2d,
)

CODECS = [Codec(8), Codec(4), Codec(2), None]
EPS = 1e-3
PADDED = Convolution(padding=(1, 1))
LAST = torch.channels_last

all_codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


class Inputs(NamedTuple):
    """x, gamma and beta, leaves of one BN-ReLU-conv with 4 channels, and running averages for evaluation."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    running_stats: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.gamma, self.beta]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(*, size: tuple[int, int] = (5, 4), dtype: torch.dtype = torch.float64) -> Inputs:
    """Gamma of both signs, and zero with a positive and a negative beta."""
    x = 2 * random(3, 4, *size, dtype=dtype).contiguous(memory_format=LAST) + 1
    gamma = torch.tensor([1.3, -0.7, 0.0, 0.0], dtype=dtype)
    beta = torch.tensor([0.2, 0.4, 0.5, -0.5], dtype=dtype)
    running_stats = {
        "running_mean": random(4, seed=1, dtype=dtype),
        "running_var": random(4, seed=2, dtype=dtype).exp(),
    }
    return Inputs(x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_(), running_stats)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def clones(running_stats: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in running_stats.items()}


Read = Callable[[Callable[..., Tensor], Tensor, Tensor, list[Tensor]], Tensor]
"""(conv, a, x, weights) -> out: how a network reads an activation a and, for a shortcut, its input x."""


def by_one_conv(conv: Callable[..., Tensor], a: Tensor, x: Tensor, w: list[Tensor]) -> Tensor:
    return conv(a, w[0], padding=(1, 1))


def ours(i: Inputs, read: Read, w: list[Tensor], codec: Codec | None, **options: Any) -> Tensor:
    """Out of the ops."""
    x = i.x.clone()  # no leaf, so that it may be overwritten
    a, saved = batch_norm_relu(
        x, i.gamma, i.beta, BatchNorm(codec=codec, eps=EPS, **clones(i.running_stats), **options)
    )
    return read(lambda a, weight, **how: conv2d(a, saved, weight, convolution=Convolution(**how)), a, x, w)


BNReLUConv = Callable[..., Tensor]
"""(inputs, weight, codec, **options) -> out: batch norm, ReLU and one convolution of it, padded by 1."""


def in_two(i: Inputs, weight: Tensor, codec: Codec | None, **options: Any) -> Tensor:
    return ours(i, by_one_conv, [weight], codec, **options)


def in_one(i: Inputs, weight: Tensor, codec: Codec | None, **options: Any) -> Tensor:
    bn = BatchNorm(codec=codec, eps=EPS, **clones(i.running_stats), **options)
    return batch_norm_relu_conv2d(i.x.clone(), i.gamma, i.beta, weight, bn, convolution=PADDED)


both_ways = pytest.mark.parametrize("bn_relu_conv", [in_two, in_one])


def closed_form(
    i: Inputs, read: Read, w: list[Tensor], grad: Tensor, codec: Codec | None, *, training: bool = True
) -> list[Tensor]:
    """dX, dgamma, dbeta and dW by the formulas of ops.py, from plain tensor arithmetic and the codec alone."""
    x, gamma, beta = (leaf.detach() for leaf in i.leaves)
    shape = x.permute(0, 2, 3, 1).shape
    x_rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    of_x = x_rows.mean(0), x_rows.var(0, correction=0)
    mean, var = of_x if training else i.running_stats.values()
    rstd = 1 / (var + EPS).sqrt()
    x_hat = (x_rows - mean) * rstd
    relu_mask = gamma * x_hat + beta > 0
    if codec is not None:
        grid = codec.grid(gamma, beta)
        if not training:  # the bins follow x
            grid = codec.grid(gamma, beta, mean=(of_x[0] - mean) * rstd, deviation=rstd * (of_x[1] + EPS).sqrt())
        x_hat, sign = codec.decode(codec.encode(x_hat, gamma * x_hat + beta, grid), grid)
        relu_mask = sign > 0

    a = ((gamma * x_hat + beta).relu() * relu_mask).view(shape).permute(0, 3, 1, 2).requires_grad_()
    shortcut = x.clone().requires_grad_()
    out = read(F.conv2d, a, shortcut, w)  # linear in a and x: their gradients do not depend on their values
    da, dx_shortcut, *dw = torch.autograd.grad(out, [a, shortcut, *w], grad, materialize_grads=True)

    dy = da.permute(0, 2, 3, 1).reshape(-1, 4) * relu_mask
    u = gamma * dy
    through_statistics = u.mean(0) + x_hat * (u * x_hat).mean(0) if training else 0
    dx = (rstd * (u - through_statistics)).view(shape).permute(0, 3, 1, 2)
    return [dx + dx_shortcut, (dy * x_hat).sum(0), dy.sum(0), *dw]


def assert_all_close(actual: Any, expected: Any) -> None:
    """Equal to 1e-10: sums of a few hundred products of size up to 100, of which float64 rounds each by 1e-14."""
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=1e-10)


# ---- gradients ------------------------------------------------------------------------------------------------------


@train_and_eval
def test_gradcheck_of_batch_norm_relu(training: bool) -> None:
    i = inputs()

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return batch_norm_relu(x, gamma, beta, BatchNorm(codec=None, training=training, **clones(i.running_stats)))[0]

    assert torch.autograd.gradcheck(function, i.leaves)


@train_and_eval
def test_gradcheck_through_the_convolution(training: bool) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))

    def function(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        a, saved = batch_norm_relu(x, gamma, beta, BatchNorm(codec=None, training=training, **clones(i.running_stats)))
        return conv2d(a, saved, weight, convolution=PADDED)

    assert torch.autograd.gradcheck(function, [*i.leaves, *w])


@both_ways
@all_codecs
@train_and_eval
def test_gradients_equal_the_closed_form_on_the_decoded_activation(
    codec: Codec | None, training: bool, bn_relu_conv: BNReLUConv
) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    out = bn_relu_conv(i, w[0], codec, training=training)
    grad = random(*out.shape, seed=9)
    expected = closed_form(i, by_one_conv, w, grad, codec, training=training)
    assert_all_close(torch.autograd.grad(out, [*i.leaves, *w], grad), expected)


@pytest.mark.parametrize(
    ("codec", "options"),
    [(codec, options) for options in ({}, {"overwrite_x": True}, {"training": False}) for codec in CODECS]
    + [(codec, {"forward_from_code": True}) for codec in CODECS if codec],
    ids=str,
)
@pytest.mark.parametrize(
    "convolution",
    [Convolution(), Convolution(stride=2, padding=(1, 0)), Convolution(dilation=2, padding=2, groups=2)],
    ids=str,
)
def test_in_one_and_in_two_are_the_same_bits(
    codec: Codec | None, convolution: Convolution, options: dict[str, bool]
) -> None:
    i, w = inputs(), weights((2, 4 // convolution.groups, 3, 3))
    results = []
    for fused in (False, True):
        running_stats = clones(i.running_stats)
        arguments = i.x * 1, i.gamma, i.beta
        if fused:
            bn = BatchNorm(codec=codec, **running_stats, **options)
            out = batch_norm_relu_conv2d(*arguments, *w, bn, convolution=convolution)
        else:
            a, saved = batch_norm_relu(*arguments, BatchNorm(codec=codec, **running_stats, **options))
            out = conv2d(a, saved, *w, convolution=convolution)
        grad = random(*out.shape, seed=9)
        results.append([out, *running_stats.values(), *torch.autograd.grad(out, [*i.leaves, *w], grad)])
    assert all(map(torch.equal, *results))


@both_ways
def test_overwriting_a_tensor_that_another_gradient_needs_is_refused(
    bn_relu_conv: BNReLUConv, monkeypatch: pytest.MonkeyPatch
) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    x = i.x * 1
    square = x.square().sum()  # its gradient needs x
    monkeypatch.setattr(Tensor, "clone", lambda tensor: tensor)  # the helpers take a copy of x
    out = bn_relu_conv(i._replace(x=x), w[0], Codec(4), overwrite_x=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        (out.sum() + square).backward()


@pytest.mark.parametrize("codec", [Codec(4), None], ids=str)
@pytest.mark.parametrize("x_is_read", [False, True], ids=["x dead", "x read by a shortcut"])
@pytest.mark.parametrize(
    ("convolutions", "a_is_read"), [(1, False), (2, False), (3, False), (0, True), (1, True), (2, True), (3, True)]
)
@pytest.mark.parametrize("order", [1, -1], ids=["", "reversed"])
def test_shared_readers(codec: Codec | None, convolutions: int, a_is_read: bool, x_is_read: bool, order: int) -> None:
    """Every reader's out is a term of one sum, so that autograd hands one and the same gradient to all of them."""

    def read(conv: Callable[..., Tensor], a: Tensor, x: Tensor, w: list[Tensor]) -> Tensor:
        terms = [lambda weight=weight: conv(a, weight, padding=(1, 1)) for weight in w]
        terms += [lambda: a] * a_is_read + [lambda: x] * x_is_read
        first, *others = [term() for term in terms[::order]]
        return sum(others, start=first)

    i, w = inputs(), weights(*[(4, 4, 3, 3)] * convolutions)
    grad = random(*i.x.shape, seed=9).contiguous(memory_format=LAST)
    grad_before = grad.clone()
    out = ours(i, read, w, codec, overwrite_x=not x_is_read)
    assert_all_close(torch.autograd.grad(out, [*i.leaves, *w], grad), closed_form(i, read, w, grad, codec))
    assert torch.equal(grad, grad_before)  # it is the caller's


@both_ways
@all_codecs
def test_backward_twice_gives_the_same_gradients(codec: Codec | None, bn_relu_conv: BNReLUConv) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    out = bn_relu_conv(i, w[0], codec)
    first, second = (torch.autograd.grad(out.square().sum(), [*i.leaves, *w], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both_ways
@all_codecs
@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 3], [1, 2]], ids=str)
def test_gradients_of_some_inputs_only(codec: Codec | None, wanted: list[int], bn_relu_conv: BNReLUConv) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    leaves = [*i.leaves, *w]
    loss = bn_relu_conv(i, w[0], codec).square().sum()
    some = torch.autograd.grad(loss, [leaves[k] for k in wanted], retain_graph=True)
    every = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, some, [every[k] for k in wanted]))


@both_ways
@all_codecs
@pytest.mark.parametrize("frozen", range(4), ids=["x", "gamma", "beta", "weight"])
def test_frozen_inputs_leave_the_other_gradients_alone(
    codec: Codec | None, frozen: int, bn_relu_conv: BNReLUConv
) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    leaves = [*i.leaves, *w]
    expected = torch.autograd.grad(bn_relu_conv(i, w[0], codec).square().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    bn_relu_conv(i, w[0], codec).square().sum().backward()
    assert leaves[frozen].grad is None
    assert all(torch.equal(leaves[k].grad, expected[k]) for k in range(4) if k != frozen)


def test_gradient_of_the_activation_itself() -> None:
    """Asked for together with that of x, which is made from it, and may not take its place."""
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    loss = conv2d(a, saved, *w).square().sum()
    (alone,) = torch.autograd.grad(loss, [a], retain_graph=True)
    together, _ = torch.autograd.grad(loss, [a, i.x])
    assert torch.equal(together, alone)


def test_retained_gradient_of_the_activation() -> None:
    """By PyTorch, and by a hook that does not clone it."""
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    loss = conv2d(a, saved, *w).square().sum()
    (expected,) = torch.autograd.grad(loss, [a], retain_graph=True)
    a.retain_grad()
    seen: list[Tensor] = []
    a.register_hook(seen.append)
    loss.backward()
    assert torch.equal(a.grad, expected)
    assert torch.equal(seen[0], expected)


def with_shortcut(
    i: Inputs, x: Tensor, weight: Tensor, codec: Codec | None, *, fused: bool, training: bool = True
) -> tuple[Tensor, Tensor]:
    """Out, and x for a shortcut."""
    bn = BatchNorm(codec=codec, eps=EPS, training=training, **clones(i.running_stats))
    if fused:
        return batch_norm_relu_conv2d_with_shortcut(x, i.gamma, i.beta, weight, bn, convolution=PADDED)
    return batch_norm_relu_conv2d(x, i.gamma, i.beta, weight, bn, convolution=PADDED), x


@all_codecs
@train_and_eval
@pytest.mark.parametrize("readers", [["out"], ["shortcut"], ["out", "shortcut"]], ids="+".join)
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=str)
def test_a_shortcut_s_gradient_is_added_to_the_bit(
    codec: Codec | None, training: bool, readers: list[str], memory_format: torch.memory_format
) -> None:
    i, (weight,) = inputs(), weights((5, 4, 3, 3))
    results = []
    for fused in (True, False):
        x = i.x.clone(memory_format=memory_format)
        out, again = with_shortcut(i, x, weight, codec, fused=fused, training=training)
        losses = {"out": out.square().sum(), "shortcut": (again**3).sum()}
        loss = torch.stack([losses[reader] for reader in readers]).sum()
        gradients = torch.autograd.grad(loss, [*i.leaves, weight], allow_unused=True)
        results.append([out, again, *gradients])
    for found, expected in zip(*results, strict=True):
        assert found is expected is None or torch.equal(found, expected)


@all_codecs
def test_a_shortcut_s_gradient_is_not_written_over(codec: Codec | None) -> None:
    i, (weight,) = inputs(), weights((5, 4, 3, 3))
    out, again = with_shortcut(i, i.x.clone(), weight, codec, fused=True)
    seen = []
    again.register_hook(lambda grad: seen.append((grad, grad.clone())))
    (out.sum() + again.square().sum()).backward()
    ((grad, as_it_was),) = seen
    assert torch.equal(grad, as_it_was)


def test_an_x_that_a_shortcut_reads_is_not_to_be_overwritten() -> None:
    i, (weight,) = inputs(), weights((5, 4, 3, 3))
    with pytest.raises(ValueError, match="overwrite_x = True, but a shortcut reads x again"):
        batch_norm_relu_conv2d_with_shortcut(i.x * 1, *i.leaves[1:], weight, BatchNorm(codec=None, overwrite_x=True))


@all_codecs
@train_and_eval
def test_a_sum_made_with_its_statistics_is_the_sum_made_before(codec: Codec | None, training: bool) -> None:
    results = []
    for together in (False, True):
        before, gamma, beta, running_stats = inputs(dtype=torch.float32)
        shortcut = random(3, 4, 5, 4, seed=3, dtype=torch.float32).contiguous(memory_format=LAST).requires_grad_()
        weight = random(2, 4, 3, 3, seed=4, dtype=torch.float32).requires_grad_()
        counted = torch.tensor(0)
        bn = BatchNorm(codec=codec, training=training, num_batches_tracked=counted, **running_stats)
        x, statistics = before * 1, None
        if together:
            at = x.data_ptr()
            x, statistics = add_shortcut(x, shortcut, gamma, beta, bn)
            assert x.data_ptr() == at
            assert (statistics is None) is not training
        else:
            x = x + shortcut
        options = {"convolution": PADDED, "statistics": statistics}
        out, x = batch_norm_relu_conv2d_with_shortcut(x, gamma, beta, weight, bn, **options)
        leaves = [before, shortcut, gamma, beta, weight]
        gradients = torch.autograd.grad((out.square().sum() + x.pow(3).sum()), leaves)
        results.append([out, x, *running_stats.values(), counted, *gradients])
    assert all(map(torch.equal, *results))


def test_a_sum_of_other_tensors_is_made_as_any() -> None:
    x, gamma, beta, _ = inputs()
    bn = BatchNorm(codec=Codec(4))
    row = torch.ones(4, dtype=torch.float64)
    assert torch.equal(add_shortcut(x * 1, row, gamma, beta, bn)[0], x + row)
    with torch.no_grad():
        total, statistics = add_shortcut(x * 1, x, gamma, beta, bn)
    assert torch.equal(total, 2 * x)
    assert statistics is None
    with pytest.raises(ValueError, match=r"gamma is \[3\]: must be \[4\]"):
        add_shortcut(x * 1, x, gamma[:3], beta, bn)


def test_zero_gamma_gets_its_gradient() -> None:
    """Departure 3: the authors' code clamps gamma to 1e-8 and more."""
    i = inputs()
    a, _ = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    a.backward(random(*a.shape, seed=9))
    assert i.gamma.grad[2] != 0  # its beta is positive
    assert i.gamma.grad[3] == 0  # its beta is negative: ReLU is off


@all_codecs
@pytest.mark.parametrize("overwrite_x", [False, True])
def test_memory_format_of_x_changes_nothing(codec: Codec | None, overwrite_x: bool) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    gradients = []
    for x in (i.x, i.x.detach().contiguous().requires_grad_()):
        out = ours(i._replace(x=x), by_one_conv, w, codec, overwrite_x=overwrite_x)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, i.gamma, i.beta, *w]))
    assert_all_close(*gradients)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 input", "autocast"])
@all_codecs
def test_bf16(codec: Codec | None, autocast: bool) -> None:
    """Of size and sign as the closed form's: a wrong formula would be off by tens of per cent.

    A rounding to bf16 is of 2^-9 at most. A CPU with instructions for bf16 makes one or two of them on the way, one
    without makes one more for each of the 9 taps of the transposed convolution, whose sum it has in bf16: 2% in all.
    """
    dtype = torch.float32 if autocast else torch.bfloat16
    i = inputs(dtype=dtype)
    w = [random(2, 4, 3, 3, dtype=dtype).requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ours(i, by_one_conv, w, codec)
    assert out.dtype == torch.bfloat16
    grad = random(*out.shape, seed=9).to(out.dtype)
    gradients = torch.autograd.grad(out, [*i.leaves, *w], grad)
    double = Inputs(*(leaf.detach().double() for leaf in i.leaves), i.running_stats)
    wide = [w[0].detach().double().requires_grad_()]
    for actual, expected in zip(gradients, closed_form(double, by_one_conv, wide, grad.double(), codec), strict=True):
        assert actual.dtype == dtype
        assert (actual - expected).norm() <= 0.02 * expected.norm()


# ---- forward pass ---------------------------------------------------------------------------------------------------


@train_and_eval
def test_no_bit_of_the_forward_pass_depends_on_the_code(training: bool) -> None:
    i, w = inputs(dtype=torch.float32), [random(2, 4, 3, 3, dtype=torch.float32)]

    def out(codec: Codec | None, overwrite_x: bool) -> Tensor:
        return ours(i, by_one_conv, w, codec, training=training, overwrite_x=overwrite_x)

    expected = out(None, False)
    assert all(torch.equal(out(codec, overwrite_x), expected) for codec in CODECS for overwrite_x in (False, True))


@all_codecs
@train_and_eval
def test_activation_is_that_of_stock_layers(codec: Codec | None, training: bool) -> None:
    i = inputs()
    stock = F.relu(
        F.batch_norm(i.x, **clones(i.running_stats), weight=i.gamma, bias=i.beta, training=training, eps=EPS)
    )
    a, _ = batch_norm_relu(
        i.x, i.gamma, i.beta, BatchNorm(codec=codec, training=training, eps=EPS, **clones(i.running_stats))
    )
    assert_all_close([a], [stock])


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.1, 1.0])
@all_codecs
def test_running_averages_are_those_of_stock_layers(codec: Codec | None, momentum: float) -> None:
    stock = nn.BatchNorm2d(4, momentum=momentum, dtype=torch.float64)
    i, running_stats = inputs(), {"running_mean": torch.zeros(4).double(), "running_var": torch.ones(4).double()}
    for step in range(5):
        x = i.x * (step + 1) + step
        stock(x)
        batch_norm_relu(x, i.gamma, i.beta, BatchNorm(codec=codec, momentum=momentum, **running_stats))
    assert_all_close(running_stats.values(), [stock.running_mean, stock.running_var])


@all_codecs
def test_evaluation_leaves_the_running_averages_alone(codec: Codec | None) -> None:
    i = inputs()
    before = clones(i.running_stats)
    batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec, training=False, **i.running_stats))
    assert all(torch.equal(i.running_stats[name], before[name]) for name in before)


@all_codecs
def test_evaluation_without_running_averages_takes_those_of_the_batch(codec: Codec | None) -> None:
    i = inputs()
    in_training, in_evaluation = (
        batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec, training=training))[0]
        for training in (True, False)
    )
    assert torch.equal(in_evaluation, in_training)


@pytest.mark.parametrize("codec", CODECS[:3], ids=str)
def test_naive_baseline_feeds_the_decoded_activation_forward(codec: Codec) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec, forward_from_code=True))
    exact, kept_by_exact = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec))
    assert not torch.equal(a, exact)
    assert torch.equal(a, kept_by_exact.decode(a.dtype))
    with torch.no_grad():
        without_gradient, _ = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec, forward_from_code=True))
    assert torch.equal(without_gradient, a)
    out = conv2d(a, saved, *w, convolution=PADDED)
    grad = random(*out.shape, seed=9)
    straight_through = closed_form(i, by_one_conv, w, grad, codec)
    assert_all_close(torch.autograd.grad(out, [*i.leaves, *w], grad), straight_through)


@all_codecs
def test_nothing_is_saved_where_no_gradient_is_recorded(codec: Codec | None) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    expected = ours(i, by_one_conv, w, codec)
    with torch.no_grad():
        a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec))
        assert saved is None
        assert torch.equal(conv2d(a, saved, *w, convolution=PADDED), expected)


# ---- what is saved, and how long ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS[:3], ids=str)
def test_codes_are_freed_by_the_backward_pass(codec: Codec) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec))
    codes = weakref.ref(saved.values)
    out = conv2d(a, saved, *w)
    del a, saved
    assert codes() is not None
    out.sum().backward()
    assert codes() is None


def test_activation_is_not_saved() -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    out = conv2d(a, saved, *w)
    activation = weakref.ref(a)
    del a
    assert out.requires_grad
    assert activation() is None


@pytest.mark.parametrize(
    ("codec", "values"), [(Codec(8), 240), (Codec(4), 120), (Codec(2), 60), (None, 240 * 4)], ids=str
)
def test_saved_bytes(codec: Codec | None, values: int) -> None:
    """An activation of 3 x 5 x 4 pixels in 4 channels: 240 elements; and nine per-channel vectors in float32."""
    i = inputs(dtype=torch.float32)
    _, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec))
    assert saved.nbytes == values + 9 * 4 * 4


# ---- refusals -------------------------------------------------------------------------------------------------------


@all_codecs
@pytest.mark.parametrize("reader", ["convolution", "convolution in one", "other"])
def test_second_derivatives_are_refused(codec: Codec | None, reader: str) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=codec))
    out = {
        "convolution": lambda: conv2d(a, saved, *w),
        "convolution in one": lambda: in_one(i, w[0], codec),
        "other": lambda: a,
    }[reader]()
    with pytest.raises(RuntimeError, match=r"^second derivatives \(create_graph=True\) are not supported"):
        torch.autograd.grad(out.square().sum(), [i.x], create_graph=True)


def test_the_stock_network_has_second_derivatives() -> None:
    x = random(2, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: average_pool(x, 2).square(), [x])


# PyTorch's own forward-mode derivatives still use what it deprecates.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def weighted_sum(x: Tensor, codec: Codec | None, *, fused: bool = False) -> Tensor:
    arguments = x, torch.ones(4).double(), torch.zeros(4).double()
    weight = random(2, 4, 3, 3)
    if fused:
        return batch_norm_relu_conv2d(*arguments, weight, BatchNorm(codec=codec)).sum()
    a, saved = batch_norm_relu(*arguments, BatchNorm(codec=codec))
    return conv2d(a, saved, weight).sum()


@forward_mode
@all_codecs
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
        lambda f, x: torch.func.hessian(f)(x),
    ],
    ids=["grad", "vjp", "jvp", "vmap", "hessian"],
)
@pytest.mark.parametrize("fused", [False, True], ids=["in two", "in one"])
def test_function_transforms_are_refused(transform: Callable[..., Any], codec: Codec | None, fused: bool) -> None:
    with pytest.raises(RuntimeError, match=r"functorch transforms|vmap"):
        transform(lambda x: weighted_sum(x, codec, fused=fused), random(3, 4, 5, 5))


@forward_mode
@pytest.mark.parametrize("fused", [False, True], ids=["in two", "in one"])
def test_forward_mode_derivatives_are_refused(fused: bool) -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(random(3, 4, 5, 5), torch.ones(3, 4, 5, 5).double())
        with pytest.raises(NotImplementedError, match=r"forward mode AD"):
            weighted_sum(x, Codec(4), fused=fused)


@both_ways
@all_codecs
def test_weight_changed_before_the_backward_pass_is_refused(codec: Codec | None, bn_relu_conv: BNReLUConv) -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    loss = bn_relu_conv(i, w[0], codec).sum()
    with torch.no_grad():
        w[0].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


@both_ways
@all_codecs
def test_gamma_and_beta_may_change_before_the_backward_pass(codec: Codec | None, bn_relu_conv: BNReLUConv) -> None:
    """The gradient is that of the forward pass that was, whose gamma and beta are saved."""
    i, w = inputs(), weights((2, 4, 3, 3))
    expected = torch.autograd.grad(bn_relu_conv(i, w[0], codec).square().sum(), i.leaves)
    loss = bn_relu_conv(i, w[0], codec).square().sum()
    with torch.no_grad():
        i.gamma.add_(1)
        i.beta.sub_(1)
    assert all(map(torch.equal, torch.autograd.grad(loss, i.leaves), expected))


def test_saved_input_changed_before_the_backward_pass_is_refused() -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    x = i.x * 1
    a, saved = batch_norm_relu(x, i.gamma, i.beta, BatchNorm(codec=None))
    loss = conv2d(a, saved, *w).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_input_may_change_before_the_backward_pass_where_codes_are_saved() -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    expected = torch.autograd.grad(ours(i, by_one_conv, w, Codec(4)).sum(), i.leaves)
    x = i.x.clone()
    out = ours(i._replace(x=x), by_one_conv, w, Codec(4))
    x.mul_(2)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), i.leaves), expected))


def test_leaf_is_not_overwritten() -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    for op, others in ((batch_norm_relu, []), (batch_norm_relu_conv2d, w)):
        with pytest.raises(ValueError, match=r"overwrite_x = True, but x is a leaf that requires grad"):
            op(i.x, i.gamma, i.beta, *others, BatchNorm(codec=Codec(4), overwrite_x=True))


class _SameX(torch.autograd.Function):
    """Returns x itself, a view that autograd lets nobody overwrite, as hooks of modules do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("view", [_SameX.apply, lambda x: x[:2]], ids=["of a function", "of some images"])
def test_a_view_is_not_overwritten(view: Callable[[Tensor], Tensor]) -> None:
    i, (w,) = inputs(), weights((2, 4, 3, 3))
    base = i.x.clone()
    results = []
    for overwrite in (False, True):
        bn = BatchNorm(codec=Codec(4), overwrite_x=overwrite)
        in_two_steps = conv2d(*batch_norm_relu(view(base), i.gamma, i.beta, bn), w)
        for out in (in_two_steps, batch_norm_relu_conv2d(view(base), i.gamma, i.beta, w, bn)):
            results.append([out, *torch.autograd.grad(out.square().sum(), (*i.leaves, w))])
        assert torch.equal(base, i.x)
    assert all(all(map(torch.equal, others, results[0])) for others in results[1:])


def test_a_sum_does_not_overwrite_a_view() -> None:
    i = inputs()
    base = i.x.clone()
    total, statistics = add_shortcut(_SameX.apply(base), i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    assert statistics is None
    assert torch.equal(total, 2 * i.x)
    assert torch.equal(base, i.x)


@both_ways
def test_where_the_weight_alone_is_trained_its_gradient_is_exact(bn_relu_conv: BNReLUConv) -> None:
    """Nothing is saved then but a, by PyTorch's own convolution."""
    i, w = inputs(), weights((2, 4, 3, 3))
    frozen = i._replace(x=i.x.detach(), gamma=i.gamma.detach(), beta=i.beta.detach())
    out = bn_relu_conv(frozen, w[0], Codec(2))
    grad = random(*out.shape, seed=9)
    exact = closed_form(i, by_one_conv, w, grad, None)[-1]
    assert_all_close(torch.autograd.grad(out, w, grad), [exact])


def test_saved_of_another_shape_is_refused() -> None:
    i, w = inputs(), weights((2, 4, 3, 3))
    a, saved = batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=Codec(4)))
    with pytest.raises(ValueError, match=r"a is \[2, 4, 5, 4\], saved was made for \[3, 4, 5, 4\]"):
        conv2d(a[:2], saved, *w)


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.ones(3), r"x is torch.int64 \[2, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4), torch.ones(3), r"x is torch.float32 \[3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2), r"gamma is \[2\]: must be \[3\]"),
        (torch.zeros(2, 3, 4, 4), torch.ones(3, 1), r"gamma is \[3, 1\]: must be \[3\]"),
        (torch.zeros(1, 3, 1, 1), torch.ones(3), r"x is \[1, 3, 1, 1\]: training needs more than one value"),
        (torch.zeros(0, 3, 4, 4), torch.ones(3), r".* \[0, 3, 4, 4\]: must be floating point"),
    ],
)
def test_input_without_meaning_is_refused(x: Tensor, gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_norm_relu(x, gamma, torch.zeros(3), BatchNorm(codec=Codec(4)))


def test_naive_baseline_without_a_codec_is_refused() -> None:
    i = inputs()
    with pytest.raises(ValueError, match=r"forward_from_code = True, but codec = None"):
        batch_norm_relu(i.x, i.gamma, i.beta, BatchNorm(codec=None, forward_from_code=True))


# ---- average pooling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_average_pool_is_pytorchs(stride: int) -> None:
    x = random(2, 3, 6, 12).contiguous(memory_format=LAST).requires_grad_()
    out = average_pool(x, stride)
    assert torch.equal(out, F.avg_pool2d(x, stride))
    grad = random(*out.shape, seed=9)
    gradients = (torch.autograd.grad(pooled, [x], grad) for pooled in (out, F.avg_pool2d(x, stride)))
    assert_all_close(*gradients)


def test_average_pool_of_a_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 3, 6, 5\]: height and width must be multiples of 2"):
        average_pool(torch.zeros(2, 3, 6, 5), 2)
