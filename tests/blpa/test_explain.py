"""explain and gradient_error: what they count is what a step allocates, and what they compare is what they say."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import blpa
from blpa.coded.tensors import Coded
from blpa.explain import Explanation
from blpa.memory import MIB, LiveBytes

X = torch.empty(16, 3, 64, 64, device="meta")


def network(name: str = "resnet18") -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10)
    return model.to("meta")


def counted(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes alive after the forward pass, and at the peak of a step, counted from outside."""
    counter = LiveBytes()
    counter.ignore([x, *model.parameters(), *model.buffers()])
    with counter:
        loss = model(x).sum()
        kept = counter.live_bytes
        loss.backward()
    return kept, counter.peak_bytes


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_the_bytes_are_those_of_a_step(name: str) -> None:
    explanation = blpa.explain(network(name), X, bits=4)
    for found, model in ((explanation.stock, network(name)), (explanation.coded, blpa.convert(network(name)))):
        kept, peak = counted(model, X)
        assert found.saved == pytest.approx(kept, rel=0.01)
        assert found.peak == pytest.approx(peak, rel=0.01)
    assert sum(row.stock_bytes for row in explanation.rows) == explanation.stock.saved
    assert sum(row.coded_bytes for row in explanation.rows) == explanation.coded.saved
    assert explanation.coded.saved < explanation.stock.saved / 6


def test_codes_take_the_bytes_of_their_formula() -> None:
    explanation = blpa.explain(network(), X, bits=4)
    row = next(row for row in explanation.rows if row.module == "layer1.0.bn1")
    elements = 16 * 64 * 16 * 16
    assert row.function == "batch_norm"
    assert row.shape == (16, 64, 16, 16)
    assert row.stock_bytes == 4 * elements + 2 * 4 * 64  # the input, means and deviations
    assert row.coded_bytes == elements // 2 + 4 * (7 + 1) * 64  # codes, seven vectors and 1 / deviation
    relu = next(row for row in explanation.rows if row.savers[:1] == ("layer1.0.relu: relu",))
    assert relu.coded_bytes == 0
    assert "layer1.0.conv2: conv2d" in relu.savers


def test_it_prints_a_table_with_what_is_not_coded_and_advice() -> None:
    class Tanh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Any:
            return torch.tanh(torch.nn.functional.silu(self.bn(self.conv(x))))

    text = str(blpa.explain(Tanh(), X, bits=4))
    assert "Tanh, 4 bits, input [16, 3, 64, 64] float32" in text
    assert f"not coded: {8 * 62 * 62 * 4 / MIB:.2f} [16, 8, 62, 62], the model: tanh" in text
    assert "SiLU, GELU or Hardswish, 1: 8 bits advised" in text
    assert "largest batch in 11 GiB" in text
    assert "at the coded peak" in text


def test_a_converted_model_is_explained_with_its_own_settings() -> None:
    model = network()
    unconverted = blpa.explain(model, X, bits=2)
    assert type(model) is torchvision.models.ResNet
    blpa.convert(model, 2)
    assert blpa.explain(model, X).coded == unconverted.coded
    exact = blpa.explain(blpa.convert(model, layers={"*": None}), X)
    assert exact.coded == exact.stock


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    explanation = blpa.explain(network(), X, bits=4)
    batch = explanation.largest_batch(gib=1)
    model = blpa.convert(network())
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.parameters(), *model.buffers()))
    images = [torch.empty(n, 3, 64, 64, device="meta") for n in (batch, batch + 1)]
    totals = [weights + x.nbytes + counted(model, x)[1] for x in images]
    assert totals[0] <= 0.5 * 2**30 * 1.001
    assert totals[1] >= 0.5 * 2**30 * 0.999
    assert explanation.largest_batch(gib=1, coded=False) < batch
    with pytest.raises(ValueError, match="gib = 0: must be positive"):
        explanation.largest_batch(gib=0)


def test_a_network_that_depends_on_data_is_counted_with_its_data() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Any:
            return torch.relu(self.conv(x)) if x.mean().item() > 0 else self.conv(x)

    model = Choosing()
    explanation = blpa.explain(model, torch.ones(4, 3, 64, 64))
    assert "run on the CPU" in str(explanation)
    assert explanation.coded.saved < explanation.stock.saved
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="the largest batch needs inputs without data"):
        explanation.largest_batch()
    with pytest.raises(RuntimeError, match="meta"):
        blpa.explain(model, torch.ones(4, 3, 64, 64, device="meta"))


def test_nothing_of_the_model_or_its_gradients_changes() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(4, 3, 64, 64)
    model(x).sum().backward()
    before = copy.deepcopy(model)
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    state = torch.get_rng_state()
    blpa.explain(model, x)
    blpa.gradient_error(blpa.convert(model), x)
    blpa.restore(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(
        torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True) if p.grad is not None
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_rows_as_a_data_frame() -> None:
    explanation = blpa.explain(network(), X)
    frame = explanation.to_pandas()
    assert list(frame.columns) == ["module", "function", "shape", "savers", "stock_bytes", "coded_bytes", "gradient"]
    assert frame.stock_bytes.sum() == explanation.stock.saved
    assert isinstance(explanation, Explanation)


def test_gradient_error_finds_the_layer_whose_code_was_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = blpa.convert(torchvision.models.resnet18(num_classes=10), 8)
    x = torch.randn(8, 3, 64, 64)
    sound = blpa.gradient_error(model, x)
    assert 0 < sound.total < 0.01
    assert {row.name for row in sound.rows} == {name for name, _ in model.named_parameters()}
    assert list(sound.to_pandas().columns) == ["name", "error", "exact_norm"]

    value = Coded.value

    def spoilt(self: Coded) -> Tensor:
        found = value(self)
        # The only convolution whose input has 128 channels at 4 x 4 pixels and that is read from an addition's ReLU.
        return found.flip(0) if self.layout.shape[1:] == (256, 4, 4) and self.function is None else found

    monkeypatch.setattr(Coded, "value", spoilt)
    found = blpa.gradient_error(model, x)
    worst = max(found.rows, key=lambda row: row.error)
    assert worst.name.startswith(("layer3.1.conv1", "layer4.0.conv1", "layer4.0.downsample.0"))
    assert worst.error > 0.5
    assert worst.name in str(found)


def test_gradient_error_takes_a_loss_and_is_zero_without_codes() -> None:
    torch.manual_seed(0)
    model = blpa.convert(torchvision.models.resnet18(num_classes=10).double(), None)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    found = blpa.gradient_error(model, x, loss=lambda logits: logits.square().mean())
    assert found.total < 1e-12
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        blpa.gradient_error(model, x, loss=lambda logits: torch.zeros((), requires_grad=True))


def test_gradient_error_of_a_compiled_model_is_that_of_the_model() -> None:
    torch.manual_seed(0)
    model = blpa.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    x = torch.randn(4, 3, 16, 16)
    assert blpa.gradient_error(torch.compile(model), x).total == blpa.gradient_error(model, x).total > 0


def test_an_input_that_is_no_batch_costs_a_line_of_the_table_and_no_more() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return nn.functional.scaled_dot_product_attention(self.linear(x * 1), x, x, attn_mask=mask)

    text = str(blpa.explain(Masked(), torch.empty(16, 16, 32), torch.empty(16, 16)))
    assert "largest batch: the inputs do not take another batch" in text
    assert "peak of a step" in text


def test_the_rows_of_a_transposed_convolution_say_that_its_weight_s_gradient_is_approximate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2))
    rows = blpa.explain(model, torch.empty(16, 3, 32, 32)).rows
    assert [row.gradient for row in rows if row.function == "conv_transpose2d"] == ["exact; of the weight approximate"]


def test_gradients_of_an_input_count_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    explanation = blpa.explain(model, torch.empty(16, 3, 32, 32).requires_grad_())
    assert explanation.coded.saved < explanation.stock.saved


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


def test_outputs_in_a_dataclass_count() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x: Tensor) -> Output:
            y = self.body(x)
            return Output(y.mean((2, 3)), [y])

    explanation = blpa.explain(Wrapped(), X)
    assert explanation.coded.saved < explanation.stock.saved / 4
