"""Tags: what is known of the tensors of one forward pass, until it ends.

A coded function puts a tag on its output. The next function that reads the tensor saves what the tag holds, and no code
of its own. A tag counts only while the tensor is unchanged: autograd counts changes in place, and the tag remembers the
count. So a change between two functions costs a code, and never correctness.

A tag is an attribute of the tensor: nothing is looked up by address. While torch.compile traces the network, a tag is
an entry under the tensor in a dictionary, and the count is that of the tracer's own tensor.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from blpa.coded.tensors import Saved


class _Tag:
    """What is known of a tensor at one count of its changes; copies and pickles of the tensor know nothing."""

    def __init__(self, saved: Saved | None, channel: int | None, version: int) -> None:
        self.saved, self.channel, self.version = saved, channel, version

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> None:
        return None


_NAME = "_blpa_tag"


class Tags:
    """The tags of one forward pass, which a compiler traces or which runs."""

    def __init__(self, is_traced: bool) -> None:
        self.is_traced = is_traced
        self._tagged: list[weakref.ref[Tensor]] = []
        self._traced: dict[Tensor, _Tag] = {}

    def put(self, tensor: Tensor, saved: Saved | None, channel: int | None) -> Tensor:
        """Put a tag on a tensor: what is saved of it, and which dimension holds its channels; None is the usual."""
        found = _Tag(saved, channel, self._version(tensor))
        if self.is_traced:
            self._traced[tensor] = found
        else:
            tensor._blpa_tag = found  # type: ignore[attr-defined]
            self._tagged.append(weakref.ref(tensor))
        return tensor

    def saved(self, tensor: Tensor) -> Saved | None:
        """Return what is saved of a tensor; None without a tag, or if the tensor was changed since."""
        found = self._find(tensor)
        return found.saved if found is not None and found.version == self._version(tensor) else None

    def channel(self, tensor: Tensor) -> int:
        """Return the dimension of the channels: as its maker knows it, else 1, or the last of [N, tokens, C]."""
        found = self._find(tensor)
        if found is not None and found.channel is not None:
            return found.channel
        return 2 if tensor.dim() == 3 else min(1, tensor.dim() - 1)

    def remove_all(self, but: Iterable[Tensor] = ()) -> None:
        """Take all tags off, but those of some tensors: what outlives the forward pass would keep codes alive."""
        spared = {id(tensor) for tensor in but}
        for reference in self._tagged:
            tensor = reference()
            if tensor is not None and id(tensor) not in spared and hasattr(tensor, _NAME):
                delattr(tensor, _NAME)
        self._tagged.clear()

    def _version(self, tensor: Tensor) -> int:
        return _traced_version(tensor) if self.is_traced else tensor._version

    def _find(self, tensor: Tensor) -> _Tag | None:
        if self.is_traced:
            return self._traced.get(tensor)
        found: _Tag | None = getattr(tensor, _NAME, None)
        if found is None and tensor._is_view():
            # FSDP calls modules with views of their arguments, which share the count of changes.
            base = tensor._base
            if base is not None and base.dtype == tensor.dtype and _place(base) == _place(tensor):
                found = getattr(base, _NAME, None)
        return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return which elements of its memory a tensor shows."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _traced_version(tensor: Tensor) -> int:
    """Return how often a tensor was changed, while a compiler traces this function."""
    version = 0
    torch._dynamo.comptime.comptime(_set_version)
    return version


def _set_version(context: Any) -> None:
    """Set the local variable `version` of the function that the compiler traces."""
    tensor = context.get_local("tensor")
    # The tracer's tensors do not count what functions of lists change.
    of_lists = [user for user in tensor.as_proxy().node.users if _is_foreach_in_place(user.target)]
    count = tensor.as_fake()._version + len(of_lists)
    from torch._dynamo.variables import ConstantVariable  # here, since it loads the compiler

    context._ComptimeContext__tx.symbolic_locals["version"] = ConstantVariable.create(count)


def _is_foreach_in_place(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name.startswith("_foreach") and name.endswith("_")
