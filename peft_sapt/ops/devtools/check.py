"""Checks the kernels on this machine, on its GPU if it has one and without it as far as that goes.

    python -m peft_sapt.ops.devtools.check

With a GPU: errors against float64 with NaN in all memory that is not written, the op inside a CUDA graph, the speeds
of a copy and of a product, and the op's times beside the floor that they set. Without one: the same numerics in
Triton's interpreter, and every kernel compiled for three GPU generations. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import compile_check as compile_check
from . import floors, numerics, timings

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def print_errors(kernel: str, where: str, results: list[dict[str, Any]]) -> bool:
    """The largest error of each quantity by dtype, and every case beyond its tolerance."""
    print(f"\n{kernel} on {where}, largest error against float64:")
    for dtype in dict.fromkeys(r["dtype"] for r in results):
        worst: dict[str, float] = {}
        for result in (r for r in results if r["dtype"] == dtype):
            for name, error in result["errors"].items():
                short = "each tile" if "(" in name else name
                worst[short] = max(error, worst.get(short, 0.0))
        limits = sorted({r["limit"] for r in results if r["dtype"] == dtype})
        shown = f"{limits[0]:g}" if len(limits) == 1 else f"{limits[0]:.1g} to {limits[-1]:.1g} by size"
        print(f"  {dtype} (limit {shown}): " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    for result in results:
        if not result["ok"]:
            print(f"  FAILED: {result['dtype']}, {result['case']}: {result['errors']}")
    return all(result["ok"] for result in results)


def interpreted() -> list[dict[str, Any]]:
    """The Triton kernels in the interpreter, which has to be chosen before Triton is imported: in a new process."""
    command = [sys.executable, "-m", "peft_sapt.ops.devtools.numerics", "triton", "cpu"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def in_a_graph() -> bool:
    """The forward captured in a CUDA graph and replayed on other numbers gives what it gives outside."""
    shape = floors.Shape(4, 1, 1024, 1024, 15, 4)
    first, second = (timings.problem(shape, torch.bfloat16, "cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        timings.fused(first, shape, "triton")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = timings.fused(first, shape, "triton")
        for name, value in first.items():
            value.copy_(second[name])
        graph.replay()
        same = torch.equal(y, timings.fused(second, shape, "triton"))
    print(f"\nreplayed in a CUDA graph: {'the same' if same else 'FAILED: other numbers'}")
    return same


def with_gpu(dtype: torch.dtype) -> tuple[bool, dict[str, Any]]:
    """Numerics, a CUDA graph, ceilings and times on the GPU: whether the first two passed, and all that was found."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results = numerics.run("triton", "cuda", (*numerics.SMALL, *numerics.LARGE))
    fine = print_errors("triton", "cuda", results) and in_a_graph()
    top = timings.ceilings("cuda", dtype)
    print(f"\nmeasured: copy {top.bandwidth / 1e12:.2f} TB/s, product {top.rate / 1e12:.0f} TFLOP/s in {dtype}")
    times = timings.measure(floors.SHAPES, ("triton", "torch"), dtype, "cuda", top)
    print(timings.table(times))
    found = {"gpu": torch.cuda.get_device_name(), "numerics": results, "ceilings": top._asdict(),
             "timings": [t._asdict() | {"shape": floors.name(t.shape)} for t in times]}  # fmt: skip
    return fine, found


def without_gpu(architectures: tuple[int, ...], workers: int) -> tuple[bool, dict[str, Any]]:
    """Numerics in the interpreter and the compile check: whether all passed, and all that was found."""
    print("No GPU was used: there is none here. Nothing below is a measurement of speed on one.")
    plain = numerics.run("torch", "cpu")
    fine = print_errors("torch", "cpu", plain)
    if importlib.util.find_spec("triton") is None:
        print("\nFAILED: the Triton kernels were not checked, since Triton is not installed: pip install triton")
        return False, {"gpu": None, "numerics": {"torch": plain}}
    results = interpreted()
    fine &= print_errors("triton", "the interpreter", results)
    print(f"\ncompiling all kernels for {', '.join(f'sm_{a}' for a in architectures)}, some minutes", flush=True)
    compiled = compile_check.compile_all(workers, architectures)
    print(compile_check.table(compiled))
    faulty = [c for c in compiled if c.faults]
    for one in faulty:
        print(f"FAILED: {one.variant} for sm_{one.architecture}: {'; '.join(one.faults)}")
    print(f"{len(compiled) - len(faulty)} of {len(compiled)} compilations have no fault")
    listed = [c._asdict() | {"variant": repr(c.variant), "faults": c.faults} for c in compiled]
    found = {"gpu": None, "numerics": {"torch": plain, "triton, interpreted": results}, "compiled": listed}
    return fine and not faulty, found


def main(arguments: list[str] | None = None) -> int:
    """The command; ``arguments`` are those of the process by default. Returns its exit status."""
    about = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m peft_sapt.ops.devtools.check", description=about)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the times on a GPU")
    known = tuple(compile_check.ARCHITECTURES)
    parser.add_argument("--architectures", type=int, nargs="+", choices=known, default=known, help="without a GPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write everything found here")
    args = parser.parse_args(arguments)
    if torch.cuda.is_available():
        fine, found = with_gpu(DTYPES[args.dtype])
    else:
        fine, found = without_gpu(tuple(args.architectures), args.workers)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\nall checks passed" if fine else "\nFAILED, see above")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
