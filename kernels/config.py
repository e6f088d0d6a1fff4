"""Tile sizes as data: one row per architecture and width of the input dtype.

`tests/kernels/test_compile.py` compiles every row for its architecture and checks registers, spills and shared memory.
A row says on which GPU and when it was measured; one that was not is what compiles without spills at the largest tile.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of a product x w^T: rows of x, rows of w, and columns of both that one step loads.

    Where `resident` programs share a multiprocessor, one works on its logits while another multiplies; the compiler is
    held to their share of the registers.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    resident: int = 1


class Row(NamedTuple):
    """Tiles of the products of tokens in either pass, and of those of targets; where and when they were measured.

    `tiedkl tune-kernels` measures them.
    """

    statistics: Tile
    gradient: Tile
    similarity: Tile
    gpu: str = "not measured"
    date: str = ""


def alike(tile: Tile, *measured: str) -> Row:
    """One tile for all."""
    return Row(tile, tile, tile, *measured)


SAFE = alike(Tile(64, 64, 32, 4, 2))  # anything else, AMD included
TILES = {  # (architecture, bytes per element)
    ("sm_80", 2): Row(Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    ("sm_80", 4): alike(Tile(64, 64, 32, 4, 3)),
    ("sm_90", 2): alike(Tile(128, 128, 64, 8, 3, 2), "NVIDIA H200", "2026-11-26"),
    ("sm_90", 4): Row(Tile(64, 32, 32, 4, 3), Tile(64, 64, 16, 4, 4), Tile(64, 64, 32, 4, 3)),
    ("sm_100", 2): Row(Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4)),
    ("sm_100", 4): Row(Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
STORED = {  # bytes per element: of products read from memory, a row to a program of one warp; the depth says nothing
    2: alike(Tile(1, 1024, 16, 1, 1), "NVIDIA H200", "2026-11-26"),
    4: alike(Tile(1, 512, 16, 1, 1)),
}
# An interpreted operation takes as long on a large tile as on a small one.
INTERPRETER = alike(Tile(256, 512, 128, 1, 1))
SMALL_ROWS = 64  # rows per program of the kernels that close the sums; at 128 ptxas spills on sm_100


def tiles(architecture: str, element_size: int) -> Row:
    """The tiles for inputs of that many bytes; the interpreter and unknown architectures have one."""
    return TILES.get((architecture, element_size), INTERPRETER if architecture == "interpreter" else SAFE)
