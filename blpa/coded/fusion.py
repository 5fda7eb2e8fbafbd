"""Which batch norms compute their ReLU too, or write over their input: those where the running program proves it.

    out = self.relu(self.bn(self.conv(x)))        out = self.conv(x)
                                                  out = self.bn(out)
                                                  out = self.relu(out)

In both forms nobody but the ReLU can read what the batch norm returns, and nobody but the batch norm what the
convolution returns. So one pass over memory normalises, rectifies and encodes, and may write where it reads.

The proof is of one call in one function that runs: the code object tells the place in its source, which must compile to
that code; what is called there must be PyTorch's batch norm, convolution and ReLU, as PyTorch wrote them and without
hooks; a variable must be the function's own, be read by the next statement alone, and then end or be bound anew.
Between that call and the batch norm there may be nothing but PyTorch's own functions. Of an nn.Sequential the same is
known of neighbours. Where anything else is found, nothing is fused.

Tracing the program in place of reading it would prove this for the branches that a trial takes, and not for the others.
"""

import ast
import functools
import itertools
import linecache
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

RELUS = F.relu, F.relu_, torch.relu, torch.relu_
_BATCH_NORMS = F.batch_norm, torch.batch_norm
_CONVOLUTIONS = torch.conv1d, torch.conv2d, torch.conv3d  # which F.conv1d and the others are
_BATCH_NORM_MODULES = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_CONVOLUTION_MODULES = nn.Conv1d, nn.Conv2d, nn.Conv3d
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.ReLU, nn.Identity, *_BATCH_NORM_MODULES, *_CONVOLUTION_MODULES)
}
_CALL = nn.Module.__call__
"""What modules ran when this was imported: who has replaced it since may keep tensors."""
_SEQUENTIAL: types.CodeType = nn.Sequential.forward.__code__
_PASSING_ON = {
    getattr(function, "__code__", None)
    for function in (
        F.batch_norm, torch.overrides.handle_torch_function, _BatchNorm.forward, nn.Module._call_impl,
        nn.Module._wrapped_call_impl,
        *(function for kind in _CONVOLUTION_MODULES for function in (kind.forward, kind._conv_forward)),
    )
}  # fmt: skip
"""Functions that return what they call returns, and keep none of it. What runs hooks is a function inside _call_impl,
and not among them."""

Position = tuple[int | None, int | None, int | None, int | None]
"""Of an expression: first and last line, first and last column."""


class Fusion(NamedTuple):
    """What a batch norm may do beside normalising."""

    rectify: bool = False
    """Return relu(y): a ReLU alone reads y."""
    overwrite: bool = False
    """Write over its input, the output of a convolution that nobody else reads."""


NONE = Fusion()


class Output(NamedTuple):
    """The last output of a convolution, and the place of the call that has returned it."""

    tensor: "weakref.ref[Tensor]"
    code: types.CodeType
    position: Position


def caller_of(frame: types.FrameType | None) -> types.FrameType | None:
    """Return the frame of the program that called PyTorch's function or module, from a frame of its handler."""
    while frame is not None and (frame.f_code in _PASSING_ON or _is_own(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    return frame


def _is_own(module: Any) -> bool:
    return isinstance(module, str) and (module == "blpa.convert" or module.startswith("blpa.coded."))


def output_of(frame: types.FrameType | None, tensor: Tensor) -> Output | None:
    """Note the output of a convolution that a frame of the program has called."""
    return None if frame is None else Output(weakref.ref(tensor), frame.f_code, _position_in(frame))


def fusion_of(frame: types.FrameType | None, x: Tensor, convolved: Output | None) -> Fusion:
    """Return what a batch norm of x may do, which a frame of the program has called.

    Args:
        frame: from `caller_of`.
        x: input of the batch norm.
        convolved: the last output of a convolution, if any.
    """
    if frame is None:
        return NONE
    if convolved is not None and (convolved.tensor() is not x or convolved.code is not frame.f_code):
        convolved = None
    if frame.f_code is _SEQUENTIAL:
        return _in_sequential(_local(frame, "self"), _local(frame, "module"), convolved is not None)
    calls = _calls_in(frame.f_code)
    call = None if calls is None else calls.by_position.get(_position_in(frame))
    if calls is None or call is None or not _is(_called(frame, call.func), _BATCH_NORMS, _BATCH_NORM_MODULES):
        return NONE
    producer = calls.producers.get(call)
    is_dead = (
        convolved is not None
        and producer is not None
        and _position(producer) == convolved.position
        and _is(_called(frame, producer.func), _CONVOLUTIONS, _CONVOLUTION_MODULES)
    )
    return Fusion(_is_read_by_relu(calls, frame, call), is_dead)


def is_observed() -> bool:
    """Return whether a mode of PyTorch's may have kept a tensor; one that only counts has not, nor a default device."""
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    return not all(getattr(mode, "only_counts", isinstance(mode, DeviceContext)) for mode in modes)


def _is_exactly(module: Any, kind: type[nn.Module]) -> bool:
    """Return whether a module is exactly of a class, converted or not, has no hooks, and runs as PyTorch wrote it."""
    if not isinstance(module, nn.Module) or getattr(type(module), "_blpa_stock", type(module)) is not kind:
        return False
    if kind.forward is not _FORWARDS[kind] or type(module).__call__ is not _CALL:
        return False
    return "forward" not in vars(module) and not any(
        getattr(where, f"{prefix}_{hooks}_hooks")
        for where, prefix in ((module, ""), (hooks_of_all, "_global"))
        for hooks in ("forward", "forward_pre", "backward", "backward_pre")
    )


def _is(called: Any, functions: tuple[Any, ...], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether what is called is one of these functions, or a module exactly of one of these classes."""
    return any(called is function for function in functions) or any(_is_exactly(called, kind) for kind in kinds)


def _is_relu(called: Any) -> bool:
    """Return whether what is called is PyTorch's ReLU, and nobody has replaced that."""
    return F.relu is RELUS[0] and _is(called, RELUS, (nn.ReLU,))


def _in_sequential(sequential: nn.Sequential, module: Any, is_convolved: bool) -> Fusion:
    """Return what a batch norm may do in an nn.Sequential, of which neighbours read each other's values alone."""
    kind = getattr(type(sequential), "_blpa_stock", type(sequential))
    modules = list(sequential._modules.values())
    places = [k for k, inside in enumerate(modules) if inside is module]
    if kind.__iter__ is not nn.Sequential.__iter__ or len(places) != 1 or not _is(module, (), _BATCH_NORM_MODULES):
        return NONE
    before, after = modules[: places[0]][-1:], modules[places[0] + 1 :]
    is_dead = is_convolved and bool(before) and _is(before[0], (), _CONVOLUTION_MODULES)
    return Fusion(_is_relu(next((one for one in after if not _is_exactly(one, nn.Identity)), None)), is_dead)


def _is_read_by_relu(calls: "_Calls", frame: types.FrameType, call: ast.Call) -> bool:
    """Return whether a ReLU alone reads the value of a call, perhaps after some nn.Identity."""
    reader = calls.readers.get(call)
    if reader is None:
        return False
    called = _called(frame, reader.func)
    return _is_read_by_relu(calls, frame, reader) if _is_exactly(called, nn.Identity) else _is_relu(called)


def _local(frame: types.FrameType, name: str) -> Any:
    """Return a local variable of a function."""
    variables = frame.f_locals
    found = variables.get(name)
    if isinstance(variables, dict):  # until Python 3.13 a copy, which would keep all tensors in it alive
        variables.clear()
    return found


def _called(frame: types.FrameType, expression: ast.expr) -> Any:
    """Return what a dotted name stands for in a frame; None if finding that would run code of the program's own."""
    code = frame.f_code
    if isinstance(expression, ast.Name):
        if expression.id in code.co_varnames:
            return None if expression.id in code.co_cellvars else _local(frame, expression.id)
        return None if expression.id in code.co_freevars else frame.f_globals.get(expression.id)
    if not isinstance(expression, ast.Attribute):
        return None
    owner, name = _called(frame, expression.value), expression.attr
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name)
    if not isinstance(owner, nn.Module) or name in vars(owner):
        return None
    return owner._modules.get(name) if _finds_modules(type(owner), name) else None


def _finds_modules(kind: type[nn.Module], name: str) -> bool:
    """Return whether `self.name` is a module's module of that name: its class has nothing of this name before."""
    is_plain = (
        kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is object.__getattribute__  # type: ignore[comparison-overlap]
    )
    return is_plain and not any(name in vars(base) for base in kind.__mro__)


# ---- reading source


@functools.lru_cache(maxsize=4096)
def _positions(code: types.CodeType) -> tuple[Position, ...]:
    return tuple(code.co_positions())


def _position_in(frame: types.FrameType) -> Position:
    """Return the position of the call that a frame waits for."""
    return _positions(frame.f_code)[frame.f_lasti // 2]


def _position(call: ast.Call) -> Position:
    return call.lineno, call.end_lineno, call.col_offset, call.end_col_offset


def _unpacks(call: ast.Call) -> bool:
    """Return whether a call unpacks its arguments, which may run other calls at its place."""
    return any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords)


class _Calls(NamedTuple):
    """The calls in a function, and whose value goes where."""

    by_position: dict[Position, ast.Call]
    readers: dict[ast.Call, ast.Call]
    """The call that alone reads a call's value, as its first argument, where that is proven."""
    producers: dict[ast.Call, ast.Call]
    """The same the other way round."""


class _Reading:
    """A function that is read for its calls."""

    def __init__(self, tree: ast.FunctionDef, code: types.CodeType) -> None:
        self.nodes = list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.own = set(code.co_varnames) - set(code.co_cellvars)
        self.next: dict[ast.AST, ast.stmt] = {}
        for node in self.nodes:
            for _, field in ast.iter_fields(node):
                if isinstance(field, list) and field and isinstance(field[0], ast.stmt):
                    self.next.update(itertools.pairwise(field))

    def calls(self) -> _Calls:
        """Return the calls that unpack no arguments."""
        calls = [node for node in self.nodes if isinstance(node, ast.Call) and not _unpacks(node)]
        readers = {call: reader for call in calls if (reader := self._reader(call)) is not None}
        producers = {reader: call for call, reader in readers.items()}
        return _Calls({_position(call): call for call in calls}, readers, producers)

    def _reader(self, call: ast.Call) -> ast.Call | None:
        """Return the reader of a call's value: the call around it, or the next statement's by a variable."""
        parent = self.parents[call]
        if isinstance(parent, ast.Call):
            return parent if parent.args[:1] == [call] and not _unpacks(parent) else None
        then = self.next.get(parent)
        if not isinstance(parent, ast.Assign) or then is None or len(parent.targets) != 1:
            return None
        target = parent.targets[0]
        if not isinstance(target, ast.Name) or target.id not in self.own or not self._ends(target.id, then):
            return None
        read = [node for node in ast.walk(then) if isinstance(node, ast.Name) and node.id == target.id]
        read = [node for node in read if isinstance(node.ctx, ast.Load)]
        reader = self.parents[read[0]] if len(read) == 1 else None
        if not isinstance(reader, ast.Call) or reader.args[:1] != read or _unpacks(reader):
            return None
        again = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda
        return None if any(isinstance(node, again) for node in self._around(reader)) else reader

    def _ends(self, name: str, statement: ast.stmt) -> bool:
        """Return whether nobody reads a variable's value after a statement."""
        if isinstance(statement, ast.Return):
            return not any(isinstance(node, ast.Try | ast.TryStar) for node in self._around(statement))
        is_bound = isinstance(statement, ast.Assign) and len(statement.targets) == 1
        target = statement.targets[0] if is_bound else None  # type: ignore[attr-defined]
        return isinstance(target, ast.Name) and target.id == name

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node


@functools.lru_cache(maxsize=4096)
def _calls_in(code: types.CodeType) -> _Calls | None:
    """Read a function's source; None unless it is there, is what was compiled, and reads variables by name alone."""
    if {"locals", "vars", "eval", "exec", "dir"} & set(code.co_names):
        return None
    found = _functions(code.co_filename, "".join(linecache.getlines(code.co_filename))).get(code)
    return None if found is None else _Reading(found, code).calls()


@functools.lru_cache(maxsize=4)  # whole files
def _functions(filename: str, source: str) -> dict[types.CodeType, ast.FunctionDef]:
    """Return the functions in a file by what they compile to."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the program, which has heard them
            tree = ast.parse(source, filename)
            compiled = compile(tree, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    by_place = {
        (node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    found, codes = {}, [compiled]
    for code in codes:  # grows
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        node = by_place.get((code.co_name, code.co_firstlineno))
        if node is not None:
            found[code] = node
    return found
