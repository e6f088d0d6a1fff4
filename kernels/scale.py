"""Saved gradients times the upstream one. After a plain `loss.backward()` that is 1, and nothing is read or written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, processors

BLOCK, RESIDENT = 4096, 4  # elements of a step, and programs a multiprocessor
OPTIONS = {"num_warps": 8}


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x (n,) *= factor (1,) float32, rounded once. Each program takes every so many blocks."""
    by = tl.load(factor)
    if by == 1.0:
        return
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        place = begin + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)
        tl.store(x + place, (value * by).to(x.dtype.element_ty), mask=place < n)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous, times factor (1,) float32, in place."""
    grid = min(cdiv(x.numel(), BLOCK), RESIDENT * processors(x.device))
    scale_kernel[(grid,)](x, factor, x.numel(), BLOCK=BLOCK, **OPTIONS)
    return x
