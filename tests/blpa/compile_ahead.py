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

from blpa.kernels import triton_any_layout, triton_elements, triton_ops, triton_sums
from blpa.kernels.order import Order

CHANNELS = 64  # one of the paper's, a multiple of 16, as the compiler is told of C below
VARIANTS = [("fp32", 4), ("fp32", 2), ("fp32", 8), ("fp32", 0), ("bf16", 4), ("fp16", 4)]
INTEGERS = ("M", "C", "R", "N", "steps", "programs")
SUMS = ("_channel_stats", "_gradient_sums")
KERNELS = (*SUMS, "_normalise_rectify_encode", "_decode", "_input_gradient", "_weight_gradient")
COUNTS_AFTER_STORING = r"(?s)st\.global(?:(?!st\.global).)*bar\.sync(?:(?!st\.global).)*atom\.global\.gpu\.acq_rel\.add"
"""In a program's text: its part is stored, all of its threads wait for each other, and then it is counted."""
FLOATS = ("eps", "bin_width", "momentum", "a", "b", "rectified_top", "rounded_to_zero")

ORDERS = {
    "channels last": Order(128, CHANNELS, 1024, True),
    "channels first": Order(128, CHANNELS, 1024, False),
    "one image": Order(1, CHANNELS, 1024, False),  # whose pixels share bytes
}
ANY_LAYOUT = [
    (triton_sums._channel_stats, {"ALONE": False}),
    (triton_sums._batch_norm_vectors, {"ALONE": False, "LEVELS": 256, "OF_RANGE": True}),
    (triton_sums._gradient_sums, {"PER_SAMPLE": False, "RECTIFIED": True}),
    (triton_sums._row_means, {}),
    (triton_sums._grid_vectors, {"LEVELS": 16, "OF_RANGE": True, "CHANNELS": triton_any_layout.VECTOR_CHANNELS}),
    (triton_elements._encode, {}),
    (triton_elements._normalise_encode, {"RECTIFIED": True}),
    (triton_elements._decode, {"FUNCTION": "gelu"}),
    (triton_elements._elementwise_grad, {"FUNCTION": "gelu_tanh"}),
    (triton_elements._input_grad, {"RECTIFIED": True}),
]
"""Kernels of triton_any_layout.py, and constants that need registers."""
ANY_LAYOUT_VARIANTS = [
    ("channels last", "fp32", 4, False), ("channels last", "bf16", 4, False), ("channels first", "bf16", 4, True),
    ("one image", "fp32", 2, False),
]  # fmt: skip
"""Layouts, dtypes, bits, and whether centre and scale are per sample."""
ANY_LAYOUT_INTEGERS = ("C", "outer", "inner", "packed_outer", "packed_inner", "apart", "parts", "steps")


def constants(name: str, bits: int) -> dict[str, int | bool]:
    """What the launches in triton_ops give a kernel as constants."""
    elements = triton_ops.SUM_TILE_ELEMENTS if name in SUMS else triton_ops.TILE_ELEMENTS
    x = torch.empty(1, CHANNELS, device="meta")
    *_, tile = triton_ops._tiles(x, bits, elements)
    if name == "_weight_gradient":
        *_, tile = triton_ops._product_tiles(x, CHANNELS, bits)
    given = {"HAS_RUNNING_STATS": True, "COUNTS": True, "CONSTANT_STATS": False, "ADDS": True}
    return tile | {"LEVELS": 1 << bits if bits else 0} | given


def any_layout_constants(
    kernel: Any, order: str, dtype: str, bits: int, per_sample: bool, others: dict[str, Any]
) -> dict[str, Any]:
    """What the launches in triton_any_layout give a kernel as constants, and its warps."""
    given = {"PER_OUTER": per_sample, "PER_CHANNEL": True} | others
    if kernel is triton_sums._grid_vectors:
        return given
    if kernel is triton_sums._row_means:
        return given | triton_any_layout._row_tiles(Order(128, 4 * CHANNELS, 1, False), bits)
    if kernel in (triton_sums._channel_stats, triton_sums._batch_norm_vectors, triton_sums._gradient_sums):
        sums = kernel is triton_sums._gradient_sums
        return triton_any_layout._sum_tiles(ORDERS[order], bits if sums else 0, False)[-1] | given
    return triton_any_layout._tiles(ORDERS[order], bits, 4 if dtype == "fp32" else 2)[-1] | given


def compile_any_layout(
    index: int, variant: tuple[str, str, int, bool], architecture: int, ones: bool
) -> dict[str, Any]:
    """Compile a kernel of triton_any_layout; with `ones`, for activations of one channel and position."""
    kernel, others = ANY_LAYOUT[index]
    order, dtype, bits, per_sample = variant
    given = any_layout_constants(kernel, order, dtype, bits, per_sample, others)
    options = triton_any_layout.OPTIONS | {"num_warps": given.pop("num_warps", 4)}
    fixed = [name for name in kernel.do_not_specialize or ()]
    sizes = ("C", "inner", "packed_inner", "apart") if ones else ()
    made = compiled(kernel, dtype, bits, architecture, given, sizes, ANY_LAYOUT_INTEGERS, fixed, options)
    name = f"any layout: {kernel.__name__}"
    return {"kernel": name, "variant": f"{name}, {order}, {dtype}, {bits} bits"} | made


def compile_kernel(name: str, dtype: str, bits: int, architecture: int, ones: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compile a kernel of triton_ops."""
    options = triton_ops.SUM_OPTIONS if name in (*SUMS, "_weight_gradient") else triton_ops.OPTIONS
    others = [integer for integer in INTEGERS if integer not in ("C", "N")]
    made = compiled(
        getattr(triton_ops, name), dtype, bits, architecture, constants(name, bits), ones, INTEGERS, others, options
    )
    return {"kernel": name, "variant": f"{name.removeprefix('_')}, {dtype}, {bits} bits"} | made


def compiled(
    kernel: Any, dtype: str, bits: int, architecture: int, given: dict[str, Any], ones: tuple[str, ...],
    integers: tuple[str, ...], indivisible: list[str], options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Registers, spilled bytes and kinds of instructions of one kernel; Triton takes an integer of 1 for a constant.

    Integers but the `indivisible` ones are multiples of 16.
    """
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(FLOATS, "fp32")
    types |= dict.fromkeys(("x", "y", "out", "grad", "add"), f"*{dtype}")
    types |= {"batches": "*i64", "counter": "*i32"}
    types |= dict.fromkeys(("saved", "codes"), "*u8" if bits else f"*{dtype}")
    types |= {"values": "*u8" if bits else "*fp32"}
    known = {key: value for key, value in (given | dict.fromkeys(ones, 1)).items() if key in kernel.arg_names}
    assert known.keys() >= {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature = {key: "constexpr" if key in known else types.get(key, "*fp32") for key in kernel.arg_names}
    divisible = [key.startswith("*") or (key == "i32" and name not in indivisible) for name, key in signature.items()]
    attributes = {(index,): [["tt.divisibility", 16]] for index, is_one in enumerate(divisible) if is_one}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
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
    architectures = [int(argument) for argument in sys.argv[1:]]
    for index, (kernel, _) in enumerate(ANY_LAYOUT):
        usual, *others = ANY_LAYOUT_VARIANTS
        jobs = [(usual, architecture, False) for architecture in architectures] + [(usual, architectures[-1], True)]
        if kernel not in (triton_sums._grid_vectors, triton_sums._row_means):  # these know one layout
            jobs += [(variant, architectures[-1], False) for variant in others]
        for job in jobs:
            print(json.dumps(compile_any_layout(index, *job)), flush=True)
