"""Products with as many rows as there are distinct targets, a number that only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponential import INTERPRETED
from .launch import cdiv, launch


@triton.jit(do_not_specialize=["M", "K"])
def counted_product_kernel(
    left,  # (M, K)
    right,  # (K, D), in float16 where left may be in float32
    out,  # (M, D) float32, added to
    count,  # () int64: of the rows of left, or, INNER, of its columns and the rows of right, that many are meant
    M,
    K,
    D,
    stride_left,
    stride_left_k,
    stride_right,
    stride_out,
    INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # D is a multiple of BLOCK_V
    PRECISION: tl.constexpr,
):
    """Grid (column tiles, row tiles): neighbours share the rows of left. Programs beyond the count leave at once."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    counted = tl.load(count)
    rows, inner = counted, K.to(tl.int64)
    if INNER:
        rows, inner = M.to(tl.int64), counted
    if first >= rows:
        return
    m = first + tl.arange(0, BLOCK_N)
    column = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    row_mask, col_mask = (m < rows)[:, None], (column < D)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    # A chain of thousands of float32 additions is less accurate than cuBLAS, the more so where the terms are alike:
    # those of a step are added up by themselves. Of a constant 0.0 the compiler would make one chain again.
    apart = PRECISION == "ieee" and right.dtype.element_ty == tl.float32
    nothing = total + (inner < 0).to(tl.float32)
    for i in range(0, inner, BLOCK_D):
        inside = i + k < inner
        a = tl.load(
            left + m[:, None] * stride_left + (i + k)[None, :] * stride_left_k,
            mask=row_mask & inside[None, :],
            other=0.0,
        )
        b_tile = right + (i + k)[:, None] * stride_right + column[None, :]
        if EVEN_D:
            b = tl.load(b_tile, mask=inside[:, None], other=0.0)
        else:
            b = tl.load(b_tile, mask=inside[:, None] & col_mask, other=0.0)
        if INTERPRETED:  # as in product_tile
            a = a.to(tl.float32)
        b = b.to(a.dtype)  # float16 in tf32 is exact
        if apart:
            total += tl.dot(a, b, nothing, input_precision=PRECISION)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    place = out + m[:, None] * stride_out + column[None, :]
    mask = row_mask & col_mask
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


def add_counted_product(out: Tensor, x: Tensor, y: Tensor, count: Tensor, inner: bool) -> None:
    """out (M, D) float32 += x (M, K) y (K, D), of the first `count` rows, or, `inner`, of the first `count` terms.

    Rows of `out` and `y` are contiguous; x may be transposed, and in float32 where y is in float16: it is rounded to
    the 11 bits of tf32 then, as many as float16 has.
    """
    tile, constants = launch(y, "gradient", whole=True)
    if x.dtype != y.dtype and not torch.version.hip:
        constants = constants | {"PRECISION": "tf32"}
    (m, k), d = x.shape, y.shape[1]
    counted_product_kernel[(cdiv(d, tile.cols), cdiv(m, tile.rows))](
        x, y, out, count, m, k, d, x.stride(0), x.stride(1), y.stride(0), out.stride(0), INNER=inner,
        **constants | {"EVEN_D": d % tile.cols == 0},
    )  # fmt: skip
