"""Which tensors a network saves for the backward pass, and which modules and functions save them.

A training step is run on the meta device under memory.LiveBytes, with hooks that hear of every saved tensor. Attention
and dropout count as their CUDA kernels save: on the meta device PyTorch would run others.
"""

import weakref
from collections import Counter
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from blpa.coded.mode import THREAD
from blpa.convert import policy_of, set_policies
from blpa.memory import TEMPORARY, LiveBytes


@dataclass(frozen=True)
class Bytes:
    """Bytes of a training step: alive after the forward pass, and at the peak, gradients of the weights included."""

    saved: int
    peak: int
    at_peak: tuple[tuple[str, int], ...]
    """The largest tensors alive at the peak."""


Saver = tuple[str, str, int]
"""A call that saves a tensor: module, function, and how often the module has called it."""


@dataclass
class SavedTensor:
    """A saved tensor of one run."""

    storage: Any
    nbytes: int
    shape: tuple[int, ...]
    savers: list[Saver]
    by_hook: bool = False
    """Whether a function without a coded version saves it as codes."""


def count_step(model: nn.Module, arguments: Any, is_coded: bool) -> tuple[Bytes, list[SavedTensor]]:
    """Count one step of a converted model, as PyTorch's own unless is_coded."""
    policies = {module: policy_of(module) for module in model.modules()}
    if not is_coded:
        set_policies(model, dict.fromkeys(policies))
    counter = _Counter({module: name for name, module in model.named_modules()})
    recorder = counter.recorder
    counter.ignore([*tensors_in(arguments), *model.parameters(), *model.buffers()])
    handles: list[Any] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            mark = parameter.register_post_accumulate_grad_hook(
                lambda p: counter.mark(p.grad, "gradients of the weights")
            )
            handles.append(mark)
    args, kwargs = arguments
    THREAD.listener = recorder
    try:
        with (
            counter,
            torch.autograd.graph.saved_tensors_hooks(recorder.saved, lambda tensor: tensor),
            _LikeCuda(),
            torch.enable_grad(),
        ):
            outputs = [leaf for leaf in tensors_in(model(*args, **kwargs)) if leaf.requires_grad]
            if not outputs:
                raise ValueError("no output of the model requires grad: nothing is saved for a backward pass")
            loss = torch.stack([output.sum().float() for output in outputs]).sum()
            del outputs
            saved = counter.live_bytes
            tensors = [tensor for tensor in recorder.tensors.values() if tensor.storage() is not None]
            loss.backward()
    finally:
        THREAD.listener = None
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
        set_policies(model, policies)
    return Bytes(saved, counter.peak_bytes, counter.largest_at_peak()), tensors


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dictionaries and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_in(list(vars(leaf).values()))
    return found


class _LikeCuda(TorchFunctionMode):
    """Run attention and dropout on the meta device by the operations of a GPU, which save the least."""

    only_counts = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is F.scaled_dot_product_attention and first.dim() == 4:
                return self._attention(*args, **kwargs)
            if func in (F.dropout, torch.dropout):
                return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
            attn_mask = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.ops.aten.native_dropout(x, p, True)[0] if training and p > 0 else x


class _Recorder:
    """Hear what a network saves, and which module and function runs (blpa.coded.mode.Listener)."""

    def __init__(self, counter: LiveBytes, names: dict[nn.Module, str]) -> None:
        self.counter = counter
        self.names = names
        self.modules: list[str] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.caller = "", "", 0
        self.tensors: dict[int, SavedTensor] = {}

    @property
    def module(self) -> str:
        """Name of the module that runs."""
        return self.modules[-1] if self.modules else ""

    def entered(self, module: nn.Module) -> None:
        """See Listener."""
        self.modules.append(self.names.get(module, ""))

    def left(self) -> None:
        """See Listener."""
        self.modules.pop()

    def called(self, function: Any) -> None:
        """See Listener."""
        name = getattr(function, "__name__", str(function)).strip("_")
        self.calls[self.module, name] += 1
        self.caller = self.module, name, self.calls[self.module, name]

    def saved_by_hook(self, tensor: Tensor, *, is_coded: bool) -> None:
        """See Listener."""
        self.saved(tensor)
        found = self.tensors.get(tensor.untyped_storage()._cdata)
        if found is not None and is_coded:
            found.by_hook = True

    def saved(self, tensor: Tensor) -> Tensor:
        """Hear that a tensor is saved; return it without its history, or an output would keep itself alive."""
        if self.counter.is_counted(tensor):
            storage = tensor.untyped_storage()
            found = self.tensors.get(storage._cdata)
            if found is None or found.storage() is None:
                found = SavedTensor(weakref.ref(storage), storage.nbytes(), tuple(tensor.shape), [])
                self.tensors[storage._cdata] = found
            if self.caller not in found.savers:
                found.savers.append(self.caller)
        return tensor.detach()


class _Counter(LiveBytes):
    """Count live bytes by kind, where a temporary's kind is the module that runs and the shape."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.recorder = _Recorder(self, names)
        self.tensor_bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.peak_bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.kind_of(leaf) == TEMPORARY:
                where = self.recorder.module or "the backward pass"
                kind = "codes" if leaf.dtype == torch.uint8 else f"{list(leaf.shape)} of {where}"
                self.tensor_bytes[kind] = leaf.untyped_storage().nbytes()
                self.mark(leaf, kind)
        if self.peak_bytes > before:
            self.kinds_at_peak = dict(self.kinds)
        return result

    def largest_at_peak(self) -> tuple[tuple[str, int], ...]:
        """Return kinds and bytes of what takes most at the peak; several tensors of a kind are counted in its name."""
        found = []
        for kind, nbytes in Counter(self.kinds_at_peak).most_common(5):
            tensors = nbytes // self.tensor_bytes[kind] if kind in self.tensor_bytes and kind != "codes" else 1
            found.append((f"{tensors} x {kind}" if tensors > 1 else kind, nbytes))
        return tuple(found)
