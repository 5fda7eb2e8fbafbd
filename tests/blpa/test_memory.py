"""The count of bytes: of hand-made examples, against the formula, on a real step, and within the promised bounds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blpa.codec import Codec
from blpa.kernels import Kernels
from blpa.kernels.compiled import COMPILED
from blpa.kernels.reference import REFERENCE
from blpa.memory import (
    CODES,
    FULL_PRECISION,
    MIB,
    VECTORS,
    LiveBytes,
    largest_batch,
    saved_bytes,
    step_bytes,
    training_bytes,
)
from blpa.models.preact_resnet import PreActResNet
from runners import option_files
from runners.training.network import codec

Network = Callable[..., tuple[PreActResNet, Tensor, Tensor]]
AllocatorPeak = Callable[[Callable[[], object]], int]
META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def network(build: Callable[..., PreActResNet]) -> Network:
    """How to get a mode's network, images and labels, channels-last: what step_bytes takes."""

    def of_mode(
        name: str, depth: int, batch: int, kernels: Kernels = REFERENCE, *, device: torch.device = META
    ) -> tuple[PreActResNet, Tensor, Tensor]:
        with device:
            images = torch.zeros(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            return build(name, depth, kernels=kernels), images, torch.zeros(batch, dtype=torch.int64)

    return of_mode


def codec_of(mode: str) -> Codec | None:
    return codec(option_files.mode(mode))


# ---- the counter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_hand_made_example(device: torch.device) -> None:
    with LiveBytes() as counter:
        a = torch.empty(100, device=device)  # 400 bytes
        b = a + 1  # 400 more
        view = a[:10]  # none
        b.add_(view.sum())  # 4 for the sum, then free
        assert (counter.live_bytes, counter.peak_bytes) == (800, 804)
        del b
        assert counter.live_bytes == 400
        del a
        assert counter.live_bytes == 400  # the view holds on to the storage
        del view
        assert (counter.live_bytes, counter.peak_bytes) == (0, 804)


def test_what_was_there_before_is_not_counted() -> None:
    weights = torch.zeros(100)
    counter = LiveBytes()
    counter.ignore([weights])
    with counter:
        weights.add_(1)
        assert counter.peak_bytes == 0
        copy = weights * 1
    assert counter.live_bytes == copy.nbytes


def test_storages_that_follow_each_other_at_one_address_are_all_counted() -> None:
    with LiveBytes() as counter:
        for size in (10, 20, 30):
            torch.empty(size)
            assert counter.live_bytes == 0
    assert counter.peak_bytes == 120


# ---- saved bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "nbytes"),
    [(Codec(8), 7 * 3 + 108), (Codec(4), 4 * 3 + 108), (Codec(2), 2 * 3 + 108), (None, 4 * 7 * 3 + 108)],
    ids=str,
)
def test_formula_of_saved_bytes(codec: Codec | None, nbytes: int) -> None:
    """Seven rows of three channels: 7, 4 and 2 rows of bytes, or x, and nine vectors of three float32."""
    assert saved_bytes(7, 3, codec) == nbytes


def coded_shapes(depth: int, batch: int) -> Iterator[tuple[int, int]]:
    """M and C of every coded activation, from the paper, section 4, for 32x32 input."""
    channels_in, side = 16, 32
    for group, c in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 9):
            yield batch * side**2, channels_in
            side //= 2 if group and not block else 1
            yield from [(batch * side**2, c)] * 2
            channels_in = 4 * c


@pytest.mark.parametrize("name", ["8bit", "4bit", "2bit"])
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_save_what_the_formula_gives_to_the_byte(name: str, batch: int, network: Network) -> None:
    """All else that is alive after the forward pass is alike in both modes, so their difference is the formula's."""
    with_codes, with_x = (
        step_bytes(*network(which, 29, batch, COMPILED)).forward_bytes for which in (name, "exact-one-copy")
    )
    saved = sum(saved_bytes(*shape, None) - saved_bytes(*shape, codec_of(name)) for shape in coded_shapes(29, batch))
    assert with_x - with_codes == saved


@pytest.mark.parametrize("name", ["8bit", "4bit", "2bit", "exact-one-copy"])
def test_little_else_is_alive_after_the_forward_pass(name: str, network: Network) -> None:
    """The last x and vectors; its activation's mean; the logits' log-softmax, the loss and its divisor."""
    batch = 4
    codes = sum(saved_bytes(*shape, codec_of(name)) for shape in coded_shapes(20, batch))
    head = saved_bytes(64 * batch, 256, None) + 4 * batch * (256 + 10) + 4 + 4
    assert step_bytes(*network(name, 20, batch, COMPILED)).forward_bytes == codes + head


@pytest.mark.parametrize(
    ("depth", "elements"), [(164, 3_096_576), (254, 4_816_896), (488, 9_289_728), (1001, 19_095_552)]
)
def test_quantised_elements_per_sample(depth: int, elements: int) -> None:
    """The paper, section 4."""
    assert sum(rows * channels for rows, channels in coded_shapes(depth, batch=1)) == elements


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "checkpoint"])
def test_a_real_step_counts_as_on_the_meta_device(name: str, network: Network) -> None:
    """But for the way there: PyTorch 2.11's batch norm is of other operations on the meta device."""
    on_meta, real = (step_bytes(*network(name, 11, 2, device=device)) for device in (META, CPU))
    assert replace(on_meta, timeline=[]) == replace(real, timeline=[])


@pytest.mark.parametrize("name", ["8bit", "4bit", "exact-one-copy"])
def test_meta_device_counts_copies_that_a_real_step_of_coded_layers_saves(name: str, network: Network) -> None:
    """There convolutions put out no channels-last: the copy of the largest output may count, never anything less."""
    on_meta, real = (step_bytes(*network(name, 11, 2, device=device)) for device in (META, CPU))
    assert on_meta.forward_bytes == real.forward_bytes
    assert real.peak_bytes <= on_meta.peak_bytes <= real.peak_bytes + 4 * 2 * 64 * 32 * 32


@pytest.mark.parametrize("name", ["exact", "exact-one-copy", "4bit"])
def test_count_of_a_real_step_is_the_allocators(name: str, network: Network, allocator_peak: AllocatorPeak) -> None:
    model, images, labels = network(name, 11, 2, device=CPU)
    counted = step_bytes(model, images, labels).peak_bytes
    model.zero_grad()
    measured = allocator_peak(lambda: F.cross_entropy(model(images), labels).backward())
    assert measured == pytest.approx(counted, abs=1024)  # the allocator sees a few scalars inside an operation, besides


BF16_MODES = ["exact", "checkpoint", "exact-one-copy", "8bit", "4bit", "2bit", "naive-8bit"]


@pytest.mark.parametrize("name", BF16_MODES)
def test_a_step_in_bf16_counts_on_the_meta_device_as_autocast_makes_it(
    name: str, network: Network, allocator_peak: AllocatorPeak
) -> None:
    """To the byte but for the copies of weights in bf16 that coded layers make, which the meta device does not."""
    on_meta = step_bytes(*network(name, 11, 16), bf16=True)
    model, images, labels = network(name, 11, 16, device=CPU)
    real = step_bytes(model, images, labels, bf16=True)
    model.zero_grad()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    weights_in_bf16 = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert on_meta.peak_bytes == pytest.approx(real.peak_bytes, abs=weights_in_bf16)
    # An operation's own temporaries are not counted; where layers are recomputed the peak lies inside one (4.6 %).
    assert real.peak_bytes <= allocator_peak(step) <= 1.05 * real.peak_bytes
    assert on_meta.peak_bytes < step_bytes(*network(name, 11, 16)).peak_bytes


@pytest.mark.parametrize("name", ["8bit", "4bit", "2bit", "exact-one-copy"])
def test_bf16_keeps_codes_of_the_same_bytes_and_x_of_half(name: str, network: Network) -> None:
    model, images, labels = network(name, 11, 2, COMPILED)
    saved = step_bytes(model, images, labels, bf16=True, parts={"blocks": model.blocks}).saved_by_part["blocks"]
    formula = sum(saved_bytes(*shape, codec_of(name), element_bytes=2) for shape in coded_shapes(11, 2))
    assert sum(saved.kinds.values()) == formula


@pytest.mark.parametrize(("depth", "promised_mib"), [(164, 2.10), (1001, 9.80)])
def test_peak_of_a_step_at_4_bits_is_within_the_promise(depth: int, promised_mib: float, network: Network) -> None:
    """MiB per sample, batch 256, 32x32 input, float32, on the backend that makes no temporaries."""
    assert step_bytes(*network("4bit", depth, 256, COMPILED)).peak_bytes / 256 / MIB <= promised_mib


def test_peak_of_stock_layers(network: Network) -> None:
    """Two float32 tensors per BN-ReLU-conv, and the peak above them: 23.88 MiB per sample in the README."""
    assert step_bytes(*network("exact", 164, 256)).peak_bytes / 256 / MIB == pytest.approx(23.9, abs=0.05)


# ---- where the bytes go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "4bit", "exact-one-copy", "checkpoint"])
def test_kinds_at_the_peak_add_up_to_it(name: str, network: Network) -> None:
    step = step_bytes(*network(name, 29, 8, COMPILED))
    assert sum(step.kinds_at_peak.values()) == step.peak_bytes
    assert max(step.timeline) <= step.peak_bytes  # what an operation makes and frees at once is in the peak alone
    logits = 4 * 8 * 10  # which the loss's own operation still references
    assert step.timeline[step.forward_operations - 1] == step.forward_bytes + logits


@pytest.mark.parametrize("name", ["8bit", "4bit", "2bit", "exact-one-copy"])
def test_every_block_keeps_what_the_formula_says_and_what_it_is(name: str, network: Network) -> None:
    batch = 3
    model, images, labels = network(name, 29, batch, COMPILED)
    parts = {str(number): block for number, block in enumerate(model.blocks)}
    saved = step_bytes(model, images, labels, parts=parts).saved_by_part
    assert list(saved) == list(parts)
    shapes = list(coded_shapes(29, batch))
    for number, part in enumerate(saved.values()):
        three = shapes[3 * number : 3 * number + 3]
        assert sum(part.kinds.values()) == sum(saved_bytes(*shape, codec_of(name)) for shape in three)
        assert part.kinds[VECTORS] == sum(9 * 4 * channels for _, channels in three)
        assert (part.kinds[CODES] > 0) == (codec_of(name) is not None)
        assert (part.kinds[FULL_PRECISION] > 0) == (codec_of(name) is None)


def test_activations_of_nine_images_are_no_vectors(network: Network) -> None:
    """They have nine rows where they are matrices, as the vectors have."""
    assert VECTORS not in step_bytes(*network("exact", 11, 9)).kinds_at_peak
    at_eight, at_nine = (step_bytes(*network("4bit", 11, batch, COMPILED)) for batch in (8, 9))
    assert at_nine.kinds_at_peak[VECTORS] == at_eight.kinds_at_peak[VECTORS]


def test_counting_leaves_no_hook_behind(network: Network) -> None:
    model, images, labels = network("4bit", 11, 2, COMPILED)
    first = step_bytes(model, images, labels, parts={"blocks": model.blocks})
    model.zero_grad()
    second = step_bytes(model, images, labels)
    assert (second.peak_bytes, second.timeline) == (first.peak_bytes, first.timeline)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_training_takes_weights_momentum_and_images_besides_a_step(network: Network) -> None:
    model, images, labels = network("exact", 11, 2)
    counted = training_bytes(model, images, labels)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert (counted.weight_bytes, counted.optimiser_bytes) == (4 * parameters + buffers, 4 * parameters)
    assert counted.input_bytes == 2 * (4 * 3 * 32 * 32 + 8)
    held = counted.weight_bytes + counted.optimiser_bytes + counted.input_bytes
    assert counted.total_bytes == held + counted.step.peak_bytes


# ---- the largest batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [110, 111, 119, 120, 250, 1_009, 1_000_000, 123_456_789])
@pytest.mark.parametrize(
    "total_bytes",
    [
        lambda batch: 100 + 10 * batch,
        lambda batch: max(100 + 10 * batch, 13 * batch),  # the peak moves to another place as the batch grows
        lambda batch: 100 + 10 * batch + 7 * (batch % 2),  # rows that do not divide evenly
    ],
    ids=["line", "two lines", "bumpy"],
)
def test_largest_batch_fits_and_the_next_does_not(total_bytes: Callable[[int], int], budget: int) -> None:
    asked = []

    def counted(batch: int) -> int:
        asked.append(batch)
        return total_bytes(batch)

    batch = largest_batch(counted, budget)
    assert total_bytes(batch + 1) > budget
    assert batch == 0 or total_bytes(batch) <= budget
    assert {batch, batch + 1} - {0} <= set(asked)
    assert len(asked) <= 12  # each takes seconds


def test_no_batch_fits_a_budget_below_the_first_sample() -> None:
    assert largest_batch(lambda batch: 100 + 10 * batch, 109) == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.unsafe_chunk(x, 4, 1),
        lambda x: torch._foreach_add([x, x], 1.0),
        lambda x: torch._foreach_mul_([x.clone()], 2.0),
        lambda x: x @ torch.ones(32, 8, device="meta"),
        lambda x: F.batch_norm(x[0], torch.zeros(32, device="meta"), torch.ones(32, device="meta"), training=True),
    ],
    ids=["several views", "a list", "nothing", "a product by a view", "averages written to"],
)
def test_an_operation_counts_the_same_the_second_time(operation: Callable[[Tensor], Any]) -> None:
    """Its results are made from those of the first, where they are nothing but new tensors."""
    x = torch.ones(4, 16, 32, device="meta")
    peaks, shapes = [], []
    for _ in range(3):
        with LiveBytes() as counter:
            result = operation(x)
        peaks.append(counter.peak_bytes)
        shapes.append([tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        del result
    assert peaks[0] == peaks[1] == peaks[2] > 0
    assert shapes[0] == shapes[1] == shapes[2]


def test_what_is_made_has_the_default_dtype_of_now() -> None:
    for dtype in (torch.float64, torch.float32):
        with LiveBytes():
            torch.set_default_dtype(dtype)
            assert torch.ones(4, device=META).dtype == dtype
