"""One tile of x w^T and what becomes of it. Shared by every kernel; docs/math.md has the derivation."""

import triton
import triton.language as tl

from .exponential import INTERPRETED, expm1

GROUP = tl.constexpr(12)  # squared, about the multiprocessors of a large GPU


@triton.jit
def product_tile(
    x,  # (rows, D)
    rows,  # (BLOCK_R,) int64 rows of x
    row_mask,
    stride_x,
    w,  # (V, D)
    cols,  # (BLOCK_V,) int64 rows of w
    col_mask,
    stride_w,
    D,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # D is a multiple of BLOCK_D
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
):
    """x[rows] w[cols]^T, (BLOCK_R, BLOCK_V), accumulated in float32. Rows that are masked out give zeros."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    k = tl.arange(0, BLOCK_D)
    x_tile = x + rows[:, None] * stride_x + k[None, :]
    w_tile = w + cols[None, :] * stride_w + k[:, None]
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(x_tile + d, mask=row_mask[:, None], other=0.0)
            b = tl.load(w_tile + d, mask=col_mask[None, :], other=0.0)
        else:
            inside = d + k < D
            a = tl.load(x_tile + d, mask=row_mask[:, None] & inside[None, :], other=0.0)
            b = tl.load(w_tile + d, mask=col_mask[None, :] & inside[:, None], other=0.0)
        if INTERPRETED:  # it multiplies the bit patterns of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def stored_tile(z, rows, row_mask, stride_z, cols):
    """The same tile, of products z that a block of whole rows holds; of no meaning in columns beyond the vocabulary.

    Rows are padded to whole vectors: to mask at the vocabulary's own end would make every load a scalar one.
    """
    inside = row_mask[:, None] & (cols < stride_z)[None, :]
    return tl.load(z + rows[:, None] * stride_z + cols[None, :], mask=inside, other=0.0)


@triton.jit
def tile_of(pid, row_tiles, col_tiles):
    """(row tile, column tile) of a program: GROUP row tiles to all columns, then the next ones.

    Some GROUP x GROUP tiles are in work at a time, so that few rows of either matrix pass through the L2 cache at once.
    """
    first = pid // (GROUP * col_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    place = pid % (GROUP * col_tiles)
    return (first + place % rows).to(tl.int64), (place // rows).to(tl.int64)


@triton.jit
def halves(x):
    """The left and the right columns of x, without moving anything between threads."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def at_least(x, low):
    """max(x, low), but NaN where x is NaN: a loss made of NaN must not look like a number."""
    return tl.where(x < low, low, x)


@triton.jit
def finish_logits(z, bias, cols, col_mask, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """softcap(z + bias)"""
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcap * tanh(tl.math.div_rn(z, softcap))
    return z


@triton.jit
def tanh(x):
    """Exactly +-1 where it saturates, to about three ulp elsewhere."""
    a = tl.abs(x)
    a = tl.where(a > 10.0, 10.0, a)  # unlike a minimum this keeps NaN
    e, _ = expm1(2.0 * a)
    return tl.where(x < 0, -1.0, 1.0) * tl.where(a > 9.5, 1.0, tl.math.div_rn(e, e + 2.0))
