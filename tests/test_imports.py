"""Who may import whom, read from the sources."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blpa
import runners

ROOT = Path(blpa.__file__).parent.parent
OURS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in (blpa, runners)
    for path in sorted(Path(package.__file__ or "").parent.rglob("*.py"))
}
"""Every module by its name."""

LIBRARY = (
    ("blpa",), ("blpa.explain", "blpa.gradient_error"), ("blpa.census",), ("blpa.convert",), ("blpa.coded",),
    ("blpa.memory",), ("blpa.models",), ("blpa.layers",), ("blpa.ops",), ("blpa.saved", "blpa.convolution"),
    ("blpa.kernels",), ("blpa.codec",), ("blpa.tracing", "blpa.once", "blpa.processes"),
)  # fmt: skip
"""Inside the library a module imports what stands below it; memory.py and coded do so from kernels downwards."""

FRONT = {
    "runners", "runners.cli", "runners.__main__", "runners.help", "runners.config", "runners.checks", "runners.compose",
    "runners.cells", "runners.processes", "runners.process_notes",
    "runners.sweep", "runners.run", "runners.errors", "runners.files", "runners.locks", "runners.option_files",
    "runners.reading", "runners.records", "runners.printing", "runners.streams", "runners.fresh", "runners.texts",
    "runners.workers", "runners.yaml_files", "runners.training", "runners.training.budget", "runners.training.signals",
    "runners.training.turns",
}  # fmt: skip
"""What the command line imports before it knows that there is something to run: a mistake is answered at once."""

HEAVY = {"torch", "blpa", "torchvision", "sklearn", "pandas", "matplotlib", "jinja2"}
ONLY_IN = {
    "triton": tuple(f"blpa.kernels.triton_{name}" for name in ("ops", "any_layout", "elements", "sums")),
    "hydra": ("runners.compose", "runners.sweep"),
    "PIL": ("runners.image_files", "runners.examples"),
    "torchcodec": ("runners.image_files",),
    "sklearn": ("runners.data", "runners.examples"),
    "torchvision": ("runners.data", "runners.training.models", "runners.examples"),
    "pandas": ("runners.reporting",),
    "matplotlib": ("runners.reporting",),
    "jinja2": ("runners.reporting",),
    "markupsafe": ("runners.reporting",),
}
"""Packages that have one place."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a tree, and for `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in OURS else str(node.module)


def imports(name: str) -> set[str]:
    """What a module imports, in its functions too."""
    return set(imported(ast.parse(OURS[name].read_text())))


def at_import(name: str) -> set[str]:
    """What a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(OURS[name].read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(imported(ast.Module([node], [])))
    return found


def is_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_the_library_imports_torch_and_itself() -> None:
    library = [name for name in OURS if is_in(name, ("blpa",))]
    used = {used.partition(".")[0] for name in library for used in imports(name)}
    assert used - sys.stdlib_module_names == {"torch", "triton", "blpa"}


@pytest.mark.parametrize("name", [name for name in OURS if is_in(name, ("blpa",)) and name != "blpa"])
def test_the_library_imports_downwards(name: str) -> None:
    def rank(module: str) -> int:
        return max(k for k, places in enumerate(LIBRARY) if is_in(module, places))

    ours = {used for used in imports(name) if is_in(used, ("blpa",))}
    if is_in(name, ("blpa.memory", "blpa.coded")):
        assert all(
            is_in(used, ("blpa.kernels", "blpa.codec", "blpa.tracing", "blpa.once", "blpa.processes", "blpa.coded"))
            for used in ours
        )
        return
    room = ".".join(name.split(".")[:2])
    assert all(is_in(used, (room,)) or rank(used) > rank(name) for used in ours)


@pytest.mark.parametrize("name", sorted(FRONT))
def test_the_command_line_answers_without_torch(name: str) -> None:
    used = at_import(name)
    assert not {package for package in HEAVY if any(is_in(module, (package,)) for module in used)}
    assert {module for module in used if is_in(module, ("runners",))} <= FRONT


@pytest.mark.parametrize("name", [name for name in OURS if is_in(name, ("runners.image_files",))])
def test_a_process_that_decodes_imports_no_torch(name: str) -> None:
    used = at_import(name)
    assert not {package for package in HEAVY if any(is_in(module, (package,)) for module in used)}
    assert {module for module in used if is_in(module, ("runners",))} <= {
        "runners", "runners.errors", "runners.files", "runners.training", "runners.training.signals",
        *(module for module in OURS if is_in(module, ("runners.image_files",))),
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OURS if is_in(name, ("runners.reporting",))])
def test_reporting_reads_records_and_nothing_that_computes(name: str) -> None:
    assert not {used for used in imports(name) if is_in(used, ("torch", "runners.training", "runners.tasks"))}


@pytest.mark.parametrize("name", list(OURS))
def test_nobody_imports_a_task_but_tasks(name: str) -> None:
    if not is_in(name, ("runners.tasks", "runners.gpu_check")):
        assert not {used for used in imports(name) if is_in(used, ("runners.tasks",)) and used != "runners.tasks"}


@pytest.mark.parametrize("name", list(OURS))
def test_a_package_with_a_place_is_imported_nowhere_else(name: str) -> None:
    packages = {used.partition(".")[0] for used in imports(name)} & set(ONLY_IN)
    assert all(is_in(name, ONLY_IN[package]) for package in packages)


def test_the_reader_of_imports_finds_them_in_every_form() -> None:
    text = "import torch.nn\nfrom blpa import ops\ndef f():\n    from blpa.ops import conv2d\n"
    assert list(imported(ast.parse(text))) == ["torch.nn", "blpa.ops", "blpa.ops"]
