"""Weights from elsewhere: saved by other programs and wrappers, of another network, or damaged on the way."""

import errno
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damages
from support import GRADIENTS, TinyNet, make, train
from torch import Tensor

from blpa.kernels.reference import REFERENCE
from blpa.models.preact_resnet import PreActResNet
from runners import cli
from runners.cells import weights_name
from runners.errors import UserError
from runners.training import network, torch_files
from runners.training.checkpoints import RunFolder
from runners.training.weights import load_weights

State = dict[str, Tensor]
CODE = "holds more than tensors, torch.nn.modules.linear.Linear, and code of a file is not run"


def a_network(**values: object) -> PreActResNet:
    return network.build(make(**{"depth": 11, "width": 0.25, **values}), REFERENCE)


@pytest.fixture
def state() -> State:
    return a_network(seed=1).state_dict()


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def loaded(file: Path, content: object) -> State:
    file.write_bytes(content if isinstance(content, bytes) else saved(content))
    model = a_network()
    load_weights(model, file)
    return model.state_dict()


def refused(file: Path, content: object) -> str:
    with pytest.raises(UserError) as caught:
        loaded(file, content)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"task.checkpoint={file} ")
    return text.removeprefix(f"task.checkpoint={file} ")


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def of_prefix(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": of_prefix("module.", state)},
        lambda state: of_prefix("_orig_mod.", state),
        lambda state: of_prefix("module._orig_mod.", state),
        lambda state: of_prefix("_orig_mod.module.", state),
        lambda state: {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()},
        lambda state: {name: torch.nn.Parameter(value, value.is_floating_point()) for name, value in state.items()},
    ],
    ids=["bare", "lightning's key", "data parallel", "compiled", "compiled, then parallel", "parallel, then compiled",
         "one block compiled", "parameters"],
)  # fmt: skip
def test_saved_through_a_wrapper(wrapped: Callable[[State], object], state: State, tmp_path: Path) -> None:
    assert_same(loaded(tmp_path / "w.pt", wrapped(state)), state)


def test_saved_without_checksums(state: State, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = saved(state)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(loaded(tmp_path / "w.pt", content), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saved_in_another_dtype_that_float32_holds(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    other = {name: value.to(dtype) if value.is_floating_point() else value.int() for name, value in state.items()}
    expected = {name: value.to(state[name].dtype) for name, value in other.items()}
    assert_same(loaded(tmp_path / "w.pt", other), expected)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"depth": 20}, "weights of depth 20, and the network here has depth 11"),
        ({"depth": 29, "width": 0.5}, "weights of depth 29 and width 0.5, and the network here has depth 11 and width"),
        ({"dataset__classes": 100}, "weights of classes 100, and the network here has classes 10"),
        ({"dataset__image_channels": 3}, "weights of image channels 3, and the network here has image channels 1"),
    ],
)
def test_of_another_network(other: dict[str, object], reason: str, tmp_path: Path) -> None:
    assert reason in refused(tmp_path / "w.pt", {"model": a_network(**other).state_dict()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("bn.bias"), "weights of another network: bn.bias is missing"),
        (lambda state: state.update({"n_averaged": torch.tensor(1)}), "another network: n_averaged is unexpected"),
        (lambda state: state.update({"bn.bias": torch.zeros(2)}), "bn.bias is [2], here [64]"),
        (lambda state: state.update({"bn.bias": 1.5}), "'bn.bias' is of type float, not a tensor"),
        (lambda state: state.update({"bn.bias": torch.zeros(64, dtype=torch.int8)}), "is torch.int8, here torch.float"),
        (lambda state: state.update({"bn.bias": torch.zeros(64, dtype=torch.cfloat)}), "is torch.complex64, here"),
        (lambda state: state.update({"bn.bias": torch.full((64,), 0.1).double() + 1e-12}), "would round: bn.bias"),
        (lambda state: state.update({"bn.bias": torch.zeros(64).to_sparse()}), "not plain: bn.bias is sparse"),
        (lambda state: state.update({"bn.bias": torch.zeros(64, device="meta")}), "bn.bias is on the meta device"),
        (lambda state: state["bn.bias"].fill_(torch.nan), "weights that are not finite: bn.bias has NaN"),
        (lambda state: state["stem.weight"].fill_(torch.inf), "weights that are not finite: stem.weight has NaN"),
        (lambda state: state.update({"_orig_mod.bn.bias": torch.zeros(64)}), "some weights twice"),
        (lambda state: state.clear(), "holds no weights: a state_dict is expected"),
    ],
)  # fmt: skip
def test_changed_by_another_program(
    change: Callable[[State], object], reason: str, state: State, tmp_path: Path
) -> None:
    change(state)
    assert reason in refused(tmp_path / "w.pt", state)


def a_zip() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("notes.txt", "no weights")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "is empty"),
        (
            lambda: b"version https://git-lfs.github.com/spec/v1\n",
            "torch.save's since PyTorch 1.6: it begins with 'vers",
        ),
        (lambda: pickle.dumps({"model": {}}), "is no file of torch.save's since PyTorch 1.6: it begins with '\\x80"),
        (lambda: saved({}, _use_new_zipfile_serialization=False), "is no file of torch.save's since PyTorch 1.6"),
        (
            lambda: (9).to_bytes(8, "little") + b'{"a": {}}' + bytes(9),
            "is a safetensors file: convert it by torch.save",
        ),
        (a_zip, "is a damaged archive, or no file of torch.save's"),
        (lambda: saved([1, 2]), "holds no weights: a state_dict is expected"),
        (lambda: saved(torch.nn.Linear(2, 2)), CODE),
    ],
    ids=["empty", "pointer", "pickle", "old format", "safetensors", "zip", "list", "module"],
)
def test_no_file_of_weights(content: Callable[[], bytes], reason: str, tmp_path: Path) -> None:
    assert reason in refused(tmp_path / "w.pt", content())


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r" is a folder: name a file of weights in it$"):
        load_weights(a_network(), tmp_path)


def test_a_pipe_and_a_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path(os.devnull)):
        assert weights_name(make(task="gradient-error", task__checkpoint=str(file))) == file.stem
        with pytest.raises(UserError, match=rf"^task\.checkpoint={file} is not a file, but a pipe or a device$"):
            load_weights(a_network(), file)


def test_weights_for_which_there_is_no_memory(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", no_memory)
    assert refused(tmp_path / "w.pt", state) == "cannot be loaded (MemoryError)"


@pytest.mark.parametrize(
    "name", ["checkpoint-4-0123456789012345.pt", "best-checkpoint-4-01234567890123ab.pt", "resnet-0123abcd.pth"]
)
def test_the_digest_in_the_name_is_another_file_s(name: str, state: State, tmp_path: Path) -> None:
    assert refused(tmp_path / name, state) == "is damaged: its sha256 does not match its name"


@pytest.mark.parametrize("name", ["resnet-20231126.pt", "checkpoint-4-{}.pt", "resnet-{:.8}.pth"])
def test_the_name_has_a_date_or_the_digest(name: str, state: State, tmp_path: Path) -> None:
    content = saved(state)
    assert_same(loaded(tmp_path / name.format(torch_files.digits(content)), content), state)


# ---- damage


def a_checkpoint() -> bytes:
    return saved({"progress": {"iteration": 5}, "model": a_network(seed=1).state_dict(), "configuration": {"seed": 0}})


def check_damage(damaged: bytes, file: Path, state: State) -> None:
    """The damaged weights are refused in one line, or are loaded to the bit: some bytes of a file mean nothing."""
    file.write_bytes(damaged)
    model = a_network()
    try:
        load_weights(model, file)
    except UserError as error:
        text = str(error)
        assert text.startswith(f"task.checkpoint={file} ") and "\n" not in text and len(text) < len(str(file)) + 200
    else:
        assert_same(model.state_dict(), state)


def test_damaged_on_the_way(state: State, tmp_path: Path) -> None:
    for damaged in damages(a_checkpoint(), 40, seed=3):
        check_damage(damaged, tmp_path / "w.pt", state)


def test_a_bit_of_a_weight_flipped(state: State, tmp_path: Path) -> None:
    content = bytearray(saved(state))
    weights = state["classifier.weight"].numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    assert "is damaged (BadZipFile: Bad CRC-32 for file" in refused(tmp_path / "w.pt", bytes(content))


def test_a_size_in_the_archive_became_huge(tmp_path: Path) -> None:
    content = bytearray(a_checkpoint())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = (1 << 31).to_bytes(4, "little")
    assert "is damaged (the size of archive/" in refused(tmp_path / "w.pt", bytes(content))


@pytest.mark.parametrize("content", [saved([1]), saved({"model": {}}), b"text"], ids=["list", "no settings", "text"])
def test_a_file_put_beside_the_checkpoints(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunFolder(tmp_path, {"seed": 0}).save(4, {"weight": torch.zeros(3)})
    other = tmp_path / f"checkpoint-5-{torch_files.digits(content)}.pt"
    other.write_bytes(content)
    found = RunFolder(tmp_path, {"seed": 0}).newest()
    assert found is not None and found[0] == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{other} ") and line.endswith("; using the one before")


# ---- checkpoints that are good and cannot be read now


def no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def no_allocation(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")


def older_torch(*_: object, **__: object) -> None:
    raise pickle.UnpicklingError("Unsupported global: GLOBAL torch._utils._rebuild_new was not an allowed global")


def stale(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize(
    ("place", "name", "failure", "reason"),
    [
        (torch, "load", no_memory, "cannot be loaded (MemoryError)"),
        (torch, "load", no_allocation, "cannot be loaded (RuntimeError: [enforce fail] DefaultCPUAllocator: can't"),
        (torch, "load", older_torch, "holds more than tensors, torch._utils._rebuild_new"),
        (Path, "read_bytes", stale, f"cannot be read ({os.strerror(errno.ESTALE)})"),
        (Path, "read_bytes", no_memory, "cannot be read (MemoryError)"),
    ],
    ids=["memory", "allocator", "older torch", "stale handle", "memory for the bytes"],
)
def test_a_run_started_again_where_its_checkpoints_cannot_be_read(
    place: Any, name: str, failure: Callable[..., None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(TinyNet(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    newest = next(tmp_path.glob("checkpoint-12-*"))
    capsys.readouterr()
    with monkeypatch.context() as patched, pytest.raises(UserError) as caught:
        patched.setattr(place, name, failure)
        train(TinyNet(), tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{newest} {reason}") and "; nothing was removed: try again" in text and "\n" not in text
    assert "beginning" not in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    train(TinyNet(), tmp_path)
    assert f"finished before, as in {newest}" in capsys.readouterr().err


def test_a_damaged_checkpoint_goes_and_what_is_none_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {"seed": 0})
    folder.save(4, {})
    damaged = folder.save(8, {})
    damaged.write_bytes(damaged.read_bytes()[:-1])
    other, place = (tmp_path / f"checkpoint-9-{digits}.pt" for digits in (torch_files.digits(b"text"), 16 * "0"))
    other.write_bytes(b"text")
    place.mkdir()
    resumed = RunFolder(tmp_path, {"seed": 0})
    assert resumed.newest() is not None
    for iteration in (10, 11, 12):
        resumed.save(iteration, {})
    assert other.exists() and place.exists() and not damaged.exists()


def test_half_written_records_of_another_command(tmp_path: Path) -> None:
    (tmp_path / "earlier.json.0a1b2c3d.part").touch()
    RunFolder(tmp_path, {})
    assert not list(tmp_path.iterdir())


# ---- the tasks


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("task", ["task=gradient-error", "task=thresholds"])
def test_weights_that_are_not_finite_leave_no_record(
    task: str, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    state["bn.bias"].fill_(torch.nan)
    torch.save(state, "nan.pt")
    arguments = [argument for argument in GRADIENTS if not argument.startswith(("task", "-m"))]
    assert cli.main([*arguments, task, "task.checkpoint=nan.pt"]) == 1
    assert capsys.readouterr().err.endswith("holds weights that are not finite: bn.bias has NaN or infinity\n")
    assert not list(Path().rglob("*.csv")) and not list(Path().rglob("records.json"))


@pytest.mark.usefixtures("in_an_empty_folder")
def test_gradients_of_weights_that_are_all_zero(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, "zero.pt")
    arguments = [argument for argument in GRADIENTS if argument != "-m"]
    assert cli.main([*arguments, "task.checkpoint=zero.pt"]) == 1
    assert "task.checkpoint=zero.pt: gradients at these weights are 0 or not finite" in capsys.readouterr().err
    assert not list(Path().rglob("*.csv")) and not list(Path().rglob("records.json"))
