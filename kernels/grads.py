"""Pass 2: one block of vocabulary rows after another, the logits again, and from them KL and the gradient block G.

Formulas: tiedkl/reference.py; the arithmetic is that of csrc/cpu/row_kernels.cpp. Of what is as long as the
vocabulary only G (N, B) in the input dtype and the similarity block S (distinct targets, B) in float32 are ever in
memory, B chosen so that both stay in the L2 cache until the matrix products with h and w have read them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tiedkl.problem import Problem

from .exponential import LOG2_E, NEAR, excess_near_zero, exp, expm1, power, power_of_two
from .launch import Targets, cdiv, fast, launch
from .stats import FLOOR, add
from .tile import at_least, finish_logits, halves, product_tile, stored_tile, tile_of

ROW_COLUMNS, ROW_TOKENS = 128, 8  # per program of target_gradient_kernel, and per step
LOWEST_X = tl.constexpr(-80.0)  # expm1 is -1 to rounding below


@triton.jit(do_not_specialize=["v0"])
def similarity_kernel(
    t,  # (V, D)
    ids,  # (capacity,) int64 distinct targets
    count,  # () int64
    out,  # (capacity, B) float32: t[ids] t[v0:v0 + width]^T
    capacity,
    v0,
    width,  # unlike v0 with its divisibility known, or stores would be scalar ones
    D,
    stride_t,
    stride_out,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid tiles of distinct targets x column tiles; programs beyond the device-side count leave at once."""
    tile, tile_v = tile_of(tl.program_id(0), tl.cdiv(capacity, BLOCK_N), tl.cdiv(width, BLOCK_V))
    first = tile * BLOCK_N
    n_ids = tl.load(count)
    if first >= n_ids:
        return
    u = first + tl.arange(0, BLOCK_N)
    valid = u < n_ids
    column = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = v0 + column
    col_mask = column < width
    rows = tl.load(ids + u, mask=valid, other=0)
    s = product_tile(t, rows, valid, stride_t, t, cols, col_mask, stride_t, D, BLOCK_D, EVEN_D, PRECISION)
    tl.store(out + u[:, None] * stride_out + column[None, :], s, mask=valid[:, None] & col_mask[None, :])


@triton.jit
def compare(z, s, q, top, tops, offset, offset_low, inv_total_t, inv_t):
    """(log r - log q, r - q, q (expm1(x) - x)) with x = log r - log q = ((z - s) - (max z - max s))/tau + offset.

    The small difference first: the roundings of the dominant column cancel, however large it is.
    """
    x = (((z - s) - tops[:, None]) * inv_t + offset[:, None]) + offset_low[:, None]
    near = x < 1.0
    bounded = tl.where(x < LOWEST_X, LOWEST_X, tl.where(near, x, 1.0))
    value, excess = expm1(bounded)
    # q expm1(x) would give r the rounding of x where r exceeds q, and overflow beyond: r itself there.
    r = power((z - top[:, None]) * inv_t, FLOOR, False) * inv_total_t[:, None]
    r_minus_q = tl.where(near, q * value, r - q)
    return x, r_minus_q, tl.where(near, q * (excess + (bounded - x)), r_minus_q - q * x)


@triton.jit
def compare_fast(z, s, top, ms, offset, log_inv_total_t, log_inv_sum_s, inv_t, INFINITE: tl.constexpr):
    """The same for inputs of 16 bits, with fewer operations; the logarithms are to base 2. INFINITE: z may be -inf.

    Near r and q are not subtracted: a polynomial gives their difference and divergence, to the precision of x.
    """
    d, d_s, base = z - top[:, None], s - ms[:, None], inv_t * LOG2_E
    r = power_of_two(d * base + log_inv_total_t[:, None])
    q = power_of_two(d_s * base + log_inv_sum_s[:, None])
    x = (d - d_s) * inv_t + offset[:, None]
    qx, near = q * x, tl.abs(x) < NEAR
    if INFINITE:
        qx = tl.where(q > 0, qx, 0.0)
    excess = tl.where(near, (qx * x) * excess_near_zero(x), (r - q) - qx)
    return x, tl.where(near, qx + excess, r - q), excess


@triton.jit
def row_values(n, valid, which, rows, terms, N):
    """What is known of tokens n, each (BLOCK_N,); the compiler leaves out what is not used."""
    step = N.to(tl.int64)
    u = tl.load(which + n, mask=valid, other=0)
    mean = tl.load(terms + step + n, mask=valid, other=0.0)
    rows += n
    top = tl.load(rows, mask=valid, other=0.0)
    coef_p = tl.load(rows + step, mask=valid, other=0.0)
    coef_p_low = tl.load(rows + 2 * step, mask=valid, other=0.0)
    constant = tl.load(rows + 3 * step, mask=valid, other=0.0)
    on_target = tl.load(rows + 4 * step, mask=valid, other=0.0)
    coef_r = tl.load(rows + 5 * step, mask=valid, other=0.0)  # g alpha / tau
    tops = tl.load(rows + 6 * step, mask=valid, other=0.0)
    offset = tl.load(rows + 7 * step, mask=valid, other=0.0)
    offset_low = tl.load(rows + 8 * step, mask=valid, other=0.0)
    inv_total_t = tl.load(rows + 9 * step, mask=valid, other=0.0)
    ms = tl.load(rows + 10 * step, mask=valid, other=0.0)
    inv_sum_s = tl.load(rows + 11 * step, mask=valid, other=0.0)
    x_y = tl.load(rows + 12 * step, mask=valid, other=0.0)
    return (
        u, mean, top, coef_p, coef_p_low, constant, on_target, coef_r, tops, offset, offset_low, inv_total_t, ms,
        inv_sum_s, x_y,
    )  # fmt: skip


@triton.jit
def finish_columns(
    z, column, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s, stride_grad, inv_t,
    softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KL: tl.constexpr, SUM_KL: tl.constexpr,
    WRITE: tl.constexpr, TARGET: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What gradient_kernel does with columns `column` of a block, given their products z. Returns their share of KL.

    Of a tile that is not `special` every column is inside the block and nobody's target, and every row gives numbers.
    """
    (
        u, mean, top, coef_p, coef_p_low, constant, on_target, coef_r, tops, offset, offset_low, inv_total_t, ms,
        inv_sum_s, x_y,
    ) = row  # fmt: skip
    place = n[:, None] * stride_grad + column[None, :]
    z = finish_logits(z, bias, v0 + column, column < width, softcap, HAS_BIAS, SOFTCAP)
    share = top * 0.0
    if KL:
        # Rows of s are as long as whole vectors, and its last tile may go beyond the block: of no meaning there.
        s_tile = tl.load(s + u[:, None] * stride_s + column[None, :], mask=(column < stride_s)[None, :], other=0.0)
        if FAST:
            x, r_minus_q, excess = compare_fast(
                z, s_tile, top, ms, offset, tl.log2(inv_total_t), tl.log2(inv_sum_s), inv_t, HAS_BIAS
            )
        else:
            q = power((s_tile - ms[:, None]) * inv_t, FLOOR, False) * inv_sum_s[:, None]
            x, r_minus_q, excess = compare(z, s_tile, q, top, tops, offset, offset_low, inv_total_t, inv_t)
    if WRITE:
        p = power(z - top[:, None], FLOOR, FAST)
        if FAST:
            out = p * coef_p[:, None] - constant[:, None]
        else:
            out = p * coef_p[:, None] + (p * coef_p_low[:, None] - constant[:, None])
        if KL:
            out += r_minus_q * coef_r[:, None]
    if special:
        # What is not computed here: the target's column is closed by finish_tokens_kernel, whose values are 0 for no
        # token; nothing is beyond the block.
        outside = (column >= width)[None, :] | (valid == 0)[:, None]
        closed = (column[None, :] == (target - v0).to(tl.int32)[:, None]) | outside
        if KL:
            excess = tl.where(closed, 0.0, excess)
            if TARGET:
                x = tl.where(closed, x_y[:, None], x)
        if WRITE:
            out = tl.where(closed, on_target[:, None], out)
    if SUM_KL:
        share = tl.sum(excess, 1)
    inside = (n < N)[:, None] & (column < width)[None, :]
    if TARGET:
        tl.store(delta + place, coef_r[:, None] * (0.0 - x - mean[:, None]), mask=inside)
    if WRITE:
        if SOFTCAP:
            # Exactly 1 where tanh saturates, so that the gradient is exactly 0; a float32 `/` is off by up to 2 ulp.
            ratio = tl.math.div_rn(z, softcap)
            out = out * (1.0 - ratio * ratio)
            out = tl.where(valid[:, None], out, 0.0)  # a NaN of the bias has passed through the ratio
        tl.store(grad + place, out.to(grad.dtype.element_ty), mask=inside)
    return share


@triton.jit
def finish_halves(
    z, column, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s, stride_grad, inv_t,
    softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KL: tl.constexpr, SUM_KL: tl.constexpr,
    WRITE: tl.constexpr, TARGET: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """finish_columns of the left half of z, then of the right one: `column` are those of the left."""
    left, right = halves(z)
    share = finish_columns(
        left, column, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s, stride_grad,
        inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
    )  # fmt: skip
    share += finish_columns(
        right, column + z.shape[1] // 2, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s,
        stride_grad, inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
    )  # fmt: skip
    return share


@triton.jit(do_not_specialize=["N", "v0"])
def gradient_kernel(
    h,  # (N, D); or their products with w (N, V) float32, STORED
    w,  # (V, D)
    bias,  # (V,)
    y,  # (N,) int64, negative: skipped
    which,  # (N,) int64 row of `s` that belongs to a token
    s,  # (capacity, B) float32 similarities of this block
    rows,  # (13, N) float32 of finish_tokens_kernel
    kl,  # (column tiles, N) float32 running sums
    grad,  # (N, B) input dtype, out: G
    delta,  # (N, B) float32, out: (alpha/tau) g (log q - log r - KL), for the target gradient
    terms,  # (5, N) float32, of which KL is read for `delta`
    N,
    v0,
    width,  # of the block
    D,
    stride_h,
    stride_w,
    stride_s,
    stride_grad,
    inv_t,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KL: tl.constexpr,
    SUM_KL: tl.constexpr,  # add this block's share to `kl`
    WRITE: tl.constexpr,  # G
    TARGET: tl.constexpr,  # delta
    STORED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid token tiles x column tiles, in the order of tile_of."""
    tile, tile_v = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(width, BLOCK_V))
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tile_v * BLOCK_V).to(tl.int32)  # columns in 32 bits: a comparison of 64 takes two instructions
    target = tl.load(y + n, mask=n < N, other=-1)
    valid = target >= 0
    column = first + tl.arange(0, BLOCK_V)
    if tl.max(valid.to(tl.int32), 0) == 0:
        if WRITE:
            zeros = tl.zeros((BLOCK_N, BLOCK_V), grad.dtype.element_ty)
            inside = (n < N)[:, None] & (column < width)[None, :]
            tl.store(grad + n[:, None] * stride_grad + column[None, :], zeros, mask=inside)
        return
    # A row of no token has coefficients of 0, which an infinite logit would make NaN, as would one of the exact
    # exponentials, whose argument is not bounded there.
    place = target - v0 - first
    here = (place >= 0) & (place < BLOCK_V)
    if HAS_BIAS or SOFTCAP or not FAST:
        here |= valid == 0
    special = (tl.max(here.to(tl.int32), 0) != 0) | (first + BLOCK_V > width)
    if STORED:  # G may overwrite the products: a program reads its tile before it writes there
        z = stored_tile(h, n, valid, stride_h, column)
        row = row_values(n, valid, which, rows, terms, N)
        share = finish_columns(
            z, column, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s, stride_grad,
            inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
        )  # fmt: skip
    else:
        cols = v0 + column.to(tl.int64)
        z = product_tile(h, n, valid, stride_h, w, cols, column < width, stride_w, D, BLOCK_D, EVEN_D, PRECISION)
        # Once, and not for each part: fewer loads and registers, and compiled in four fifths of the time.
        row = row_values(n, valid, which, rows, terms, N)
        # An eighth of the columns at a time: all at once, logits, similarities and both distributions exceed the
        # registers.
        left, right = halves(z)
        z0, z1 = halves(left)
        part = first + tl.arange(0, BLOCK_V // 8)
        share = finish_halves(
            z0, part, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s, stride_grad,
            inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
        )  # fmt: skip
        share += finish_halves(
            z1, part + BLOCK_V // 4, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s,
            stride_grad, inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
        )  # fmt: skip
        z2, z3 = halves(right)
        share += finish_halves(
            z2, part + BLOCK_V // 2, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s,
            stride_grad, inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
        )  # fmt: skip
        share += finish_halves(
            z3, part + BLOCK_V // 4 * 3, n, target, valid, special, bias, s, row, grad, delta, N, v0, width, stride_s,
            stride_grad, inv_t, softcap, HAS_BIAS, SOFTCAP, KL, SUM_KL, WRITE, TARGET, FAST,
        )  # fmt: skip
    if SUM_KL:
        kl += tile_v * N + n
        tl.store(kl, tl.load(kl, mask=valid, other=0.0) + share, mask=valid)


@triton.jit(do_not_specialize=["capacity", "v0"])
def target_gradient_kernel(
    delta,  # (N, B) float32 of gradient_kernel
    order,  # (N,) int64 tokens sorted by target, skipped ones last
    start,  # (capacity + 1,) int64 first place in `order` of each distinct target
    s,  # (capacity, B) float32
    targets,  # (3, capacity) float64 of finish_targets_kernel
    ids,  # (capacity,) int64
    count,  # () int64
    out,  # (capacity, B) input dtype, but float32 for float16: T_u = (alpha/tau) q_u sum_n g_n (delta_n - KL_n)
    capacity,
    v0,
    width,
    stride,
    inv_t,
    BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (capacity, column tiles): the tokens of one target are added up in their order."""
    u = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = column < width
    place = u * stride + column
    if u >= tl.load(count):
        return
    total = tl.zeros((BLOCK_V,), tl.float32)
    lost, k = total, tl.arange(0, TOKENS)
    end = tl.load(start + u + 1)
    for i in range(tl.load(start + u), end, TOKENS):  # a frequent word has hundreds
        inside = i + k < end
        token = tl.load(order + i + k, mask=inside, other=0)
        rows = delta + token[:, None] * stride + column[None, :]
        total, lost = add(total, lost, tl.sum(tl.load(rows, mask=inside[:, None] & mask[None, :], other=0.0), 0))
    total += lost
    ms = tl.load(targets + u).to(tl.float32)
    inv_sum = (1.0 / tl.load(targets + capacity + u)).to(tl.float32)
    s_row = tl.load(s + place, mask=mask, other=0.0)
    q = exp(at_least((s_row - ms) * inv_t, FLOOR)) * inv_sum
    own = tl.load(targets + 2 * capacity.to(tl.int64) + u).to(tl.float32)
    q = tl.where(v0 + column == tl.load(ids + u), own, q)
    total = tl.where(q > 0, q * total, 0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def similarities(t: Tensor, targets: Targets, columns: slice, out: Tensor) -> None:
    """t[ids] t[columns]^T of the distinct targets into `out` (capacity, B) float32."""
    tile, constants = launch(t, "similarity")
    width = columns.stop - columns.start
    similarity_kernel[(cdiv(targets.capacity, tile.rows) * cdiv(width, tile.cols),)](
        t,
        targets.ids,
        targets.count,
        out,
        targets.capacity,
        columns.start,
        width,
        t.shape[1],
        t.stride(0),
        out.stride(0),
        **constants,
    )


def column_tiles(h: Tensor, columns: int, stored: bool = False) -> int:
    """Slots of running KL sums that blocks of `columns` need."""
    return cdiv(columns, launch(h, "gradient", stored=stored).tile.cols)


def gradient_block(
    p: Problem, rows: Tensor, which: Tensor, s: Tensor | None, columns: slice, inv_t: float, *,
    kl: Tensor | None, grad: Tensor | None, delta: Tensor | None, terms: Tensor, z: Tensor | None = None,
) -> None:  # fmt: skip
    """Add one block's share of KL to `kl` (slots, N), write G over `grad` and g (delta - KL) over `delta`, both (N, B).

    What is None is not wanted. `z` (N, V) float32 may hold the products h w^T; `grad` may be the same memory.
    """
    tile, constants = launch(p.h, "gradient", stored=z is not None, whole=p.options.softcap != 0)
    x = p.h if z is None else z
    width = columns.stop - columns.start
    some = rows  # in the place of what is not there
    block = next(x for x in (grad, delta, s, some) if x is not None)
    gradient_kernel[(cdiv(len(p.h), tile.rows) * cdiv(width, tile.cols),)](
        x, p.w, p.w if p.b is None else p.b, p.y, which, some if s is None else s, rows, some if kl is None else kl,
        some if grad is None else grad, some if delta is None else delta, terms, len(p.h), columns.start, width,
        p.h.shape[1], x.stride(0), p.w.stride(0), 0 if s is None else s.stride(0), block.stride(0), inv_t,
        p.options.softcap, HAS_BIAS=p.b is not None, SOFTCAP=p.options.softcap != 0, KL=s is not None,
        SUM_KL=kl is not None, WRITE=grad is not None, TARGET=delta is not None, STORED=z is not None,
        FAST=fast(p.h), **constants,
    )  # fmt: skip


def target_gradient(
    delta: Tensor, order: Tensor, start: Tensor, s: Tensor, target_sums: Tensor, targets: Targets, columns: slice,
    inv_t: float, out: Tensor,
) -> None:  # fmt: skip
    """T_u of the distinct targets into `out` (capacity, B), whose other rows are left alone.

    `order` (N,) sorts the tokens by target, `start` (capacity + 1,) says where each target's begin.
    """
    width = columns.stop - columns.start
    target_gradient_kernel[(targets.capacity, cdiv(width, ROW_COLUMNS))](
        delta,
        order,
        start,
        s,
        target_sums,
        targets.ids,
        targets.count,
        out,
        targets.capacity,
        columns.start,
        width,
        out.stride(0),
        inv_t,
        BLOCK_V=ROW_COLUMNS,
        TOKENS=ROW_TOKENS,
    )
