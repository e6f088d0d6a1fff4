"""The similarity kernel alone: every tile, width and stride, and nothing read or written beyond the number of targets.

Elements are small integers, whose sums float32 holds exactly: results are compared to the last bit.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
NOWHERE = 1 << 60  # as a target's id, an address that no process has
UNTOUCHED = -12345.5
FORWARD, BACKWARD, SHUFFLED = range(3)


@dataclass(frozen=True)
class Shape:
    capacity: int
    count: int
    v0: int
    cols: int
    width: int
    stride: int
    start: int = 0  # elements before the first row

    @property
    def rows(self) -> int:
        return self.v0 + self.cols


SHAPES = [
    Shape(1, 1, 0, 1, 1, 1),
    Shape(5, 3, 0, 33, 8, 8),
    Shape(200, 128, 2, 128, 64, 64),  # whole tiles
    Shape(200, 129, 3, 259, 32, 32),
    Shape(300, 131, 7, 130, 72, 72),  # whole chunks, no whole step
    Shape(40, 17, 5, 61, 200, 208),  # rows further apart than they are wide
    Shape(40, 17, 5, 61, 19, 19),  # no whole chunks, nor aligned rows
    Shape(40, 17, 5, 61, 101, 104),  # aligned rows, no whole chunks
    Shape(40, 17, 5, 61, 64, 68),  # whole chunks, rows not aligned
    Shape(40, 17, 5, 61, 64, 64, start=3),  # a first row that is not aligned
    Shape(3000, 2100, 0, 140, 8, 8),  # more tile rows than one group
    Shape(30, 0, 0, 40, 16, 16),  # no target
    Shape(3, 3, 0, 40, 0, 8),  # no element
]


def compute(extension: ModuleType, t: Tensor, ids: Tensor, count: int, v0: int, cols: int) -> Tensor:
    """The buffer (capacity, ld) that similarities are written into."""
    out = torch.full((len(ids), (cols + 31) // 32 * 32 + 32), UNTOUCHED)
    number = torch.tensor([count])
    extension.similarities(
        t.data_ptr(), t.stride(0), t.shape[1], t.dtype == torch.bfloat16, ids.data_ptr(), number.data_ptr(), len(ids),
        v0, cols, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_the_distinct_targets_and_no_others(
    extension: ModuleType, shape: Shape, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(shape.width)
    memory = torch.full((shape.start + shape.rows * shape.stride,), torch.nan, dtype=dtype)
    t = memory[shape.start :].view(shape.rows, shape.stride)[:, : shape.width]
    t.copy_(torch.randint(-8, 9, t.shape, generator=g))
    ids = torch.full((shape.capacity,), NOWHERE)
    ids[: shape.count] = torch.randint(shape.rows, (shape.count,), generator=g)
    want = torch.full((shape.capacity, (shape.cols + 31) // 32 * 32 + 32), UNTOUCHED)
    full = t.double()
    want[: shape.count, : shape.cols] = (full[ids[: shape.count]] @ full[shape.v0 :].T).float()
    for order in (FORWARD, BACKWARD, SHUFFLED):
        extension.set_order(order)
        got = compute(extension, t, ids, shape.count, shape.v0, shape.cols)
        assert torch.equal(got, want), f"order {order}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 64, 19, 1])
def test_nothing_behind_the_last_row_is_read(extension: ModuleType, width: int, dtype: torch.dtype) -> None:
    """Memory ends there: a byte more would end the process."""
    rows = 140
    size = 2 * rows * width
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    t = torch.frombuffer(memory, dtype=dtype, count=rows * width, offset=whole - size).view(rows, width)
    t.copy_(torch.arange(rows * width).view(rows, width) % 7)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    behind = t.data_ptr() + size
    assert protect(behind, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    try:
        ids = torch.tensor([rows - 1, 0, NOWHERE])
        got = compute(extension, t, ids, 2, 0, rows)
        assert torch.equal(got[:2, :rows].double(), t[[rows - 1, 0]].double() @ t.double().T)
    finally:
        assert protect(behind, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("width", [96, 97])
def test_the_count_may_be_beyond_the_capacity(extension: ModuleType, width: int) -> None:
    """Not in the walk; but then rows of the buffer are the limit."""
    t = torch.ones(9, width, dtype=torch.float16)
    got = compute(extension, t, torch.arange(4), 1 << 40, 0, 9)
    assert (got[:, :9] == width).all()
    assert (got[:, 9:] == UNTOUCHED).all()
