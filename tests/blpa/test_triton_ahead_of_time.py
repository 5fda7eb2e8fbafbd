"""Triton kernels compiled ahead of time, for GPUs that are not there: nothing spilled, wide loads, no fused adds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton comes with torch for CUDA: it is not installed")

ARCHITECTURES = (75, 80, 90, 100)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel compiled for every architecture, where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, script, *map(str, ARCHITECTURES)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_ahead_of_time_and_spill_nothing(
    compiled: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    usual = [kernel for kernel in compiled if not kernel["ones"]]
    with capsys.disabled():
        print("\nregisters a thread / bytes spilled, for sm_" + ", ".join(map(str, ARCHITECTURES)))
        for variant in dict.fromkeys(kernel["variant"] for kernel in usual):
            found = [kernel for kernel in usual if kernel["variant"] == variant]
            only = "" if len(found) > 1 else f"sm_{found[0]['architecture']} only: "
            figures = "  ".join(f"{kernel['registers']}/{kernel['spilled']}" for kernel in found)
            print(f"    {variant:<56}", only + figures)
    assert {kernel["architecture"] for kernel in usual} == set(ARCHITECTURES)
    assert not [kernel for kernel in compiled if kernel["spilled"]]


def test_kernels_compile_where_a_size_is_one(compiled: list[dict[str, Any]]) -> None:
    """Then Triton makes a constant of it, which arithmetic with tensors has to take; the script fails where not."""
    small = [kernel["kernel"] for kernel in compiled if kernel["ones"]]
    assert set(small) == {kernel["kernel"] for kernel in compiled}


def test_compiled_kernels_read_and_write_sixteen_bytes_at_once(compiled: list[dict[str, Any]]) -> None:
    """Those that go through whole activations, of channels that divide by 16; codes may be fewer bytes."""
    # Those of products are copied to shared memory, in sixteen bytes at once too, by instructions of each architecture.
    others = ("_weight_gradient", "_grid_vectors", "any layout: _decode")  # the last reads codes alone
    through = [kernel for kernel in compiled if not kernel["ones"] and not kernel["kernel"].endswith(others)]
    assert not [kernel for kernel in through if not kernel["loads_16_bytes"]]
    reading = ("_channel_stats", "_batch_norm_vectors", "_gradient_sums", "_row_means", "any layout: _encode")
    writing = [kernel for kernel in through if not kernel["kernel"].endswith(reading)]
    assert not [kernel for kernel in writing if not kernel["stores_16_bytes"]]


def test_the_last_program_of_a_sum_sees_what_the_others_stored(compiled: list[dict[str, Any]]) -> None:
    """By PTX's memory model: stores, a barrier, an atomic that releases and acquires."""
    sums = ("_channel_stats", "_gradient_sums", "any layout: _channel_stats", "any layout: _batch_norm_vectors")
    sums = [kernel for kernel in compiled if kernel["kernel"] in sums]
    assert sums
    assert not [kernel for kernel in sums if not kernel["counts_after_storing"]]


def test_compiled_kernels_fuse_no_multiply_with_an_add(compiled: list[dict[str, Any]]) -> None:
    assert not [kernel for kernel in compiled if kernel["fused_multiply_adds"]]
