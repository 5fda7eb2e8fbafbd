"""Who may import whom, read from the sources: downwards only, and each heavy package in its one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import blpa

PACKAGE = Path(blpa.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part imports what stands below it and itself, and the parts at the side that it is allowed.
LAYERS = (
    ("runners",),
    ("training", "memory"),
    ("evaluation",),
    ("steps",),
    ("models",),
    ("modes",),
    ("layers",),
    ("ops",),
    ("kept", "convolution", "compiling", "offloading"),
    ("kernels",),
    ("codec",),
)
SIDE = {
    "errors": set[str](),
    "config": {"errors"},
    "cells": {"config"},
    "locks": {"errors"},
    "records": {"errors", "locks"},
    "data": {"config", "errors", "locks"},
    "checkpoints": {"config", "errors", "locks"},
    "signals": set[str](),
    "budget": set[str](),
    "turns": set[str](),
}

ONLY_IN = {
    "hydra": {"runners.compose", "runners.launch"},
    "omegaconf": {"config", "cells", "runners.cli", "runners.compose", "runners.launch"},
    "pandas": {"runners.tables", "runners.plots", "runners.curves"},
    "matplotlib": {"runners.tables", "runners.plots"},
    "jinja2": {"runners.report"},
    "triton": {"kernels.triton_ops"},
    "sklearn": {"data.digits"},
    "torchvision": {"data.cifar"},
}

WITHOUT_TORCH = {
    "", "errors", "config", "cells", "locks", "records", "budget", "signals", "turns", "runners", "runners.cli",
    "runners.compose", "runners.sweep", "runners.launch", "runners.fresh", "runners.side_by_side", "runners.streams",
    "runners.failures", "runners.usage", "runners.paper",
}  # fmt: skip
"""What the command line imports before it knows that there is something to run."""


def module(source: Path) -> str:
    """The name of a source file inside the package: kernels.reference; nothing for the package itself."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, importer: str = "", *, is_package: bool = False) -> Iterator[str]:
    """Every module or name that is imported anywhere in a tree, with its full dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                around = ["blpa", *importer.split(".")] if importer else ["blpa"]
                above = node.level - is_package
                base = ".".join([*around[: len(around) - above], *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST, importer: str = "", *, is_package: bool = False) -> set[str]:
    """The parts of blpa that a tree imports: kernels, config."""
    names = (name.split(".") for name in imported(tree, importer, is_package=is_package))
    return {name[1] for name in names if name[0] == "blpa" and len(name) > 1}


def allowed(part: str) -> set[str]:
    if part in SIDE:
        return {part} | SIDE[part]
    rank = next(index for index, layer in enumerate(LAYERS) if part in layer)
    return {name for layer in LAYERS[rank + 1 :] for name in layer} | {part} | set(SIDE)


@pytest.mark.parametrize("source", SOURCES, ids=module)
def test_imports_go_downwards(source: Path) -> None:
    name = module(source)
    parts = parts_imported(ast.parse(source.read_text()), name, is_package=source.name == "__init__.py")
    assert parts <= (allowed(name.split(".")[0]) if name else set())


@pytest.mark.parametrize("source", SOURCES, ids=module)
def test_a_package_with_a_place_is_imported_nowhere_else(source: Path) -> None:
    packages = {name.split(".")[0] for name in imported(ast.parse(source.read_text()))}
    assert not {package for package in packages & set(ONLY_IN) if module(source) not in ONLY_IN[package]}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_the_command_line_answers_without_torch(name: str) -> None:
    (source,) = [source for source in SOURCES if module(source) == name]
    names = set()
    for node in ast.parse(source.read_text()).body:  # the top level alone: a function may import torch when called
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= set(imported(ast.Module([node], []), name))
    inside = {".".join(path.split(".")[1:]) for path in names if path.split(".")[0] == "blpa"}
    assert not {path for path in names if path.split(".")[0] in ("torch", "torchvision", "pandas", "matplotlib")}
    modules = {module(source) for source in SOURCES}
    assert {path if path in modules else path.rpartition(".")[0] for path in inside} <= WITHOUT_TORCH


@pytest.mark.parametrize(
    ("text", "importer", "expected"),
    [
        ("import blpa.ops", "codec", {"ops"}),
        ("from blpa import ops, config", "codec", {"ops", "config"}),
        ("from blpa.ops import conv2d", "codec", {"ops"}),
        ("def f():\n    from blpa.kernels.reference import x", "codec", {"kernels"}),
        ("from . import ops", "codec", {"ops"}),
        ("from .ops import conv2d", "codec", {"ops"}),
        ("from ..ops import conv2d", "kernels.reference", {"ops"}),
        ("import torch\nfrom torch import nn", "codec", set()),
    ],
)
def test_the_reader_of_imports_finds_them_in_every_form(text: str, importer: str, expected: set[str]) -> None:
    assert parts_imported(ast.parse(text), importer) == expected


def test_the_order_of_the_parts_forbids_something() -> None:
    assert "runners" not in allowed("training")
    assert "layers" not in allowed("kernels")
    assert "codec" in allowed("ops")
    assert "training" not in allowed("data")
