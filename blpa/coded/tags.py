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

from torch import Tensor

from blpa.coded.tensors import Saved
from blpa.tracing import Changes, changes


class _Tag:
    """What is known of a tensor at one count of its changes; copies and pickles of the tensor know nothing."""

    def __init__(self, saved: Saved | None, channel: int | None, version: Changes) -> None:
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
        found = _Tag(saved, channel, changes(tensor))
        if self.is_traced:
            self._traced[tensor] = found
        else:
            tensor._blpa_tag = found  # type: ignore[attr-defined]
            self._tagged.append(weakref.ref(tensor))
        return tensor

    def saved(self, tensor: Tensor) -> Saved | None:
        """Return what is saved of a tensor; None without a tag, or if the tensor was changed since."""
        found = self._find(tensor)
        return found.saved if found is not None and found.version == changes(tensor) else None

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
