"""Load weights that come from elsewhere into the configured network: all of them, exactly, or none.

Taken are our checkpoints, and files of a state_dict, alone or under "model" or "state_dict", with the prefixes that
torch.compile and data parallelism add to its names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blpa.models.preact_resnet import ARCHITECTURES, CIFAR
from runners.errors import UserError
from runners.training import torch_files
from runners.training.torch_files import Unreadable


def load_weights(model: nn.Module, file: Path) -> None:
    """Load the weights of the file task.checkpoint, of any mode, into a model.

    Raises:
        UserError: there is no such file, it is damaged, or its weights are not of this network or not finite.
    """
    try:
        model.load_state_dict(fitting(model.state_dict(), state_of(_read(file))))
    except Unreadable as error:
        raise UserError(f"task.checkpoint={file} {error}") from error


def _read(file: Path) -> Any:
    if file.is_dir():
        raise Unreadable("is a folder: name a file of weights in it")
    if not file.exists():
        raise UserError(f"task.checkpoint={file}: there is no such file")
    if not file.is_file():
        raise Unreadable("is not a file, but a pipe or a device")
    return torch_files.unpickled(torch_files.content_of(file))


def state_of(content: Any) -> dict[str, Tensor]:
    """Find the state_dict in what torch.save wrote, and take the prefixes of wrappers off its names.

    Raises:
        Unreadable: there is none.
    """
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise Unreadable("holds no weights: a state_dict is expected, alone or under 'model' or 'state_dict'")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Unreadable(f"holds no weights of a network: {name!r} is of type {type(value).__name__}, not a tensor")
    # Wrapped blocks have the first prefix inside of their names too.
    names = [name.replace("_orig_mod.", "") for name in state]
    while all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    if len(set(names)) < len(names):
        raise Unreadable("holds some weights twice, with and without the prefix _orig_mod")
    return dict(zip(names, state.values(), strict=True))


def fitting(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check weights against those of a network, and convert them to its dtypes where that is exact.

    Args:
        own: the network's state_dict.
        state: the weights to load.

    Raises:
        Unreadable: they are of another network, or not finite; the message names the difference.
    """
    there, here = network_of(state), network_of(own)
    if there and there != here:
        different = [key for key in here if here[key] != there[key]]
        raise Unreadable(
            f"holds weights of {' and '.join(f'{key} {there[key]:g}' for key in different)}, "
            f"and the network here has {' and '.join(f'{key} {here[key]:g}' for key in different)}"
        )
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unexpected:
        found = [f"{names[0]} is {what}{f' and {len(names) - 1} more' if names[1:] else ''}"
                 for names, what in ((missing, "missing"), (unexpected, "unexpected")) if names]  # fmt: skip
        raise Unreadable(f"holds weights of another network: {'; '.join(found)}")
    return {name: _converted(name, state[name], like) for name, like in own.items()}


def network_of(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return depth, width, classes and image channels of a PreActResNet by its weights; empty where they are none's."""
    stem, classifier = (state.get(f"{name}.weight") for name in ("stem", "classifier"))
    blocks = {found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    if stem is None or classifier is None or stem.dim() != 4 or classifier.dim() != 2 or not blocks:
        return {}
    of_stem = {plan.stem_kernel_size: plan.stem_channels for plan in ARCHITECTURES.values()}
    return {
        "depth": 3 * len(blocks) + 2,
        "stem of size": stem.shape[2],
        "width": stem.shape[0] / of_stem.get(stem.shape[2], CIFAR.stem_channels),
        "classes": classifier.shape[0],
        "image channels": stem.shape[1],
    }


def _converted(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Return a weight in the network's dtype, after checks of all that could make it another weight."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "on the meta device" if value.is_meta else "quantised" if value.is_quantized else "sparse"
        raise Unreadable(f"holds weights that are not plain: {name} is {kind}")
    if value.shape != like.shape:
        raise Unreadable(f"holds weights of another network: {name} is {list(value.shape)}, here {list(like.shape)}")
    kinds = [(tensor.is_floating_point(), tensor.is_complex()) for tensor in (value, like)]
    if kinds[0] != kinds[1]:
        raise Unreadable(f"holds weights of another type: {name} is {value.dtype}, here {like.dtype}")
    widest = torch.float64 if like.is_floating_point() else torch.int64
    exact = value.to(widest)
    if not exact.isfinite().all():
        raise Unreadable(f"holds weights that are not finite: {name} has NaN or infinity")
    converted = value.to(like.dtype)
    if not torch.equal(converted.to(widest), exact):
        raise Unreadable(
            f"holds weights that {like.dtype} would round: {name} is {value.dtype}; save them as {like.dtype}"
        )
    return converted
