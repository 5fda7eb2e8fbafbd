"""The library of C++ kernels for CPUs: compiled with the system's compiler when first needed, and loaded.

Compiling takes some seconds. The file goes into the user's cache, under a name by what it was made of: so it is never
stale, and processes may share it. Its last bytes are the sha256 of those before: a damaged file is compiled anew, since
running it could end the process.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

COMPILER_SECONDS = 120
"""After which the compiler counts as missing; it takes about 10 s."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_LOG = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_name("cpp")
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-thread-jumps",  # would make branches of conditions, which keep loops from being vectorised
)  # fmt: skip
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
"""By what torch finds on this machine, and not -march=native: machines may share the cache."""
_OPENMP = ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), (("-fopenmp-simd",), ()), ((), ()))
"""How to compile and link: with the OpenMP that torch has loaded, whose threads then serve both; with the compiler's
own; without threads; and without vectorised loops."""


# ---- arguments

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


class Layout(ctypes.Structure):
    """Layout of cpp/memory.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "bits", "channels", "lines", "length", "lines_per_slab", "slab_bytes", "slab_elements", "lines_per_outer",
            "outer_step", "outer", "per_element",
        )
    ]  # fmt: skip


class Array(ctypes.Structure):
    """Array of cpp/memory.h."""

    _fields_ = [("data", _P), ("dtype", _L)]


class Windows(ctypes.Structure):
    """Windows of cpp/pooling.h."""

    _fields_ = [(name, _L * 2) for name in ("size", "outputs", "kernel", "stride", "padding", "dilation")]


class Call(ctypes.Structure):
    """Call of cpp/memory.h."""

    _fields_ = [
        ("layout", ctypes.POINTER(Layout)), ("threads", _L), ("is_double", _L),
        ("x", Array), ("y", Array), ("out", Array), ("values", _P), ("vectors", _P),
        ("centre", _P), ("centre_z", _P), ("scale", _P), ("centre_step", _L), ("scale_step", _L), ("by_channel", _L),
        ("function", _L), ("slope", _D), ("low", _D), ("high", _D), ("table", _P), ("per_sample", _L),
        ("rectified", _L),
    ]  # fmt: skip


_CALL, _FLOAT = ctypes.POINTER(Call), ctypes.c_float
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "channel_stats", "encode", "normalise_encode", "levels_of", "decode", "elementwise_grad", "gradient_sums",
            "row_means", "input_grad",
        ),
        (_CALL,),
    ),
    "batch_stats": (_P, _L, _L, _L, _I, _I, _FLOAT, _P, _P, _P),
    "grid_vectors": (_L, *(_P,) * 5, _I, _D, _D, _FLOAT, _P),
    "batch_norm": (_CALL, _P, _P, _P, _D, _D, _D, _FLOAT),
    "encode_own": (_CALL, _CALL, _D, _D),
    "max_pool": (ctypes.POINTER(Windows), _L, _I, _P, _P, _P),
    "max_pool_grad": (ctypes.POINTER(Windows), _L, _I, _P, _P, _P),
    "pack_between": (ctypes.POINTER(Array), _L, _FLOAT, _FLOAT, _I, _P),
    "masked": (ctypes.POINTER(Array), _L, _P, _I, _P),
}  # fmt: skip
"""The functions of kernels.cpp without their prefix, and the types of their arguments."""


# ---- compiling and loading


class CompilerError(RuntimeError):
    """The compiler refuses."""


def _library(file: Path) -> Any:
    """Load compiled kernels, and give their functions types.

    Raises:
        OSError: the file is damaged, or of another system.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise OSError(f"{file} is damaged")
    library = ctypes.CDLL(str(file))
    for name, types in FUNCTIONS.items():
        function = getattr(library, f"blpa_{name}")
        function.argtypes, function.restype = types, None
    return library


def _run(command: Sequence[str], folder: str | None = None) -> str:
    """Run the compiler and return what it prints."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COMPILER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{shlex.join(command)}: no answer in {COMPILER_SECONDS} s") from error
    if done.returncode:
        raise CompilerError(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _compile(file: Path, compiler: Sequence[str], flags: Sequence[str], link_flags: Sequence[str]) -> None:
    """Compile the kernels to a file that is there as a whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        for command in (
            [*compiler, *flags, "-c", str(_SOURCES / "kernels.cpp"), "-o", "cpu.o"],
            [*compiler, *link_flags, "-shared", "cpu.o", "-o", "cpu.so"],
        ):
            _run(command, folder)
        made = Path(folder, "cpu.so")
        with made.open("ab") as end:  # loaders pass over what follows the library
            end.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, file)


def _compiler() -> list[str]:
    """Return the command of the system's compiler."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise CompilerError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _cache() -> Path:
    """Return the user's folder for compiled files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "blpa")


def built() -> Any:
    """Load the library, compiled if need be: into the cache, or for this process alone where that cannot be written."""
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    sources = [file.read_text() for file in sorted(_SOURCES.glob("*.[ch]*"))]
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as private:  # what is loaded outlives its file
        for openmp, link_flags in _OPENMP:
            flags = (*_FLAGS, *vectors, *openmp)
            made_of = repr((sources, compiler, version, flags, link_flags, platform.machine()))
            for folder in (_cache(), Path(private)):
                file = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
                try:
                    if file.exists():
                        try:
                            return _library(file)
                        except (OSError, AttributeError):
                            _LOG.info("%s is broken: compiled anew", file)
                    folder.mkdir(parents=True, exist_ok=True)
                    _compile(file, compiler, flags, link_flags)
                    return _library(file)
                except OSError as error:
                    failures.append(str(error))
                except CompilerError as error:
                    failures.append(str(error))
                    break
    raise CompilerError(" ".join("; ".join(dict.fromkeys(failures)).split()))
