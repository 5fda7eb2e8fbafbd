"""runners/gpu_check: all of it in small on the CPU, what it finds wrong, what becomes of a part that fails."""

import json
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels import any_layout, library
from blpa.kernels.reference import REFERENCE
from runners import gpu_check
from runners.gpu_check import parts
from runners.gpu_check.comparison import differences, differences_of_any_layout, wrong_cases_of_any_layout
from runners.gpu_check.parts import PARTS, Check, Part

CPU = torch.device("cpu")


def test_all_of_it_runs_in_small_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--seconds", "600", "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("runners.gpu_check", run_name="__main__")
    out, err = capfd.readouterr()
    assert ended.value.code == 0, err
    assert err == ""
    told = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(found["part"], found["ended"]) for found in told if "ended" in found] == [(p.name, 0) for p in PARTS]
    by_part: dict[str, list[dict[str, Any]]] = {}
    for found in told:
        by_part.setdefault(found["part"], []).append(found)
    of_kernels = {row["codec"]: (row["correct"], row["cases"]) for row in by_part["kernels"] if "codec" in row}
    assert of_kernels == dict.fromkeys(("4 bits", "8 bits", "2 bits", "full precision"), (True, 2 * 2))
    of_converted = [row for row in by_part["converted-kernels"] if "codec" in row]
    assert [row["correct"] for row in of_converted] == [True] * 4
    for precision in ("bf16", "tf32"):
        rows = by_part[f"converted-{precision}"]
        timed = [(found["launch"], found["mode"]) for found in rows if "ms" in found]
        launched, captured = ("exact", "4bit"), ("exact", "4bit", "8bit")
        assert timed == [("launched", mode) for mode in launched] + [("captured", mode) for mode in captured]
        profiled = {found["mode"]: found for found in rows if "busy_ms" in found}
        assert list(profiled) == ["exact", "4bit"]
        assert all(found["busy_ms"] >= sum(found["longest_ms"].values()) > 0 for found in profiled.values())
        assert all(len(found["longest_ms"]) == 5 for found in profiled.values())
        assert profiled["4bit"]["launches"] > profiled["exact"]["launches"] > 0
    assert {(found["mode"], found["precision"]) for found in by_part["captured"] if found.get("same_bits")} == {
        (mode, precision) for mode in ("4bit", "exact") for precision in ("tf32", "bf16")
    }
    assert [found["mode"] for found in by_part["steps-164-bf16"] if "ms" in found] == ["exact", "4bit", "8bit", "2bit"]
    assert [found["fits"] for found in by_part["batch-exact-164"] if "fits" in found] == [True, True]
    assert [found["cells"] for found in by_part["together-164-bf16"] if "cells" in found] == [1, 2]
    assert "| kernels, 4 bits " in out
    assert "| kernels of converted networks, 4 bits " in out
    assert "| bf16, resnet18, 8bit, captured " in out
    assert "| bf16, 4bit: GPU busy " in out
    assert "| tf32, depth 1001, 8bit " in out
    assert "not timed" not in (tmp_path / "out/compiled-164-tf32.log").read_text()


def test_without_a_gpu_it_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == (
        "", "gpu-check: torch finds no CUDA GPU here; --dry-run tries it in small on the CPU\n",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path / "file/out")]) == 1
    assert capsys.readouterr().err == f"gpu-check: --out {tmp_path}/file/out: Not a directory\n"


@dataclass
class Wrong:
    """The reference, but for what one function puts out."""

    broken: str
    name: str = "wrong"

    def channel_stats(self, x: Tensor, gamma: Tensor, beta: Tensor, **options: Any) -> Tensor:
        vectors = REFERENCE.channel_stats(x, gamma, beta, **options)
        for row, name in enumerate(("mean", "variance")):
            vectors[row, 0] *= 1.01 if self.broken == name else 1
        if options.get("add") is not None:
            x[0, 0] += self.broken == "sum"
            vectors[0, 0] *= 1.01 if self.broken == "statistics of the sum" else 1
        return vectors

    def pointwise_weight_grad(self, grad: Tensor, saved: Tensor, vectors: Tensor, *, codec: Codec | None) -> Tensor:
        a = torch.empty(len(grad), saved.shape[1], dtype=grad.dtype)
        REFERENCE.decode(saved, vectors, codec=codec, out=a)
        return (1.01 if self.broken == "weight gradient" else 1) * grad.float().T @ a.float()

    def normalise_rectify_encode(
        self, x: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor
    ) -> Tensor | None:
        codes = REFERENCE.normalise_rectify_encode(x, vectors, codec=codec, out=out)
        if self.broken == "activation":
            out[-1, -1] += 1
        if self.broken == "codes" and codes is not None:
            codes[-1, -1] += 1
        return codes

    def decode(self, saved: Tensor, vectors: Tensor, *, codec: Codec | None, out: Tensor) -> None:
        REFERENCE.decode(saved, vectors, codec=codec, out=out)
        if self.broken == "decoded activation":
            out[0] = torch.nan  # as where it is not written

    def backward(self, grad: Tensor, saved: Tensor, vectors: Tensor, **options: Any) -> Tensor:
        if self.broken == "the shortcut's gradient":
            options["add"] = None
        sums = REFERENCE.backward(grad, saved, vectors, **options)
        return 1.01 * sums if self.broken == "sums" else sums


@pytest.mark.parametrize("codec", [Codec(4), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("nothing", []),
        ("mean", ["mean"]),
        ("sum", ["sum"]),
        ("statistics of the sum", ["statistics of the sum"]),
        ("weight gradient", ["weight gradient"]),
        ("variance", ["variance"]),
        ("activation", ["activation"]),
        ("codes", ["codes"]),
        ("decoded activation", ["decoded activation"]),
        ("sums", ["sums"]),
        ("the shortcut's gradient", ["input gradient"]),
    ],
)
def test_what_is_wrong_in_a_backend_is_found(
    broken: str, found: list[str], codec: Codec | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    told = differences(Wrong(broken), 1000, 8, dtype=dtype, codec=codec, device=CPU)
    assert told == ([] if broken == "codes" and codec is None else found)


BREAKS = {
    "statistics": "channel_stats", "grid": "grid_vectors", "grid of an input": "grid_vectors",
    "batch norm": "normalise_encode", "its codes": "normalise_encode", "codes": "encode", "codes of an input": "encode",
    "decoded": "decode", "SiLU": "decode", "gradient of ReLU": "elementwise_grad", "input gradient": "input_grad",
    "sums": "gradient_sums", "sums per sample": "gradient_sums", "means of rows": "row_means",
    "vectors of a batch norm": "batch_norm_vectors",
}  # fmt: skip
"""A difference, and the function of kernels for any layout that makes it."""


class BrokenKernels:
    """any_layout, but for one element of what one call puts out."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        """Return a function of any_layout, perhaps broken."""
        function = getattr(any_layout, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            is_asked = {
                "grid": lambda: arguments[1] is not None,
                "grid of an input": lambda: arguments[1] is None,
                "codes": lambda: arguments[5] is not None,
                "codes of an input": lambda: arguments[5] is None,
                "decoded": lambda: arguments[4] is None,
                "SiLU": lambda: arguments[4] is not None,
                "sums": lambda: not options["per_sample"],
                "sums per sample": lambda: options["per_sample"],
            }.get(self.broken, lambda: True)
            if BREAKS[self.broken] == name and is_asked():
                is_written = self.broken in ("batch norm", "decoded", "SiLU", "gradient of ReLU", "input gradient")
                out = arguments[-1] if is_written else result[0] if isinstance(result, tuple) else result
                flat = (out if out.is_contiguous() else out.movedim(1, -1)).view(-1)
                flat[0] = flat[0] + 1 if flat.dtype == torch.uint8 else flat[0] + flat.abs().max() / 10
            return result

        return call


@pytest.mark.parametrize("codec", [Codec(8, "range"), Codec(4), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_wrong_in_kernels_for_any_layout_is_found(broken: str, dtype: torch.dtype, codec: Codec | None) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(13, 40, 16).to(dtype)
    images = torch.randn(4, 6, 5, 7).to(dtype)
    assert not differences_of_any_layout(any_layout, tokens, 2, False, codec)
    assert broken in differences_of_any_layout(BrokenKernels(broken), tokens, 2, False, codec)
    if broken != "means of rows":
        assert broken in differences_of_any_layout(BrokenKernels(broken), images, 1, True, codec)


def test_plain_pytorch_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "kernels_for", lambda _: any_layout)
    cases, wrong = wrong_cases_of_any_layout(True, Codec(4))
    assert (cases, wrong[0].partition(":")[0]) == (0, "not compared")


def test_a_codec_that_cannot_be_compared_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_cases(is_dry: bool, codec: Codec | None) -> tuple[int, list[str]]:
        if codec == Codec(4):
            raise RuntimeError("of the test's own")
        return 10, []

    monkeypatch.setattr(parts, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    assert not parts.kernels_are_right(Check("kernels", tmp_path, is_dry=True), compare=wrong_cases)
    assert {line["codec"]: line["wrong"] for line in lines(tmp_path)} == {
        "4 bits": ["not compared: RuntimeError: of the test's own"], "8 bits": [], "2 bits": [], "full precision": [],
    }  # fmt: skip


def test_wrong_kernels_and_other_bits_are_shown() -> None:
    rows = gpu_check.table(
        iter([
            {"part": "kernels", "codec": "4 bits", "correct": False, "wrong": ["codes at [3, 4], torch.float32"]},
            {"part": "captured", "mode": "4bit", "precision": "tf32", "same_bits": False},
            {"part": "steps", "ended": "ended after 40 s"},
            {"part": "late", "skipped": True},
        ])
    )  # fmt: skip
    assert [row[2] for row in rows[1:]] == [
        "WRONG: codes at [3, 4], torch.float32", "OTHER BITS", "failed (ended after 40 s)", "no time left",
    ]  # fmt: skip


# ---- parts that fail, in processes of their own ----------------------------------------------------------------------


def well(check: Check) -> bool:
    check.write(well=True)
    return True


def wrong(check: Check) -> bool:
    return False


def breaks(check: Check) -> bool:
    raise ValueError("of the test's own")


def hangs(check: Check) -> bool:
    signal.pause()
    return True


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_part_that_breaks_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    parts = Part("breaks", breaks, 60, 0), Part("hangs", hangs, 2, 0), Part("well", well, 60, 0, decides=True)
    assert gpu_check.run_all(tmp_path, 600, is_dry=True, parts=parts)
    told = [{key: value for key, value in line.items() if key != "at"} for line in lines(tmp_path)]
    assert told == [
        {"part": "breaks", "failed": "ValueError: of the test's own"},
        {"part": "breaks", "ended": 1},
        {"part": "hangs", "ended": "ended after 2 s"},
        {"part": "well", "well": True},
        {"part": "well", "ended": 0},
    ]
    assert "Traceback" in (tmp_path / "breaks.log").read_text()


@pytest.mark.parametrize("run", [wrong, breaks])
def test_the_outcome_is_that_of_the_parts_that_decide(run: Any, tmp_path: Path) -> None:
    assert not gpu_check.run_all(tmp_path, 600, is_dry=True, parts=(Part("decides", run, 60, 0, decides=True),))
    assert gpu_check.run_all(tmp_path, 600, is_dry=True, parts=(Part("does-not", run, 60, 0),))


def test_what_there_was_no_time_for_was_not_found_out(tmp_path: Path) -> None:
    assert not gpu_check.run_all(tmp_path, 10, is_dry=True, parts=(Part("late", well, 60, 20, decides=True),))
    assert lines(tmp_path) == [{"part": "late", "skipped": True, "seconds_left": 10}]


def test_its_names_are_those_of_files(tmp_path: Path) -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert sum(part.least for part in PARTS) > 240  # some are for machines that are faster than expected
