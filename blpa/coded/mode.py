"""The mode that sends the functions of a network to their coded versions, while a converted module's forward runs.

PyTorch passes every function that Python code calls to the innermost TorchFunctionMode, whoever calls it: a module, a
forward written by hand, a library. So nothing in the network is replaced.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blpa.codec import Codec
from blpa.coded.fusion import RELUS, Output
from blpa.coded.tags import Tags
from blpa.coded.tensors import Coded, Saved, is_worth_a_code

EIGHT_BITS = Codec(8, "range")
"""For attention and functions without a coded version: no sign to preserve, and errors that every layer below gets."""

Handler = Callable[..., Any]


@dataclass(frozen=True)
class Policy:
    """How a module saves its activations.

    Args:
        codec: of the codes; None saves exact tensors by the same functions.
        attention: codes of attention's queries, keys, values and output; None saves them exactly.
        others: codes of what functions without a coded version save; None saves it exactly.
    """

    codec: Codec | None
    attention: Codec | None = EIGHT_BITS
    others: Codec | None = None


class Listener(Protocol):
    """Who counts what a network saves."""

    def entered(self, module: nn.Module) -> None:
        """Hear that the forward of a converted module begins."""

    def left(self) -> None:
        """Hear that the innermost has ended."""

    def called(self, function: Any) -> None:
        """Hear that the network calls a function."""

    def saved_by_hook(self, tensor: Tensor, *, is_coded: bool) -> Any:
        """Hear that a function without a coded version saves this tensor, of codes or as it was."""


class Coding(TorchFunctionMode):
    """Send functions to the coded versions.

    Args:
        handlers: coded versions by function: handler(coding, function, *args, **kwargs). One that returns
            NotImplemented leaves the call to the function itself.
        policy: None leaves all calls to the functions themselves.
        held: tensors that are in memory anyway: weights, buffers and the network's inputs.
        listener: hears of each function, and of what hooks around the network do not see.

    Attributes:
        coded_calls: number of calls to coded versions that saved codes.
        convolved: the last output of a convolution.
        rectified: the output of a batch norm that has computed its ReLU too, for which the next call is.
        is_traced: whether a compiler traces the forward pass.
    """

    def __init__(
        self,
        handlers: Mapping[Any, Handler],
        policy: Policy | None,
        held: Iterable[Tensor],
        listener: "Listener | None" = None,
        *,
        is_traced: bool = False,
    ) -> None:
        super().__init__()
        self.listener = listener
        self.handlers = handlers
        self.policy = policy
        self.coded_calls = 0
        self.is_traced = is_traced
        self.convolved: Output | None = None
        self.rectified: weakref.ref[Tensor] | None = None
        self.tags = Tags(is_traced)
        # Their addresses, which stay theirs as long as the forward pass runs; a compiler knows no addresses.
        held = [tensor for tensor in held if is_usual(tensor)]
        self._held: Any = held if is_traced else {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the coded version of a function, or the function."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling() and not self.is_traced:
            return func(*args, **kwargs)  # a compiled part of a network that is not compiled
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if self.listener is not None:
            self.listener.called(func)
        if self.rectified is not None:  # never while traced: a tracer refuses the change
            rectified, self.rectified = self.rectified(), None
            if func in RELUS and args and args[0] is rectified:
                return args[0]
        if not self.is_coding:
            return func(*args, **kwargs)
        handler = self.handlers.get(func)
        result = NotImplemented if handler is None else self._handled(handler, func, args, kwargs)
        if result is not NotImplemented:
            return result
        if self.saves_others_exactly:
            return func(*args, **kwargs)
        assert self.policy is not None and self.policy.others is not None
        return call_coding_saved_tensors(self, self.policy.others, func, args, kwargs, _is_finite)

    def _handled(self, handler: Handler, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a coded version; NotImplemented if the function takes arguments that it does not."""
        try:
            return handler(self, func, *args, **kwargs)
        except TypeError:
            try:
                inspect.signature(handler).bind(self, func, *args, **kwargs)
            except TypeError:
                return NotImplemented
            raise

    @property
    def is_coding(self) -> bool:
        """Whether functions go to their coded versions now."""
        return self.policy is not None and torch.is_grad_enabled() and not _is_checkpointed()

    @property
    def codec(self) -> Codec | None:
        """Codec of the policy."""
        assert self.policy is not None
        return self.policy.codec

    @property
    def saves_others_exactly(self) -> bool:
        """Whether functions without a coded version save what they always save."""
        return self.policy is None or self.policy.others is None

    def is_held(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in memory anyway: a weight, a buffer, an input, a view, or what `hold` got."""
        if tensor.is_leaf and tensor.requires_grad:
            return True
        if self.is_traced:
            return any(tensor is other for other in self._held)
        return tensor.untyped_storage()._cdata in self._held

    def hold(self, tensor: Tensor) -> None:
        """Note that a tensor is in memory anyway until the backward pass."""
        if self.is_traced:
            self._held.append(tensor)
        else:
            self._held.add(tensor.untyped_storage()._cdata)

    def hold_views(self, tensor: Tensor, views: Iterable[Tensor]) -> None:
        """Note that views of a tensor are in memory anyway if it is; where addresses are known they tell it."""
        if self.is_traced and self.is_held(tensor):
            self._held.extend(view for view in views if not view.requires_grad)

    def tag(self, tensor: Tensor, saved: Saved | None, channel: int | None) -> Tensor:
        """Put a tag on a tensor, until the network's forward pass ends."""
        return self.tags.put(tensor, saved, channel)

    def saved_of(self, x: Tensor, channel: int) -> Saved | None:
        """Return what a function that reads x saves of it: what the tag holds, else a code of its own.

        Args:
            x: the tensor.
            channel: its channel dimension.

        Returns:
            None if x is better saved as it is: a parameter, an input of the network, or too small.
        """
        saved = self.tags.saved(x)
        if saved is None:
            if self.is_held(x) or not is_worth_a_code(x, channel):
                return None
            saved = Coded.of(x, channel, self.codec)
            self.tag(x, saved, channel)
        self.coded_calls += 1
        return saved


class Thread(threading.local):
    """What a thread runs.

    Attributes:
        mode: of the converted module whose forward runs.
        traced_mode: of the converted module whose forward a compiler traces.
        is_stock: run converted modules as PyTorch's own.
        listener: of the next mode.
    """

    def __init__(self) -> None:
        # Here and not in the class: a compiler guards by what an object has of its own, and tracing would change that.
        self.mode: Coding | None = None
        self.traced_mode: Coding | None = None
        self.is_stock = False
        self.listener: Listener | None = None


THREAD = Thread()


def current_mode() -> Coding | None:
    """Return the mode of the converted module whose forward runs or is traced."""
    return THREAD.traced_mode if torch.compiler.is_dynamo_compiling() else THREAD.mode


def is_recording(*tensors: Any) -> bool:
    """Return whether a function of these arguments records a gradient, and all are plain floating-point tensors."""
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return any(tensor.requires_grad for tensor in found) and all(
        is_usual(tensor) and tensor.is_floating_point() for tensor in found
    )


def is_usual(tensor: Tensor) -> bool:
    """Return whether a tensor is a usual one: not sparse, nor of a class that changes what functions do."""
    kind = type(tensor)
    is_known = kind is Tensor or (
        kind.__torch_function__ is nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is nn.Parameter.__torch_dispatch__  # a DTensor's is its own
    )
    return is_known and tensor.layout == torch.strided and not tensor.is_nested


def may_overwrite(x: Tensor) -> bool:
    """Return whether an autograd function may overwrite x: not a view, whose base it would have to know, nor a leaf."""
    if x.is_leaf and x.requires_grad:
        return False
    return torch.compiler.is_dynamo_compiling() or not x._is_view()


def call_coding_saved_tensors(
    coding: Coding, codec: Codec, function: Any, args: Any, kwargs: Any, is_chosen: Callable[[Tensor], bool]
) -> Any:
    """Call one of PyTorch's functions, and save codes in place of the large tensors that it saves.

    Args:
        coding: the mode.
        codec: of the codes.
        function: the function, which knows nothing of codes.
        args: its arguments.
        kwargs: its keyword arguments.
        is_chosen: which tensors; others are saved as they are.
    """
    if coding.is_traced:
        torch._dynamo.graph_break(
            msg=f"{function.__name__} in {codec.bits} bits: not supported under torch.compile; blpa.convert the model "
            "with attention=None and others=None"
        )
    made: dict[int, Coded] = {}

    def pack(tensor: Tensor) -> Tensor | Saved:
        is_large = is_usual(tensor) and tensor.is_floating_point() and is_worth_a_code(tensor, -1)
        if not is_large or coding.is_held(tensor) or not is_chosen(tensor):
            if coding.listener is not None:
                coding.listener.saved_by_hook(tensor, is_coded=False)
            return tensor
        saved = coding.tags.saved(tensor)
        if saved is None or saved.bits < codec.bits:  # a tag may hold fewer bits than these functions stand
            saved = Coded.of(tensor.detach(), -1, codec)  # the last dimension is the features' in most of them
            made[tensor.untyped_storage()._cdata] = saved
        coding.coded_calls += 1
        if coding.listener is not None:
            for part in saved.tensors:
                coding.listener.saved_by_hook(part, is_coded=True)
        return saved

    def unpack(saved: Tensor | Saved) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.value()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = function(*args, **kwargs)
    if isinstance(result, Tensor) and made:  # a hook gets another object for an output: tag the one that is read
        saved = made.get(result.untyped_storage()._cdata)
        if saved is not None and saved.layout.shape == result.shape:
            coding.tag(result, saved, saved.layout.channel)
    return result


def _is_finite(tensor: Tensor) -> bool:
    """Return whether a range covers a tensor: a mask of minus infinity must stay exact."""
    return tensor.is_meta or bool(tensor.isfinite().all())


def _body_of(function: Any) -> Handler:
    """Return a copy of a function that PyTorch writes in Python, which does not offer itself to the mode first."""
    without_offer = {**function.__globals__, "has_torch_function": lambda tensors: False}
    name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
    body = FunctionType(function.__code__, without_offer, name, defaults, closure)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


COMPOSITES = {F.multi_head_attention_forward: _body_of(F.multi_head_attention_forward)}
"""Functions that PyTorch writes in Python, and inside which it would have the mode off."""


def _is_checkpointed() -> bool:
    """Return whether torch.utils.checkpoint (the non-reentrant one) runs this function for the first or second time.

    It compares what is saved in both runs, and saves nothing of the first, so codes would only be in its way.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
