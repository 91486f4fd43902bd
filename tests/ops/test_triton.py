"""The Triton kernels without a GPU: their numbers in the interpreter, mutants that must fail, what the compiler made.

The interpreter has to be chosen before Triton is imported, so each test starts a process of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT, environment
from helpers.upstream import loops_fail_in_the_interpreter
from peft_sapt.ops import kernels, tiles
from peft_sapt.ops.devtools import check, compile_check, floors, numerics, timings

SOURCE = Path(kernels.__file__).read_text(encoding="utf-8")
MUTANTS = {
    "shrink reads past the width": ("mask=real[:, None] & (k < width)[None, :]", "mask=real[:, None]"),
    "block gradient reads past the tokens": ("(m < tokens)[:, None] & (n < width)[None, :]", "(n < width)[None, :]"),
    "a frozen row too many": ("tl.where(r < old_rank,", "tl.where(r <= old_rank,"),
    "the scale of the next row": ("scale_ptr + group * rank + r, mask=r < rank", "scale_ptr + r, mask=r < rank"),
    "a partial sum forgotten": ("tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)"),
    "a column of y not written": (
        "tl.store(y_ptr + row * width + at, acc.to(y_ptr.dtype.element_ty), mask=inside)",
        "tl.store(y_ptr + row * width + at, acc.to(y_ptr.dtype.element_ty), mask=inside & (n > 0)[None, :])",
    ),
}
SCRIPT = """
import importlib.util, json, sys
from peft_sapt import ops
if {path!r}:
    spec = importlib.util.spec_from_file_location("peft_sapt.ops.kernels", {path!r})
    ops.kernels = sys.modules["peft_sapt.ops.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ops.kernels)
from peft_sapt.ops.devtools import numerics
numerics.TOLERANCE = {{k: v for k, v in numerics.TOLERANCE.items() if str(k) in {dtypes!r}}}
print(json.dumps(numerics.run("triton", "cpu", numerics.SMALL[:{count}])))
"""


def interpreted(count: int, dtypes: tuple[str, ...], path: str = "") -> list[dict]:
    code = SCRIPT.format(path=path, count=count, dtypes=dtypes)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, check=False)
    if run.returncode and loops_fail_in_the_interpreter():
        pytest.xfail("this Triton's interpreter runs no loop with this NumPy, of a kernel of one line neither")
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_value_and_gradients_in_the_interpreter(dtype: str) -> None:
    results = interpreted(3, (dtype,))
    assert len(results) == 4
    assert [r for r in results if not r["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_does_not_pass(mutant: str, tmp_path: Path) -> None:
    before, after = MUTANTS[mutant]
    assert before in SOURCE
    (tmp_path / "kernels.py").write_text(SOURCE.replace(before, after), encoding="utf-8")
    assert [r for r in interpreted(3, ("torch.float32",), str(tmp_path / "kernels.py")) if not r["ok"]]


@pytest.mark.slow
def test_the_check_without_a_gpu(tmp_path: Path) -> None:
    """All cases and dtypes, and every kernel compiled; the README beside the kernels has this very table."""
    command = [sys.executable, "-m", "peft_sapt.ops.devtools.check", "--json", str(tmp_path / "found.json")]
    env = environment(CUDA_VISIBLE_DEVICES="")
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "No GPU was used" in run.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    limits = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
    results = found["numerics"]["triton, interpreted"]
    assert {r["dtype"] for r in results} == set(limits)
    assert all(error <= limits[r["dtype"]] for r in results for error in r["errors"].values())
    assert len(found["compiled"]) == 3 * len(list(compile_check.variants()))
    assert all(c["stack"] == c["spills"] == 0 and not c["faults"] for c in found["compiled"])
    assert all(c["matrix"] > 0 for c in found["compiled"] if "fp32" not in c["variant"])
    rows = [line for line in run.stdout.splitlines() if line.startswith(("| shrink", "| expand", "| block_gradient"))]
    assert len(rows) == sum(len(listed) * (2 if size == 2 else 1) for (_, size), listed in tiles.TILES.items())
    readme = (ROOT / "peft_sapt" / "ops" / "README.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in readme] == []


@pytest.mark.parametrize("kernel", ["shrink", "expand", "block_gradient"])
def test_a_launch_with_ones_compiles(kernel: str) -> None:
    """One token, one rank: in the interpreter they are numbers like others, on a GPU constants without methods."""
    run = subprocess.run([sys.executable, "-c", ONES.format(kernel=kernel)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert ("needed" in run.stdout) == (kernel == "expand")


ONES = """
import triton
from triton.backends.compiler import GPUTarget
from peft_sapt.ops import kernels
from peft_sapt.ops.devtools import compile_check

function = kernels.{kernel}_kernel
own = [v for v in compile_check.variants() if v.kernel == {kernel!r} and v.dtype == "bf16"]
variant = max(own, key=lambda v: dict(v.settings).get("SPLITS", 1))
target = GPUTarget("cuda", 90, 32)
triton.compile(compile_check.source_of(function, variant, ones=True), target=target)
free = triton.jit(function.fn)  # without what the kernel keeps from Triton
try:
    triton.compile(compile_check.source_of(free, variant, ones=True), target=target)
except triton.CompilationError:
    print("needed")
"""


def test_the_readme_has_the_floors() -> None:
    readme = (ROOT / "peft_sapt" / "ops" / "README.md").read_text(encoding="utf-8")
    assert floors.tables() in readme


def test_floors_against_a_count_by_hand() -> None:
    shape = floors.Shape(2, 3, 5, 7, 4, 2)  # 6 tokens, R = 8
    assert floors.forward(shape).flops == 2 * 6 * 8 * (5 + 7)
    read, written = 6 * 5 + 6 * 7 + 8 * (5 + 7), 6 * 7 + 6 * 8  # x, base, A, B; y, h
    assert floors.forward(shape).bytes == 2 * (read + written) + 4 * 2 * 8  # scales in float32
    # dy B^T, (G g) A, and A and B of the newest block
    assert floors.backward(shape).flops == 2 * 6 * (8 * 7 + 8 * 5 + 2 * 5 + 2 * 7)


def test_times_of_every_shape_are_measured() -> None:
    top = timings.Ceilings(1e10, 1e11)
    shapes = [floors.Shape(2, 4, 32, 16, 3, 2), floors.Shape(1, 1, 32, 16, 1, 2)]
    found = timings.measure(shapes, ("torch", "reference"), torch.float32, "cpu", top)
    assert [(t.shape, t.what) for t in found] == [(s, w) for s in shapes for w in ("forward", "forward + backward")]
    assert all(set(t.by) == {"torch", "reference", "naive"} and min(t.by.values()) > 0 for t in found)
    slower = found[0]._replace(by={"torch": 2.0, "naive": 1.0})
    assert "loses to naive" in timings.table([slower]) and "loses" not in timings.table([slower._replace(
        by={"torch": 1.0, "naive": 2.0})])  # fmt: skip


def test_a_launch_picks_only_compiled_tiles() -> None:
    compiled = {(v.kernel, v.tile) for v in compile_check.variants()}
    for (kernel, size), listed in tiles.TILES.items():
        for rows in (1, 15, 16, 33, 512, 4096):
            for rank in (1, 16, 127, 128, 1600):
                found = tiles.candidates(kernel, size, rows, rank)
                assert found and set(found) <= set(listed)
                assert all((kernel, tile) in compiled for tile in found)


@pytest.mark.parametrize("programs", [1, 7, 64, 500])
@pytest.mark.parametrize("extent", [1, 64, 257, 4096])
def test_splits_cover_the_axis(programs: int, extent: int) -> None:
    parts = tiles.splits(programs, extent, 128)
    assert 1 <= parts <= 8 and (programs < tiles.TARGET_PROGRAMS or parts == 1)
    width = math.ceil(math.ceil(extent / parts) / 128) * 128  # as a launch rounds it
    assert parts * width >= extent


def test_a_wrong_number_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"dtype": "float32", "case": "one", "errors": {"y": 1e-3}, "limit": 1e-6, "ok": False}
    assert not check.print_errors("triton", "nowhere", [result])
    assert "FAILED" in capsys.readouterr().out


def test_a_spill_fails_the_check() -> None:
    variant = next(v for v in compile_check.variants() if v.dtype == "fp16")
    good = compile_check.Compiled(variant, 90, 100, 0, 0, 1024, 4, 8)
    assert good.faults == []
    for wrong in ({"stack": 8}, {"spills": 1}, {"shared": 10**6}, {"matrix": 0}, {"wide_loads": 0}):
        assert good._replace(**wrong).faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_kernel_has_the_same_tolerance(dtype: torch.dtype) -> None:
    for case in numerics.SMALL:
        errors = numerics.errors(case, dtype, "cpu", "torch")
        assert max(errors.values()) <= numerics.limit(case, dtype), (case, errors)
