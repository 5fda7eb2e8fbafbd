"""Convert any network: its forward pass keeps PyTorch's values, its activations are saved as codes.

    blpa.convert(model, bits=4)
    ...                           train as before
    blpa.restore(model)

`convert` changes nothing of a module but its class, to a subclass whose forward runs the module's own with a mode on
(blpa/coded). Modules, parameters, buffers, hooks, repr and state_dict stay the same objects, so optimisers, checkpoints
and distributed wrappers need no change. Other libraries replace modules, and miss what a network computes by functions.
"""

import difflib
import fnmatch
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpa import layers as own_layers
from blpa.codec import ALLOWED_BITS, Codec
from blpa.coded import FUNCTIONS, MODULES, TRACED_FUNCTIONS, Coding, Policy
from blpa.coded.mode import EIGHT_BITS, THREAD, current_mode

DEFAULT_CODECS = {8: Codec(8, "range"), 4: Codec(4, 3.0), 2: Codec(2, 1.7)}
"""At 8 bits rounding is small, and what a clip cuts off decides; at 4 and 2 bits rounding decides."""

UNSUPPORTED = "{}: not supported for a converted network; blpa.restore the model first"

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    bits: int | Codec | None = 4,
    *,
    layers: Mapping[str, int | Codec | None] | None = None,
    attention: Literal[8] | None = 8,
    others: Literal[8] | None = None,
) -> Model:
    """Save the activations of a network as codes for the backward pass.

    Outputs and running statistics stay the same bits; on a GPU those of a batch norm in training may differ by rounding
    (coded/norms.py).

    Args:
        model: any network, changed in place; a converted one gets the new settings.
        bits: 8, 4, 2 or a Codec. None saves exact tensors by the same functions, to tell their error from the codes'.
        layers: other settings by pattern over the names in `named_modules()`, such as {"layer4.*": 8, "head": None};
            a module takes its ancestors' pattern too, and the last that matches counts. None is PyTorch's own.
        attention: bits for queries, keys, values and output of attention, 8 for any `bits`; None saves them exactly.
        others: bits for what functions without a coded version save, 8; None saves it exactly. Their errors are not
            known: `gradient_error` measures them.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module, or layers is not a mapping.
        ValueError: a setting is not allowed, a pattern matches no module, or the model is scripted, compiled, sharded
            or wrapped by a forward of its own.

    Source: the codes are Chakrabarti and Moseley's, section 3.2; for other layers README, "Any network".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    for name, value in (("attention", attention), ("others", others)):
        if value not in (8, None) or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: must be 8 or None")
    if layers is not None and not isinstance(layers, Mapping):
        raise TypeError(f"layers is a {type(layers).__name__}: must map patterns of module names to bits")
    _check(model)

    def policy(bits: int | Codec | None) -> Policy:
        return Policy(_codec(bits), EIGHT_BITS if attention else None, EIGHT_BITS if others else None)

    policies = _policies(
        model, policy(bits), {pattern: b if b is None else policy(b) for pattern, b in (layers or {}).items()}
    )
    set_policies(model, policies)
    return model


def restore(model: Model) -> Model:
    """Undo `convert`: give every module its own class back, in place.

    Args:
        model: converted, or not; the whole, for a part of a converted model runs as the rest of it does.

    Returns:
        The model.

    Raises:
        ValueError: something else has changed the class of a converted module since.
    """
    classes = {module: _stock_class(module) for module in model.modules()}  # all or nothing
    for module, stock_class in classes.items():
        module.__class__ = stock_class
    return model


def is_converted(model: nn.Module) -> bool:
    """Return whether `convert` was called on a model, or on one that contains it."""
    return isinstance(model, _Coded)


def set_policies(model: nn.Module, policies: Mapping[nn.Module, Policy | None]) -> None:
    """Convert each module of a model to its policy, in place."""
    classes = {module: _stock_class(module) for module in policies}  # all or nothing
    for module, policy in policies.items():
        module.__class__ = _coded_class(classes[module], policy, module is model)  # type: ignore[arg-type]


def policy_of(module: nn.Module) -> Policy | None:
    """Return how a module saves its activations; None as PyTorch does."""
    return module._blpa_policy if isinstance(module, _Coded) else None


@contextmanager
def stock() -> Iterator[None]:
    """Run converted networks of this thread as PyTorch's own."""
    before, THREAD.is_stock = THREAD.is_stock, True
    try:
        yield
    finally:
        THREAD.is_stock = before


class _Coded(nn.Module):
    """What the subclasses have in common; the first of their bases, so that it comes before the module's class."""

    _blpa_stock: type[nn.Module]
    _blpa_policy: Policy | None
    _blpa_is_root: bool

    def __init_subclass__(cls) -> None:
        """Hide the subclass from a user's class that registers its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the module's class, to be converted again."""
        state = cast(tuple[Any, ...], super().__reduce_ex__(2))[2:]
        return _rebuild, (self._blpa_stock, self._blpa_policy, self._blpa_is_root), *state

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script."""
        raise RuntimeError(UNSUPPORTED.format("torch.jit.script"))


def _rebuild(stock: type[nn.Module], policy: Policy | None, is_root: bool) -> nn.Module:
    coded: type[nn.Module] = _coded_class(stock, policy, is_root)  # type: ignore[arg-type]
    return coded.__new__(coded)


@functools.cache
def _coded_class(stock: type[nn.Module], policy: Policy | None, is_root: bool) -> type[nn.Module]:
    """Make the subclass of a module's class, of the same name, whose forward runs with the mode on."""
    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_blpa_stock": stock,
        "_blpa_policy": policy,
        "_blpa_is_root": is_root,
    }
    own = [own for of, own in MODULES.items() if issubclass(stock, of)]
    bases = own if stock in MODULES else (stock, *own)  # so `super().forward` of a user's class finds the coded one
    coded: type[nn.Module] = type(stock)(stock.__name__, (_Coded, *bases), namespace)  # type: ignore[misc]
    inner = coded.forward

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A wrapper in the module's own `forward` may still call this after `restore` or another `convert`.
        if not isinstance(self, _Coded):
            return stock.forward(self, *args, **kwargs)
        return _run(self, functools.partial(inner, self), self._blpa_policy, self._blpa_is_root, args, kwargs)

    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # what unwraps functions to the last, as Accelerate does, would unwrap this one too
    coded.forward = forward
    return coded


def _run(
    module: nn.Module, forward: Callable[..., Any], policy: Policy | None, is_root: bool, args: Any, kwargs: Any
) -> Any:
    """Run a forward with the mode on: entered by the outermost converted module, changed by those inside."""
    if not torch.is_grad_enabled() or THREAD.is_stock:
        return forward(*args, **kwargs)
    if _is_exporting() and not module.training:
        return forward(*args, **kwargs)  # a graph for inference
    _check_transforms()
    mode = current_mode()
    if mode is not None:
        before = mode.policy
        _enter(mode, module, policy)
        try:
            return forward(*args, **kwargs)
        finally:
            _leave(mode, before)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(tensor.requires_grad for tensor in itertools.chain(module.parameters(), inputs)):
        return forward(*args, **kwargs)
    # What an earlier layer computed is no input of the network, if its layers are called one by one.
    held = [tensor for tensor in inputs if not tensor.requires_grad]
    if torch.compiler.is_dynamo_compiling():
        mode = Coding(TRACED_FUNCTIONS, policy, held, is_traced=True)
        return _run_traced(mode, functools.partial(forward, *args, **kwargs))
    mode = Coding(FUNCTIONS, policy, [*module.parameters(), *module.buffers(), *held], THREAD.listener)
    THREAD.mode = mode
    _enter(mode, module, policy)
    output = None
    try:
        with mode:
            output = forward(*args, **kwargs)
    finally:
        THREAD.mode = None
        _leave(mode, None)
        passed_on = [] if is_root else [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        mode.tags.remove_all(but=passed_on)
    if is_root and policy and not mode.coded_calls:
        _warn_of_no_codes(module)
    return output


def _enter(mode: Coding, module: nn.Module, policy: Policy | None) -> None:
    """Note that the forward of a module begins."""
    mode.policy = policy
    if mode.listener is not None:
        mode.listener.entered(module)


def _leave(mode: Coding, policy: Policy | None) -> None:
    """Note that it has ended, and return to the policy before."""
    mode.policy = policy
    if mode.listener is not None:
        mode.listener.left()


def _run_traced(mode: Coding, forward: Callable[[], Any]) -> Any:
    """Run a forward with the mode on while a compiler traces it, in one graph: tags mean nothing in the next."""
    THREAD.traced_mode = mode
    try:
        with torch._dynamo.error_on_graph_break(True), mode:
            return forward()
    finally:
        THREAD.traced_mode = None


_warned: WeakSet[nn.Module] = WeakSet()


def _warn_of_no_codes(module: nn.Module) -> None:
    """Warn, once for each model, that converting it was of no use."""
    if module in _warned or not any(parameter.requires_grad for parameter in module.parameters()):
        return
    _warned.add(module)
    warnings.warn(
        f"{type(module).__name__} is converted, but its forward pass saved no codes: its tensors are too small, it is "
        "checkpointed, or its functions have no coded version (blpa.explain lists them)",
        stacklevel=2,
    )


def _is_exporting() -> bool:
    """Return torch.compiler.is_exporting(); traced by PyTorch 2.11, that is true of torch.compile too."""
    return bool(torch.compiler._is_exporting_flag)


def _check_transforms() -> None:
    """Raise RuntimeError under a transform of PyTorch's that cannot see codes."""
    if _is_exporting():
        raise RuntimeError(UNSUPPORTED.format("export in training"))
    if torch.compiler.is_dynamo_compiling():
        return
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(UNSUPPORTED.format("tracing"))
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(UNSUPPORTED.format("torch.func transforms"))


def _check(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot be converted."""
    for name, module in model.named_modules():
        what = f"module {name!r}" if name else "model"
        bases = {base.__name__ for base in type(module).__mro__}
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{what} is a {type(module).__name__}: must be a plain module; convert before torch.jit.script"
            )
        if isinstance(module, own_layers.BatchNormReLU | own_layers.Conv2d):
            raise ValueError(f"{what} is a blpa {type(module).__name__}: must be PyTorch's own; it saves codes already")
        if "OptimizedModule" in bases or module._compiled_call_impl is not None:
            raise ValueError(f"{what} is compiled: must be a plain module; convert, then compile")
        if bases & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError(f"{what} is sharded by FSDP: must be a plain module; convert, then shard")
    if "forward" in vars(model) and not isinstance(model, _Coded):  # which would run in place of the class's
        raise ValueError(
            "model has a forward of its own: must be its class's; convert before Accelerate or another tool wraps it"
        )


def _codec(bits: int | Codec | None) -> Codec | None:
    """Return the codec of a number of bits."""
    if bits is None or isinstance(bits, Codec):
        return bits
    if type(bits) is not int or bits not in ALLOWED_BITS:
        raise ValueError(f"bits = {bits!r}: must be 8, 4, 2, a blpa.Codec or None")
    return DEFAULT_CODECS[bits]


def _policies(model: nn.Module, default: Policy, layers: Mapping[str, Policy | None]) -> dict[nn.Module, Policy | None]:
    """Return the policy of each module: of the last pattern that matches its name or that of a module around it."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in layers:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: {pattern!r} is a {type(pattern).__name__}: must be a pattern of module names")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.6)
            inside = [name for name, _ in model.named_children()]
            hint = f"the nearest names are {', '.join(near)}" if near else f"the model's are {', '.join(inside)}"
            hint = hint if inside else "the model has no modules inside"
            raise ValueError(f"layers: {pattern!r} matches no module; {hint}")
    policies: dict[nn.Module, Policy | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        around = {".".join(parts[:k]) for k in range(1, len(parts) + 1)} | {name}
        matching = [
            policy for pattern, policy in layers.items() if any(fnmatch.fnmatchcase(n, pattern) for n in around)
        ]
        if matching:
            policies[module] = matching[-1]
        else:
            policies.setdefault(module, default)
    return policies


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class."""
    if "_blpa_stock" in vars(type(module)):
        return cast(type[_Coded], type(module))._blpa_stock
    if isinstance(module, _Coded):
        raise ValueError(
            f"a module became a {type(module).__name__} after it was converted: undo that first (a parametrization, a "
            "wrapper), then restore or convert"
        )
    return type(module)
