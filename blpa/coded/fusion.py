"""Which batch norms compute their ReLU too, or write over their input: those where the source of the program proves it.

    out = self.relu(self.bn(self.conv(x)))        out = self.conv(x)
                                                  out = self.bn(out)
                                                  out = self.relu(out)

In both forms nobody but the ReLU can read what the batch norm returns, and nobody but the batch norm what the
convolution returns, whatever else the program does. So one pass over memory normalises, rectifies and encodes, and may
write where it reads. Neighbours in an nn.Sequential are as good. Any other use of a module, a hook, or source that
cannot be read, and nothing is fused.

A class is read once. Tracing the program in its place would prove it for the branches that a trial takes, and not for
the others.
"""

import ast
import functools
import inspect
import itertools
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all

RELUS = F.relu, F.relu_, torch.relu, torch.relu_
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


class Fusion(NamedTuple):
    """What a batch norm may do beside normalising."""

    rectify: bool = False
    """Return relu(y): a ReLU alone reads y."""
    overwrite: bool = False
    """Write over its input, the output of a convolution that nobody else reads."""


NONE = Fusion()


class Listening(functools.partial[Any]):
    """A hook of a module that reads no tensor, so that it is in nobody's way."""


class _Use(NamedTuple):
    """A call in a class: the calls whose value it reads, and that read its value; None if others may."""

    argument: Any
    reader: Any


def fusion_of(module: nn.Module, parent: nn.Module | None) -> Fusion:
    """Return what the batch norm that a module calls may do.

    Args:
        module: whose forward runs.
        parent: the module whose forward calls it, if any.
    """
    kind = stock_class(module)
    if kind not in BATCH_NORMS:
        own = _uses(kind).get(F.batch_norm, [])  # type: ignore[arg-type]
        return Fusion(bool(own) and all(_is_relu(module, use.reader) for use in own))
    if parent is None or _has_hooks(module):
        return NONE
    before, after = _neighbours(parent, module)
    if before is None:
        return NONE
    is_rectified = all(_is_relu(parent, reader) for reader in after)
    return Fusion(is_rectified, all(_is(CONVOLUTIONS, parent, argument) for argument in before))


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class, converted or not."""
    found: type[nn.Module] = getattr(type(module), "_blpa_stock", type(module))
    return found


def _neighbours(parent: nn.Module, module: nn.Module) -> tuple[Sequence[Any] | None, Sequence[Any]]:
    """Return whose values a module inside `parent` reads, and who reads its own; None and nothing if unknown."""
    names = [name for name, inside in parent._modules.items() if inside is module]
    if len(names) != 1:
        return None, ()
    kind = stock_class(parent)
    if kind.forward is nn.Sequential.forward:
        inside = [None, *parent._modules, None]
        place = inside.index(names[0])
        return [inside[place - 1]], [inside[place + 1]]
    uses = _uses(kind).get(names[0])  # type: ignore[arg-type]
    return ([use.argument for use in uses], [use.reader for use in uses]) if uses else (None, ())


def _is(kinds: Sequence[type[nn.Module]], parent: nn.Module, name: Any) -> bool:
    """Return whether a module inside `parent` is exactly of these classes, and has no hooks."""
    found = parent._modules.get(name) if isinstance(name, str) else None
    return found is not None and stock_class(found) in kinds and not _has_hooks(found)


def _is_relu(parent: nn.Module, reader: Any) -> bool:
    """Return whether a reader is a ReLU, perhaps behind modules that return their argument."""
    if _is((nn.Identity,), parent, reader):
        _, after = _neighbours(parent, parent._modules[reader])  # type: ignore[arg-type]
        return bool(after) and all(_is_relu(parent, one) for one in after)
    return reader in RELUS or _is((nn.ReLU,), parent, reader)


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks may read what goes into or comes out of a module."""
    for where, prefix in ((module, ""), (hooks_of_all, "_global")):
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            hooks = getattr(where, f"{prefix}_{kind}_hooks")
            if hooks and not all(isinstance(hook, Listening) for hook in hooks.values()):
                return True
    return False


# ---- reading source


@functools.cache
def _uses(kind: type[object]) -> dict[Any, list[_Use]]:
    """Return the uses, in the source of a class, of the modules `self.name` by name, and of functions."""
    uses: defaultdict[Any, list[_Use]] = defaultdict(list)
    for base in kind.__mro__:
        if base.__module__.split(".")[0] == "torch" or base is object:
            continue
        for method in vars(base).values():
            function = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else None
            if not inspect.isfunction(function):
                continue
            try:
                (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            except (OSError, SyntaxError, TypeError, ValueError):
                return {}
            if not isinstance(tree, ast.FunctionDef) or (tree.name != "__init__" and _calls_by_loop(tree)):
                return {}
            if tree.args.args:
                for key, use in _Reader(tree, function.__globals__).uses():
                    uses[key].append(use)
    return dict(uses)


def _calls_by_loop(method: ast.FunctionDef) -> bool:
    """Return whether a method may call modules that it does not name."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in ("children", "named_children", "_modules", "__dict__"):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars"):
            owner = node.args[0] if node.args else None
            if isinstance(owner, ast.Name) and method.args.args and owner.id == method.args.args[0].arg:
                return True
    return False


class _Reader:
    """Find out whose values go where in a method."""

    def __init__(self, method: ast.FunctionDef, names: dict[str, Any]) -> None:
        self.method, self.names = method, names
        self.me = method.args.args[0].arg
        self.parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        self.next: dict[ast.AST, ast.stmt] = {}
        for node in ast.walk(method):
            for _, field in ast.iter_fields(node):
                if isinstance(field, list) and field and isinstance(field[0], ast.stmt):
                    self.next.update(itertools.pairwise(field))
        inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Global, ast.Nonlocal)
        self.shared = {
            name
            for node in ast.walk(method)
            if isinstance(node, inner) and node is not method
            for name in _names_in(node)
        }

    def uses(self) -> Iterator[tuple[Any, _Use]]:
        """Yield a key and use of each call, and of each other mention of a module."""
        arguments: dict[ast.AST, Any] = {}
        readers: dict[ast.AST, Any] = {}
        calls = [node for node in ast.walk(self.method) if isinstance(node, ast.Call)]
        for call in calls:
            reader = self._reader(call)
            if reader is not None:
                readers[call], arguments[reader] = self._key(reader.func), self._key(call.func)
        for call in calls:
            key = self._key(call.func)
            if isinstance(key, str) or key is F.batch_norm:
                yield key, _Use(arguments.get(call), readers.get(call))
        for node in ast.walk(self.method):
            if isinstance(node, ast.Attribute) and self._is_me(node.value) and not self._is_harmless(node):
                yield node.attr, _Use(None, None)

    def _reader(self, call: ast.Call) -> ast.Call | None:
        """Return the call that alone reads a call's value: at once, or by a variable that it takes next."""
        parent = self.parents[call]
        if isinstance(parent, ast.Call):
            return parent if _is_first(parent, call) else None
        if not isinstance(parent, ast.Assign) or len(parent.targets) != 1 or parent.value is not call:
            return None
        (target,), then = parent.targets, self.next.get(parent)
        if not isinstance(target, ast.Name) or target.id in self.shared:
            return None
        if not isinstance(then, ast.Return) and not (
            isinstance(then, ast.Assign)
            and [one.id for one in then.targets if isinstance(one, ast.Name)] == [target.id]
            and len(then.targets) == 1
        ):
            return None
        reads = [node for node in ast.walk(then) if isinstance(node, ast.Name) and node.id == target.id]
        reads = [node for node in reads if isinstance(node.ctx, ast.Load)]
        if len(reads) != 1:
            return None
        reader = self.parents[reads[0]]
        return reader if isinstance(reader, ast.Call) and _is_first(reader, reads[0]) else None

    def _key(self, function: ast.expr) -> Any:
        """Return the name of a module `self.name`, or the function that a dotted name stands for."""
        if isinstance(function, ast.Attribute):
            if self._is_me(function.value):
                return function.attr
            owner = self._key(function.value)
            return None if owner is None or isinstance(owner, str) else getattr(owner, function.attr, None)
        is_global = isinstance(function, ast.Name) and function.id not in _assigned(self.method)
        return self.names.get(function.id) if is_global else None  # type: ignore[attr-defined]

    def _is_me(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.me

    def _is_harmless(self, node: ast.Attribute) -> bool:
        """Return whether a mention of `self.name` leaves its calls as they are: an attribute of it, a test, a call."""
        parent = self.parents[node]
        if isinstance(node.ctx, ast.Store):
            return True
        if isinstance(parent, ast.Call) and parent.func is node:
            return True
        if isinstance(parent, ast.Attribute):
            return parent.attr not in ("forward", "__call__", "modules", "children")
        return isinstance(parent, ast.Compare | ast.If | ast.IfExp | ast.BoolOp | ast.UnaryOp)


def _is_first(call: ast.Call, argument: ast.expr) -> bool:
    """Return whether an argument is the first of a call, and the others hold no calls."""
    if not call.args or call.args[0] is not argument:
        return False
    others = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
    return not any(isinstance(node, ast.Call | ast.Starred) for other in others for node in ast.walk(other))


def _names_in(node: ast.AST) -> set[str]:
    named = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return named | set(node.names if isinstance(node, ast.Global | ast.Nonlocal) else ())


def _assigned(method: ast.FunctionDef) -> set[str]:
    arguments = {one.arg for one in ast.walk(method.args) if isinstance(one, ast.arg)}
    return arguments | {
        node.id for node in ast.walk(method) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
