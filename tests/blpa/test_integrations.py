"""Training loops of other libraries: a converted model trains as in a loop by hand, to the bit, and saves codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytorch_lightning as lightning
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pytorch_lightning.tuner import Tuner
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import blpa
from blpa.memory import LiveBytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # Lightning 2.6 on torch 2.14
    "ignore:The 'train_dataloader' does not have many workers",  # Lightning on more than two cores
)

Model = TypeVar("Model", bound=nn.Module)

GENERATOR = torch.Generator().manual_seed(2)
IMAGES, LABELS = torch.randn(16, 3, 32, 32, generator=GENERATOR), torch.randint(10, (16,), generator=GENERATOR)
BATCHES = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def network(depth: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(depth)]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def by_hand(model: nn.Module, *, bf16: bool = False, loss: Any = F.cross_entropy, clip: float = torch.inf) -> nn.Module:
    """Train for two steps, in the plainest loop."""
    optimizer = sgd(model)
    for images, labels in BATCHES:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def saved_bytes(train: Callable[[Model], object], model: Model) -> int:
    """Bytes that the last forward pass of a training leaves in memory."""
    first, *_, last = [module for module in model.modules() if not list(module.children())]
    counter = LiveBytes()
    counter.ignore([*model.parameters(), *model.buffers()])
    found: list[int] = []
    for hook in (first.register_forward_pre_hook, last.register_forward_hook):
        hook(lambda *_: found.append(counter.live_bytes))
    with counter:
        train(model)
    return found[-1] - found[-2]


def assert_saves_codes(train: Callable[[Model], object], model: Model, stock: Model) -> None:
    """In these networks a code of 4 bits takes the place of two tensors of 32 bits, or of 16: 16 or 8 times less."""
    assert saved_bytes(train, model) < saved_bytes(train, stock) / 5


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Weights and statistics are alike to the bit."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(tensor, of_other) for tensor, of_other in pairs)


# ---- Lightning


class Classifier(lightning.LightningModule):
    """A network that is converted when it is made, if bits are given."""

    def __init__(self, bits: int | None = None, depth: int = 8) -> None:
        super().__init__()
        self.net = network(depth)
        self.batch_size = 16  # which the finder changes
        if bits:
            blpa.convert(self, bits)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)

    def train_dataloader(self) -> DataLoader[Any]:
        """Small images, as many as the finder may want."""
        data = TensorDataset(IMAGES[:1, :, :16, :16].expand(1024, -1, -1, -1), LABELS[:1].expand(1024))
        return DataLoader(data, batch_size=self.batch_size)


def trainer(folder: Path | None = None) -> lightning.Trainer:
    quiet: Any = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return lightning.Trainer(accelerator="cpu", max_steps=2, default_root_dir=folder, **quiet)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_lightning_trains_a_converted_module(where: str) -> None:
    def train(module: Classifier) -> None:
        trainer().fit(module, BATCHES)

    module = blpa.convert(Classifier(), 4) if where == "outside" else Classifier(4)
    assert_saves_codes(train, module, Classifier())
    assert_same_weights(module.net, by_hand(blpa.convert(network(), 4)))
    assert type(blpa.restore(module)) is Classifier


class Memory(LiveBytes):
    """So many bytes of memory: what does not fit is not allocated, and raises the error of PyTorch's allocator."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and free what it made if that does not fit."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live_bytes <= self.limit:
            return result
        del result
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")  # which Lightning looks for


def test_lightning_finds_a_batch_four_times_as_large(tmp_path: Path) -> None:
    """In memory for all of training but the weights: batches, peaks within steps, gradients and momentum."""
    found = {}
    for bits in (None, 4):
        module, memory = Classifier(bits, depth=20), Memory(6 * 2**20)
        memory.ignore([*module.parameters(), *module.buffers()])
        with memory:
            found[bits] = Tuner(trainer(tmp_path)).scale_batch_size(module, steps_per_trial=1, init_val=16)
        assert module.batch_size == found[bits]
    assert found[None] == 16
    assert found[4] >= 64


# ---- Accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_a_converted_model(precision: str) -> None:
    def train(model: nn.Module) -> nn.Module:
        AcceleratorState._reset_state(reset_partial_state=True)  # else a process has one precision for all of its time
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        prepared, optimizer, batches = accelerator.prepare(model, sgd(model), BATCHES)
        for images, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(prepared(images), labels))
            optimizer.step()
        return accelerator.unwrap_model(prepared)

    model = blpa.convert(network(), 4)
    assert_saves_codes(train, model, network())
    assert_same_weights(model, by_hand(blpa.convert(network(), 4), bf16=precision == "bf16"))
    unwrapped = blpa.restore(train(model))
    assert type(unwrapped) is nn.Sequential
    assert saved_bytes(train, unwrapped) == saved_bytes(train, network())


# ---- timm

SMOOTHED, CLIP = LabelSmoothingCrossEntropy(0.1), 1.0


def timm_network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


def timm_loop(model: nn.Module) -> ClassificationTask:
    """The loop of timm's train.py, which is not in the package, with what it takes from the package."""
    task = ClassificationTask(model, SMOOTHED, verbose=False)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.1)
    task.setup_ema(decay=0.9)
    for update, (images, labels) in enumerate(BATCHES, 1):
        task(images, labels)["loss"].backward()
        dispatch_clip_grad(task.get_clip_parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update)
    return task


def test_timm_trains_a_converted_model_and_averages_its_weights() -> None:
    model = blpa.convert(timm_network(), 4)
    assert_saves_codes(timm_loop, model, timm_network())
    assert_same_weights(model, by_hand(blpa.convert(timm_network(), 4), loss=SMOOTHED, clip=CLIP))
    average = timm_loop(model).get_trainable_module(ema=True).module
    assert type(average) is type(model)
    assert type(blpa.restore(average)) is timm.models.ResNet
    assert type(model) is not timm.models.ResNet  # the average is another model
