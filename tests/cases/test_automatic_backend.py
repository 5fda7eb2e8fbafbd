"""The automatic backend has been tried; one that was asked for and does not work here is refused with the reason."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, refusal
from torch import Tensor

from blpa.kernels import NotAvailable, automatic, available, choose, compiled, cpu, cpu_build, library
from blpa.kernels.reference import REFERENCE
from runners import CONF, errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILER_ERROR = """backend='inductor' raised:
CppCompileError: C++ compile error

Command:
g++ main.cpp -I/usr/include

Output:
In file included from main.cpp:1:
/usr/header.h:2:10: fatal error: Python.h: No such file or directory
compilation terminated.

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace
"""


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have this process try everything again, with a compiler's name in place of a compiler."""
    caches = (
        compiled.failure, available._triton_failure, available.log_once, automatic._runs_triton, library.kernels_for,
    )  # fmt: skip
    monkeypatch.setattr(available.shutil, "which", lambda name: f"/usr/bin/{name}")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def compiling(monkeypatch: pytest.MonkeyPatch, result: Exception | None) -> list[object]:
    """Have torch.compile's functions fail, or do nothing; returns what was compiled."""
    called: list[object] = []

    def compiled_(function: Any) -> Any:
        def call(*args: Tensor) -> None:
            called.append(function)
            if result:
                raise result

        return call

    monkeypatch.setattr(compiled, "_compiled", compiled_)
    return called


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(COMPILER_ERROR), "/usr/header.h:2:10: fatal error: Python.h: No such file or directory"),
        (
            RuntimeError("CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\n"),
            "C++ compile error",
        ),
        (PermissionError(13, "Permission denied", "/cache/x"), "Permission denied: '/cache/x'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "libcuda.so.1: cannot open shared object file"),
        (AssertionError(), "AssertionError"),
    ],
    ids=["a header is missing", "no word", "no permission", "full", "library", "assertion"],
)
def test_a_compiler_that_does_not_compile(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called = compiling(monkeypatch, error)
    assert choose("auto", CPU) is REFERENCE
    assert choose("auto", CPU) is REFERENCE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("kernels = auto: torch and not inductor, which is faster: it does not compile")
    assert reason in record.message and "\n" not in record.message
    with pytest.raises(NotAvailable) as caught:
        choose("inductor", CPU)
    text = str(caught.value)
    assert text.startswith("kernels = inductor: it does not compile here: ") and reason in text and "\n" not in text
    assert text.endswith("; use kernels auto or torch")
    assert len(called) == 1


def test_a_compiler_whose_code_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, None)
    assert choose("auto", CPU) is REFERENCE
    with pytest.raises(NotAvailable, match=r"inductor: what it compiles here computes something else; use kernels"):
        choose("inductor", CPU)


def test_a_short_run_or_a_prediction_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called = compiling(monkeypatch, RuntimeError())
    assert choose("auto", CPU, elements=1e6) is REFERENCE
    assert choose("auto", torch.device("meta")).name == "inductor"
    assert not called


def test_a_command_that_asks_for_a_backend_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    compiling(monkeypatch, RuntimeError(COMPILER_ERROR))
    arguments = [argument for argument in TINY if argument != "-m"]
    text = refusal([*arguments, "mode=4bit", "gpu.kernels=inductor"], capsys)
    assert text.splitlines() == [
        "blpa-run: error: kernels = inductor: it does not compile here: /usr/header.h:2:10: fatal error: Python.h: "
        "No such file or directory; use kernels auto or torch"
    ]


def test_a_compiled_baseline_that_does_not_compile() -> None:
    error = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})(COMPILER_ERROR)
    assert errors.classify(error) == (
        1, "does not compile: /usr/header.h:2:10: fatal error: Python.h: No such file or directory"
    )  # fmt: skip


def test_a_real_compiler_that_only_knows_its_version(tmp_path: Path) -> None:
    """The one test that has torch.compile call it: a script named g++ that answers --version and nothing else."""
    for name in ("g++", "clang++", "c++"):
        script = tmp_path / name
        script.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "g++ (GCC) 12.2.0" && exit 0\n'
            'echo "x.cpp:1:10: fatal error: omp.h: No such file or directory" >&2\nexit 1\n'
        )
        script.chmod(0o755)
    code = "import torch, blpa; print(blpa.kernels.choose('auto', torch.device('cpu')).name)"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(CONF.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "torch\n"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kernels = auto: ")]
    assert line.endswith("it does not compile here: x.cpp:1:10: fatal error: omp.h: No such file or directory")


# ---- Triton


@pytest.mark.parametrize(
    "reason", ["Failed to find C compiler. Please specify via CC environment variable", "Cannot find ptxas"]
)
def test_a_triton_whose_kernels_do_not_run(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from blpa.kernels import triton_ops

    def decode(*_: object, **__: object) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(available.torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(available.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(type(triton_ops.TRITON), "decode", decode)
    assert choose("auto", CUDA) is REFERENCE
    assert automatic.kernels_for(CUDA, torch.float32) is REFERENCE
    assert library.kernels_name(CUDA) == "torch"
    assert [record.message for record in caplog.records] == [
        f"kernels = auto: torch and not triton, which is faster: a kernel fails: {reason}"
    ]
    for name in ("triton", "inductor"):
        with pytest.raises(NotAvailable, match=rf"^kernels = {name}: a kernel fails: {reason}; use kernels auto or"):
            choose(name, CUDA)


def test_too_little_memory_is_not_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from blpa.kernels import triton_ops

    def decode(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(available.torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(available.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(type(triton_ops.TRITON), "decode", decode)
    with pytest.raises(RuntimeError, match="out of memory"):
        choose("auto", CUDA)


# ---- the library of C++ kernels


@pytest.fixture
def built_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """The library as it was compiled before; the process has to find it again, in an empty cache."""
    if cpu._load() is None:
        pytest.skip("no compiler here")
    content = Path(cpu._found._name).read_bytes()
    monkeypatch.setattr(cpu, "_found", None)
    monkeypatch.setattr(cpu, "_is_found", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return content


@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.99, 0.99999])
def test_a_damaged_library_in_the_cache_is_never_run(place: float, built_before: bytes, tmp_path: Path) -> None:
    damaged = bytearray(built_before)
    damaged[int(place * len(damaged))] ^= 1
    file = tmp_path / "library.so"
    file.write_bytes(damaged)
    with pytest.raises(OSError, match=r"library\.so is damaged$"):
        cpu_build._library(file)


def test_why_there_is_no_library_is_said_in_one_line(
    built_before: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_(*_: object) -> None:
        raise cpu_build.CompilerError("c++ -c kernels.cpp: kernels.cpp:1:\nfatal error: cmath: No such file\n")

    monkeypatch.setattr(cpu_build, "_compile", compile_)
    assert cpu._load() is None
    (record,) = caplog.records
    assert record.message == (
        "coded networks run on plain PyTorch kernels, which are slower: c++ -c kernels.cpp: kernels.cpp:1: "
        "fatal error: cmath: No such file"
    )
