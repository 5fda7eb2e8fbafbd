"""Users who change a batch norm as they would PyTorch's own, and those whose data are not what it was trained on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpa.codec import Codec
from blpa.convolution import Convolution
from blpa.layers import BatchNormReLU, Conv2d
from blpa.ops import BatchNorm, batch_norm_relu_conv2d

CHANGES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "nothing": lambda bn: None,
    "stopped tracking": lambda bn: setattr(bn, "track_running_stats", False),
    "began tracking": lambda bn: setattr(bn, "track_running_stats", True),
    "averaged all batches": lambda bn: setattr(bn, "momentum", None),
    "took the newest batch alone": lambda bn: setattr(bn, "momentum", 1.0),
    "stopped the averages": lambda bn: setattr(bn, "momentum", 0.0),
    "raised epsilon": lambda bn: setattr(bn, "eps", 0.5),
    "removed the averages": lambda bn: [setattr(bn, name, None) for name in ("running_mean", "running_var")],
    "removed the count": lambda bn: setattr(bn, "num_batches_tracked", None),
    "removed the shift": lambda bn: setattr(bn, "bias", None),
    "froze the scale": lambda bn: bn.weight is None or bn.weight.requires_grad_(False),
    "froze the shift": lambda bn: bn.bias is None or bn.bias.requires_grad_(False),
    "froze the statistics": lambda bn: bn.eval(),
    "began anew": lambda bn: bn.reset_running_stats(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("tracks", [True, False], ids=["tracks", "does not track"])
@pytest.mark.parametrize("ends_in_training", [True, False], ids=["training", "evaluation"])
def test_a_batch_norm_was_changed_between_steps(
    change: Callable[[nn.BatchNorm2d], object], affine: bool, tracks: bool, ends_in_training: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    stock = nn.BatchNorm2d(4, affine=affine, track_running_stats=tracks, dtype=torch.float64)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, generator=generator)
    ours = BatchNormReLU(4, affine=affine, track_running_stats=tracks, codec=None, dtype=torch.float64)
    coded = BatchNormReLU(4, affine=affine, track_running_stats=tracks, dtype=torch.float64)
    every = stock, ours, coded
    for bn in every[1:]:
        bn.load_state_dict(stock.state_dict())
    for step in range(3):
        for bn in every:
            if step == 1:
                change(bn)
            if step == 2 and not ends_in_training:
                bn.eval()
            bn.zero_grad()
        x = 2 * torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=generator) + 5
        of_stock, of_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, a, of_coded = F.relu(stock(of_stock)), ours(of_ours).value, coded(x).value
        grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        expected.backward(grad)
        a.backward(grad)
        assert torch.equal(a, of_coded)
        # Values of up to 100 in float64, of which every operation rounds a 1e-16th; sums of 288 of them.
        close = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(a, expected, **close)
        torch.testing.assert_close(of_ours.grad, of_stock.grad, **close)
        gradients = [[parameter.grad for parameter in bn.parameters()] for bn in (stock, ours)]
        for gradient, wanted in zip(*gradients, strict=True):
            assert (gradient is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(gradient, wanted, **close)
        for bn in every[1:]:
            torch.testing.assert_close(dict(bn.state_dict()), dict(stock.state_dict()), **close)


def test_only_one_of_the_averages_was_removed() -> None:
    bn = BatchNormReLU(4)
    bn.running_var = None
    with pytest.raises(ValueError, match=r"^running_var = None, but the other running average is there: must be both"):
        bn(torch.randn(2, 4, 3, 3))


# ---- frozen statistics of other data --------------------------------------------------------------------------------


def frozen_and_trained(mean: float, deviation: float, codec: Codec | None) -> tuple[list[Tensor], list[Tensor]]:
    """Output, dW and dX by running statistics (0, 1), and by those of x with gamma and beta that give the same y."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x = deviation * random(16, 8, 8, 8) + mean
    gamma, beta, weight, grad = random(8), random(8), random(4, 8, 3, 3), random(16, 4, 8, 8)
    rows = x.transpose(0, 1).flatten(1)
    of_x = rows.mean(1), rows.var(1, correction=0)
    running = {"running_mean": torch.zeros(8).double(), "running_var": torch.ones(8).double()}
    found = []
    for training in (False, True):
        bn = BatchNorm(codec=codec, training=training, eps=0.0, **({} if training else running))
        scale, shift = (gamma * of_x[1].sqrt(), beta + gamma * of_x[0]) if training else (gamma, beta)
        leaves = weight.clone().requires_grad_(), x.clone().requires_grad_()
        out = batch_norm_relu_conv2d(leaves[1], scale, shift, leaves[0], bn, convolution=Convolution(padding=(1, 1)))
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    return found[0], found[1]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (0, 2), (2, 1), (5, 1), (-3, 0.1), (1000, 1)])
def test_a_frozen_network_got_data_of_another_domain(bits: int, mean: float, deviation: float) -> None:
    frozen, trained = frozen_and_trained(mean, deviation, Codec(bits))
    exact, _ = frozen_and_trained(mean, deviation, None)
    assert torch.equal(frozen[0], exact[0])
    # The same codes: only rounding in float64 differs, of numbers up to 1000 in sums of 1024.
    torch.testing.assert_close(frozen[1], trained[1], rtol=1e-9, atol=1e-9)
    # With constant statistics the input gradient needs the sign of y alone, and is exact.
    torch.testing.assert_close(frozen[2], exact[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_of_a_frozen_channel_was_not_finite(value: float) -> None:
    """The other values of its channel are coded on the grid of the running statistics."""
    bn, conv = BatchNormReLU(1, codec=Codec(8)).eval(), Conv2d(1, 1, 1)
    x = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    weight = conv.weight
    clean = torch.autograd.grad(conv.after(bn, x.clone().requires_grad_()).sum(), weight)[0]
    x[0, 0, 0, 0] = value
    found = torch.autograd.grad(conv.after(bn, x.clone().requires_grad_()).sum(), weight)[0]
    # Only the first value changes, from 0 after the ReLU to at most 3; 64 values are coded to half a bin of 6 / 256.
    assert (found - clean).abs() <= 3 + 64 * 3 / 256


def test_a_frozen_channel_was_constant() -> None:
    bn, conv = BatchNormReLU(2, eps=0.0, codec=Codec(4)).eval(), Conv2d(2, 1, 1)
    x = torch.tensor([3.0, -3.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4).clone().requires_grad_()
    (found,) = torch.autograd.grad(conv.after(bn, x).sum(), conv.weight)
    torch.testing.assert_close(found.flatten(), torch.tensor([96.0, 0.0]))  # 32 values of 3, and of max(-3, 0)


def test_the_naive_baseline_is_evaluated_alike_in_every_batch() -> None:
    """It feeds the codes forward, so they may not follow the batch: an image has one output."""
    bn = BatchNormReLU(3, codec=Codec(8), forward_from_code=True).eval()
    x = 2 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(bn(x).value[:1], bn(x[:1]).value)
