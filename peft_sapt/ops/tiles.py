"""The tiles that the kernels may run with: a short list, each compiled ahead of time by the tests for three GPUs."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One way to cut a kernel's work: rows x ranks x the other axis (reduced by shrink, produced by the others)."""

    m: int
    r: int
    other: int
    warps: int
    stages: int


# by kernel, for 16-bit and for 32-bit numbers: few rows; many rows; many rows and ranks
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("shrink", 2): (Tile(16, 32, 128, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 8, 3)),
    ("shrink", 4): (Tile(16, 32, 64, 4, 3), Tile(64, 32, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ("expand", 2): (Tile(16, 32, 128, 4, 3), Tile(64, 32, 128, 4, 3), Tile(128, 32, 128, 8, 3)),
    ("expand", 4): (Tile(16, 32, 64, 4, 3), Tile(64, 16, 64, 4, 3), Tile(64, 32, 64, 8, 2)),
    ("block_gradient", 2): (Tile(64, 16, 128, 4, 3),),
    ("block_gradient", 4): (Tile(32, 16, 64, 4, 3),),
}
FEW_ROWS = 16  # a group of fewer tokens does not fill a row tile: its rows are tiled with those of its neighbours
TARGET_PROGRAMS = 132  # multiprocessors of an H100: with fewer programs than that, the long axis is cut


def candidates(kernel: str, itemsize: int, rows: int, rank: int) -> tuple[Tile, ...]:
    """Tiles worth timing for ``rows`` rows per group; the first one is taken where nothing can be timed."""
    every = TILES[kernel, itemsize]
    if len(every) == 1 or rows <= 2 * FEW_ROWS:
        return every[:1]
    return (every[2], every[1]) if rows >= 512 and rank >= 128 else (every[1], every[2])


def splits(programs: int, extent: int, block: int) -> int:
    """Into how many parts to cut an axis of ``extent`` so that about TARGET_PROGRAMS run, at most 8."""
    wanted = max(1, TARGET_PROGRAMS // max(1, programs))
    return max(1, min(8, wanted, -(-extent // (2 * block))))
