"""Compile every Triton kernel for the architectures named as arguments, without a GPU; a line of JSON for each.

It stands by itself because Triton either interprets or compiles in a process, and the tests interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blpa.kernels import triton_ops

CHANNELS = 64  # one of the paper's, a multiple of 16, as the compiler is told of C below
VARIANTS = [("fp32", 4), ("fp32", 2), ("fp32", 8), ("fp32", 0), ("bf16", 4), ("fp16", 4)]
INTEGERS = ("M", "C", "R", "N", "steps", "programs")
SUMS = ("_channel_stats", "_gradient_sums")
KERNELS = (*SUMS, "_normalise_rectify_encode", "_decode", "_input_gradient", "_weight_gradient")
COUNTS_AFTER_STORING = r"(?s)st\.global(?:(?!st\.global).)*bar\.sync(?:(?!st\.global).)*atom\.global\.gpu\.acq_rel\.add"
"""In a program's text: its part is stored, all of its threads wait for each other, and then it is counted."""
FLOATS = ("eps", "bin_width", "momentum")


def constants(name: str, bits: int) -> dict[str, int | bool]:
    """What the launches in triton_ops give a kernel as constants."""
    elements = triton_ops.SUM_TILE_ELEMENTS if name in SUMS else triton_ops.TILE_ELEMENTS
    x = torch.empty(1, CHANNELS, device="meta")
    *_, tile = triton_ops._tiles(x, bits, elements)
    if name == "_weight_gradient":
        *_, tile = triton_ops._product_tiles(x, CHANNELS, bits)
    given = {"HAS_RUNNING_STATS": True, "COUNTS": True, "CONSTANT_STATS": False, "ADDS": True}
    return tile | {"LEVELS": 1 << bits if bits else 0} | given


def compile_kernel(name: str, dtype: str, bits: int, architecture: int, ones: tuple[str, ...] = ()) -> dict[str, Any]:
    """Registers, spilled bytes and kinds of instructions of one kernel; Triton takes an integer of 1 for a constant."""
    kernel = getattr(triton_ops, name)
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
    types |= dict.fromkeys(("x", "out", "grad", "add"), f"*{dtype}")
    types |= {"batches": "*i64", "counter": "*i32"}
    types |= dict.fromkeys(("saved", "codes"), "*u8" if bits else f"*{dtype}")
    given = constants(name, bits) | dict.fromkeys(ones, 1)
    known = {key: value for key, value in given.items() if key in kernel.arg_names}
    assert known.keys() >= {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature = {key: "constexpr" if key in known else types.get(key, "*fp32") for key in kernel.arg_names}
    divisible = [
        key.startswith("*") or (key != "constexpr" and name in ("C", "N") and "C" not in ones)
        for name, key in signature.items()
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index, is_one in enumerate(divisible) if is_one}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=triton_ops.SUM_OPTIONS if name in (*SUMS, "_weight_gradient") else triton_ops.OPTIONS,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, _, local = map(int, found.groups())
    ptx = made.asm["ptx"]
    return {
        "kernel": name,
        "variant": f"{name.removeprefix('_')}, {dtype}, {bits} bits",
        "ones": ones,
        "architecture": architecture,
        "registers": registers,
        "spilled": stack + local,
        "loads_16_bytes": bool(re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)),
        "stores_16_bytes": bool(re.search(r"st\.global[.\w]*\.v4\.b32", ptx)),
        "counts_after_storing": bool(re.search(COUNTS_AFTER_STORING, ptx)),
        "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", ptx)),
    }


if __name__ == "__main__":
    for dtype, bits in VARIANTS:
        for name in KERNELS if bits in (0, 4) else KERNELS[1:]:  # it writes no codes
            for architecture in map(int, sys.argv[1:]):
                if name == "_weight_gradient" and architecture < 80:
                    continue  # it needs tensor cores of Ampere or later
                print(json.dumps(compile_kernel(name, dtype, bits, architecture)), flush=True)
    for name in KERNELS:  # activations of one channel
        print(json.dumps(compile_kernel(name, "fp32", 4, int(sys.argv[-1]), ("C",))), flush=True)
