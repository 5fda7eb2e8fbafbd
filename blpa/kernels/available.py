"""Which backends work on this machine: each is tried on a tiny tensor before it is chosen, once per process.

A compiler that is there may still lack a header, its cache may not be writable, and Triton may lack a C compiler.
"""

import functools
import logging
import shutil

import torch
from torch.utils._python_dispatch import _disable_current_modes

_LOG = logging.getLogger(__name__)


def supports_triton(device: torch.device) -> bool:
    """Return whether the automatic choice on a device is Triton's kernels; a CUDA GPU without them is logged."""
    reason = missing_for_triton(device)
    if reason and device.type == "cuda":
        log_once(f"kernels = auto: torch and not triton, which is faster: {reason}")
    return not reason


@functools.cache
def log_once(line: str) -> None:
    """Log a line once per process."""
    _LOG.warning(line)


def missing(name: str, device: torch.device) -> str:
    """Return why a backend cannot run on this device, in a line; empty if it can."""
    if name == "torch":
        return ""
    if name == "triton" or device.type == "cuda":
        reason = missing_for_triton(device)
        if reason or name == "triton":
            return reason
    if device.type == "meta":
        return ""
    compilers = ("g++", "clang++", "c++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return f"no C++ compiler found (looked for {', '.join(compilers)})"
    from blpa.kernels.compiled import failure

    return failure(device)


def missing_for_triton(device: torch.device) -> str:
    """Return why Triton kernels cannot run on this device, in a line; empty if they can."""
    from torch.utils._triton import has_triton, has_triton_package

    if device.type == "meta":
        return "" if has_triton_package() else "triton is not installed"
    if device.type != "cuda":
        return f"it is for CUDA GPUs, and the run is on the {device.type}"
    if not has_triton():
        return "triton is missing or does not support this GPU"
    return "" if torch.compiler.is_compiling() else _triton_failure(device)


@functools.cache
def _triton_failure(device: torch.device) -> str:
    """Run a kernel on a tiny tensor: Triton needs its own compiler, the system's C compiler, and a cache.

    Nothing is waited for, so that it may be done in the capture of a CUDA graph.
    """
    with _disable_current_modes():  # of the caller's, who may be traced
        from blpa.kernels import Norm

        x, vectors = torch.ones(8, 8, device=device), torch.zeros(len(Norm._fields), 8, device=device)
        try:
            from blpa.kernels.triton_ops import TRITON

            TRITON.decode(x, vectors, codec=None, out=x)
        except Exception as error:  # compilers, drivers and file systems raise whatever they like
            if "out of memory" in str(error):
                raise
            return f"a kernel fails: {compiler_message(error)}"
    return ""


def compiler_message(error: BaseException) -> str:
    """Return the line of an exception that says why something does not compile.

    PyTorch's compiler gives its command, then its output, of which the first line with an error matters.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    output = lines[lines.index("Output:") + 1 :] if "Output:" in lines else []
    errors = [line for line in output if "error: " in line]
    names = [line for line in lines if not line.startswith("backend=")]
    return " ".join((errors or names or [type(error).__name__])[0].split())[:300]
