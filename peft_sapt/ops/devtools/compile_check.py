"""Compiles every kernel and tile for three GPU generations, without a GPU, and reads what the compiler made of them.

A design that spills registers, loads byte by byte or misses the tensor cores shows here, before any GPU time is spent.
Needs Triton, whose wheel brings ptxas and cuobjdump; not for the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..tiles import TILES, Tile

ARCHITECTURES = {80: ("A100", 163), 90: ("H100, H200", 227), 100: ("B200", 227)}  # shared memory per block, KiB
DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
MATRIX_OPCODES = {80: r"\bHMMA", 90: r"\bHGMMA|\bHMMA", 100: r"\bUTC\w*MMA|\bHMMA"}
OUTPUTS = {"shrink": "h_ptr", "expand": "y_ptr", "block_gradient": "out_ptr"}


class Variant(NamedTuple):
    """One kernel for one dtype with one tile, in one of the modes in which it is launched."""

    kernel: str
    dtype: str
    tile: Tile
    settings: tuple[tuple[str, int], ...]
    precision: str  # of products of float32: exact, or rounded to the tensor cores' format


class Compiled(NamedTuple):
    """What one compilation came to: registers per thread, stack and shared memory in bytes, instructions found."""

    variant: Variant
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    wide_loads: int

    @property
    def faults(self) -> list[str]:
        wrong = []
        if self.stack or self.spills:
            wrong.append(f"spills ({self.stack} bytes of stack, {self.spills} local loads and stores)")
        if self.shared > ARCHITECTURES[self.architecture][1] * 1024:
            wrong.append(f"needs {self.shared} bytes of shared memory")
        exact = DTYPES[self.variant.dtype] == 4 and self.variant.precision == "ieee"
        if not exact and not self.matrix:
            wrong.append("does not use the tensor cores")
        # the TF32 product of sm_90 and later takes its second factor transposed, which Triton gathers word by word
        gathered = self.variant.kernel == "expand" and self.variant.precision == "tf32" and self.architecture >= 90
        if not self.wide_loads and not gathered:
            wrong.append("does not load the factor in units of 16 bytes")
        return wrong


def variants() -> Iterator[Variant]:
    """Every kernel, dtype, tile and mode that a launch can ask for, with aligned rows."""
    modes: dict[str, list[dict[str, int]]] = {
        "shrink": [{"SCALES": 0, "SPLITS": 1}, {"SCALES": 1, "SPLITS": 1}, {"SCALES": 2, "SPLITS": 1},
                   {"SCALES": 0, "SPLITS": 4}],
        "expand": [{"SPLITS": 1, "PER_ROW": row, "HAS_BASE": base} for row in (0, 1) for base in (0, 1)]
        + [{"SPLITS": 4, "PER_ROW": 1, "HAS_BASE": 1}],
        "block_gradient": [{}],
    }  # fmt: skip
    for dtype, size in DTYPES.items():
        for kernel, choices in modes.items():
            for number, tile in enumerate(TILES[kernel, size]):
                for mode in choices:
                    # launches cut the width only for few rows, and never tile few rows by sample
                    if mode.get("SPLITS", 1) > 1 and number > 0:
                        continue
                    for precision in ("ieee", "tf32") if size == 4 else ("ieee",):
                        yield Variant(kernel, dtype, tile, tuple(mode.items()), precision)


def source_of(function: Any, variant: Variant, ones: bool = False) -> Any:
    """What Triton compiles for a variant of ``function``.

    Args:
        ones: as for a launch with 1 for every integer. Triton makes a constant of a 1, unless the kernel forbids it.
    """
    modes = dict(variant.settings)
    blocks = {"BLOCK_M": variant.tile.m, "BLOCK_R": variant.tile.r}
    blocks["BLOCK_K" if variant.kernel == "shrink" else "BLOCK_N"] = variant.tile.other
    constants = {**modes, **blocks, "ALIGNED": not ones, "WIDEN": False, "PRECISION": variant.precision}
    if ones:
        integers = [p for p in function.params if not p.name.endswith("_ptr") and p.name not in constants]
        constants |= {p.name: 1 for p in integers if not p.do_not_specialize}
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            partial = name == OUTPUTS[variant.kernel] and (modes.get("SPLITS", 1) > 1 or variant.kernel[0] == "b")
            partial |= name == "h_ptr" and modes.get("SPLITS", 1) > 1
            signature[name] = "*fp32" if partial or name in ("scale_ptr", "dscale_ptr") else f"*{variant.dtype}"
            if name == "y_ptr":
                signature[name] = f"*{variant.dtype}"
        else:
            signature[name] = "i32"
        if not ones and (name.endswith("_ptr") or name in ("width", "split_width", "split_tokens")):
            aligned[(position,)] = [["tt.divisibility", 16]]
    return _ast_source(function, signature, constants, aligned)


def _ast_source(function: Any, signature: dict[str, str], constants: dict[str, Any], aligned: dict) -> Any:
    """A source in the form that the installed Triton takes: 3.2 has a class of its own for what is aligned."""
    from triton.backends import compiler
    from triton.compiler import ASTSource

    descriptor = getattr(compiler, "AttrsDescriptor", None)
    if descriptor is None:
        return ASTSource(function, signature, constants, aligned)
    varying = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    known = {"arg_properties": {"tt.divisibility": [at for (at,) in aligned]}, "cls": descriptor.__name__}
    return ASTSource(function, varying, constants, descriptor.from_dict(known))


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """One cubin, and what cuobjdump says of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    from .. import kernels

    source = source_of(getattr(kernels, f"{variant.kernel}_kernel"), variant)
    options = {"num_warps": variant.tile.warps, "num_stages": variant.tile.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _read(variant, architecture, built.asm["cubin"], built.metadata.shared)


def _read(variant: Variant, architecture: int, cubin: bytes, shared: int) -> Compiled:
    import triton

    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        return int(found.group(1)) if found else 0

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    wide = count(r"\bLDGSTS\S*\.128|\bUBLKCP|\bUTMALDG")  # asynchronous, as the factor's are; the base's are not
    spills = count(r"\bLDL|\bSTL\b")
    matrix = count(MATRIX_OPCODES[architecture])
    return Compiled(variant, architecture, number("REG"), number("STACK"), spills, shared, matrix, wide)


def compile_all(workers: int = 2, architectures: tuple[int, ...] = tuple(ARCHITECTURES)) -> list[Compiled]:
    """All variants on all architectures, in ``workers`` processes."""
    jobs = [(variant, architecture) for variant in variants() for architecture in architectures]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_variant, *zip(*jobs, strict=True), chunksize=4))


def table(compiled: list[Compiled]) -> str:
    """Registers per thread / shared memory in KiB by kernel, dtype, tile and GPU; the worst of its modes."""
    lines = [
        "| kernel | dtype | tile (m x r x other, warps, stages) | sm_80 | sm_90 | sm_100 |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str, Tile], dict[int, list[Compiled]]] = {}
    for one in compiled:
        key = (one.variant.kernel, one.variant.dtype, one.variant.tile)
        rows.setdefault(key, {}).setdefault(one.architecture, []).append(one)
    for (kernel, dtype, tile), by in sorted(rows.items()):
        cells = [
            f"{max(c.registers for c in by[a])} / {max(c.shared for c in by[a]) / 1024:.0f}" if a in by else ""
            for a in ARCHITECTURES
        ]
        shape = f"{tile.m} x {tile.r} x {tile.other}, {tile.warps}, {tile.stages}"
        lines.append(f"| {kernel} | {dtype} | {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
