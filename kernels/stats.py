"""Pass 1: the softmax statistics of every row, in memory of O(rows).

Formulas: tiedkl/reference.py; the arithmetic is that of csrc/row_math.h. Each program walks a share of the vocabulary
with running sums relative to a running maximum; the shares are merged in float64 by a second small kernel, in a fixed
order: there are no atomics, and reruns give the same bits.

    tokens    m = max over v != y,  sum e^(z-m),  sum e^((z-m)/tau),  sum e^(z-m) (z-m),  sum z,  z_y
    targets   m = max,  sum over v != u of e^((s-m)/tau)                          s = t[u] t^T, not yet divided by tau

The products z and s are made here, or, where a block of whole rows is STORED, read. Where the prediction is good, KL
hangs on the small difference of z_y and s_u, the largest numbers of their rows: both come from dot products in float64
as well, and the target's column of KL is closed with them here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiedkl.problem import Problem

from .config import SMALL_ROWS
from .exponential import exp, power
from .launch import Targets, cdiv, fast, launch, splits
from .tile import at_least, finish_logits, halves, product_tile, stored_tile, tile_of

LOWEST = tl.constexpr(-3.0e38)
FLOOR = tl.constexpr(-87.0)  # smallest exponent of `exp`; below it a probability counts as e^-87
TOKEN_SUMS = 6
TARGET_SUMS = 2
TARGET_VALUES = 3
DOT_TILE = (16, 64)  # rows and columns of a step of target_dots_kernel
ROW_VALUES = 13  # what pass 2 needs of a token; written by finish_tokens_kernel, read by kernels/grads.py


@triton.jit
def add(total, lost, x):
    """total + lost + x, and what the rounding of the sum lost (Kahan): hundreds of tiles are added up in a row."""
    term = x + lost
    new = total + term
    return new, term - (new - total)


@triton.jit
def add_columns(
    z, cols, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t, weighted, plain, zy,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, KL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The running sums with columns `cols` taken in, given their products z; `lost` is what roundings lost.

    Of columns that are not `special` none is a target's, and none beyond the vocabulary.
    """
    z = finish_logits(z, bias, cols, cols < end, softcap, HAS_BIAS, SOFTCAP)
    if special:
        inside = (cols < end)[None, :]
        others = inside & (cols[None, :] != target[:, None])
        zy += tl.sum(tl.where(inside ^ others, z, 0.0), 1)
        if SMOOTHING:
            plain += tl.sum(tl.where(inside, z, 0.0), 1)
        # What is left out counts as e^-87 of the largest, as does all that is as small: less than any rounding.
        z = tl.where(others, z, float("-inf"))
    elif SMOOTHING:
        plain += tl.sum(z, 1)
    top = tl.maximum(m, tl.max(z, 1))
    shift = at_least(m - top, FLOOR)
    z -= top[:, None]
    d = at_least(z, FLOOR)
    scale, e = exp(shift), power(d, FLOOR, FAST)
    weighted = scale * (weighted + shift * total) + tl.sum(e * d, 1)
    total, lost = add(scale * total, scale * lost, tl.sum(e, 1))
    if KL:
        e_t = power(z * inv_t, FLOOR, FAST)
        scale_t = exp(at_least((m - top) * inv_t, FLOOR))
        total_t, lost_t = add(scale_t * total_t, scale_t * lost_t, tl.sum(e_t, 1))
    return top, total, lost, total_t, lost_t, weighted, plain, zy


@triton.jit
def add_halves(
    z, cols, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t, weighted, plain, zy,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, KL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """add_columns of the left half of z, then of the right one: `cols` are those of the left."""
    left, right = halves(z)
    m, total, lost, total_t, lost_t, weighted, plain, zy = add_columns(
        left, cols, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t, weighted, plain, zy,
        HAS_BIAS, SOFTCAP, SMOOTHING, KL, FAST,
    )  # fmt: skip
    return add_columns(
        right, cols + z.shape[1] // 2, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t,
        weighted, plain, zy, HAS_BIAS, SOFTCAP, SMOOTHING, KL, FAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "share"])
def token_stats_kernel(
    h,  # (N, D); or their products with w (N, V) float32, STORED
    w,  # (V, D)
    bias,  # (V,)
    y,  # (N,) int64, negative: skipped
    out,  # (6, splits, N) float32
    N,
    V,
    D,
    stride_h,
    stride_w,
    inv_t,
    softcap,
    share,  # tiles of vocabulary rows per split
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    KL: tl.constexpr,
    STORED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid token tiles x splits, in the order of tile_of."""
    n_splits = tl.cdiv(tl.cdiv(V, BLOCK_V), share)
    tile, split = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), n_splits)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(y + n, mask=n < N, other=-1)
    valid = target >= 0
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total, total_t, weighted, plain, zy = m * 0.0, m * 0.0, m * 0.0, m * 0.0, m * 0.0
    lost, lost_t = m * 0.0, m * 0.0
    begin = split * share * BLOCK_V
    end = tl.minimum(begin + share.to(tl.int64) * BLOCK_V, V)
    for v in range(begin, end, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        special = (tl.max(((target >= v) & (target < v + BLOCK_V)).to(tl.int32), 0) != 0) | (v + BLOCK_V > end)
        if STORED:
            z = stored_tile(h, n, valid, stride_h, cols)
            m, total, lost, total_t, lost_t, weighted, plain, zy = add_columns(
                z, cols, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t, weighted, plain,
                zy, HAS_BIAS, SOFTCAP, SMOOTHING, KL, FAST,
            )  # fmt: skip
        else:
            z = product_tile(h, n, valid, stride_h, w, cols, cols < end, stride_w, D, BLOCK_D, EVEN_D, PRECISION)
            # A quarter of the columns at a time, or the intermediate values would exceed the registers.
            left, right = halves(z)
            part = v + tl.arange(0, BLOCK_V // 4)
            m, total, lost, total_t, lost_t, weighted, plain, zy = add_halves(
                left, part, end, target, special, bias, softcap, inv_t, m, total, lost, total_t, lost_t, weighted,
                plain, zy, HAS_BIAS, SOFTCAP, SMOOTHING, KL, FAST,
            )  # fmt: skip
            m, total, lost, total_t, lost_t, weighted, plain, zy = add_halves(
                right, part + BLOCK_V // 2, end, target, special, bias, softcap, inv_t, m, total, lost, total_t,
                lost_t, weighted, plain, zy, HAS_BIAS, SOFTCAP, SMOOTHING, KL, FAST,
            )  # fmt: skip
    out += split * N + n
    step = n_splits.to(tl.int64) * N
    tl.store(out, m, mask=valid)
    tl.store(out + step, total + lost, mask=valid)
    tl.store(out + 2 * step, total_t + lost_t, mask=valid)
    tl.store(out + 3 * step, weighted, mask=valid)
    if SMOOTHING:
        tl.store(out + 4 * step, plain, mask=valid)
    tl.store(out + 5 * step, zy, mask=valid)


@triton.jit(do_not_specialize=["capacity", "share"])
def target_stats_kernel(
    t,  # (V, D)
    s,  # (capacity, V) float32 similarities, STORED
    ids,  # (capacity,) int64 distinct targets, the first `count` of which are meant
    count,  # () int64
    out,  # (2, splits, capacity) float32
    capacity,
    V,
    D,
    stride_t,
    stride_s,
    inv_t,
    share,
    STORED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid tiles of distinct targets x splits; programs beyond the device-side count leave at once."""
    n_splits = tl.cdiv(tl.cdiv(V, BLOCK_V), share)
    tile, split = tile_of(tl.program_id(0), tl.cdiv(capacity, BLOCK_N), n_splits)
    first = tile * BLOCK_N
    n_ids = tl.load(count)
    if first >= n_ids:
        return
    u = first + tl.arange(0, BLOCK_N)
    valid = u < n_ids
    rows = tl.load(ids + u, mask=valid, other=0)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total, lost = m * 0.0, m * 0.0
    begin = split * share * BLOCK_V
    end = tl.minimum(begin + share.to(tl.int64) * BLOCK_V, V)
    for v in range(begin, end, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        if STORED:
            x = stored_tile(s, u, valid, stride_s, cols)
        else:
            x = product_tile(t, rows, valid, stride_t, t, cols, cols < end, stride_t, D, BLOCK_D, EVEN_D, PRECISION)
        if v + BLOCK_V > end:
            x = tl.where((cols < end)[None, :], x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        e = power((x - top[:, None]) * inv_t, FLOOR, FAST)
        if tl.max((valid & (rows >= v) & (rows < v + BLOCK_V)).to(tl.int32), 0) != 0:
            e = tl.where(cols[None, :] == rows[:, None], 0.0, e)
        scale = exp(at_least((m - top) * inv_t, FLOOR))
        total, lost = add(scale * total, scale * lost, tl.sum(e, 1))
        m = top
    out += split * capacity + u
    tl.store(out, m, mask=valid)
    tl.store(out + n_splits.to(tl.int64) * capacity, total + lost, mask=valid)


@triton.jit(do_not_specialize=["N"])
def target_dots_kernel(
    x,  # (., D)
    row_ids,  # (N,) int64 rows of x; without HAS_ROWS row n is meant
    w,  # (V, D)
    ids,  # (N,) int64 rows of w, negative: skipped
    bias,  # (V,)
    out,  # (N,) float64: softcap(x[row_ids] . w[ids] + bias[ids])
    N,
    D,
    stride_x,
    stride_w,
    softcap,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.load(ids + n, mask=n < N, other=-1)
    valid = i >= 0
    row = n
    if HAS_ROWS:
        row = tl.load(row_ids + n, mask=valid, other=0)
    k = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for d in range(0, D, BLOCK_D):
        inside = valid[:, None] & (d + k < D)[None, :]
        a = tl.load(x + row[:, None] * stride_x + (d + k)[None, :], mask=inside, other=0.0)
        b = tl.load(w + i[:, None] * stride_w + (d + k)[None, :], mask=inside, other=0.0)
        total += a.to(tl.float64) * b.to(tl.float64)
    z = tl.sum(total, 1)
    if HAS_BIAS:
        z += tl.load(bias + i, mask=valid, other=0.0).to(tl.float64)
    if SOFTCAP:
        c = tl.zeros((BLOCK_N,), tl.float64) + softcap
        bounded = tl.where(z > 20.0 * c, 20.0 * c, z)  # beyond, tanh is 1 and the exponential may overflow
        z = c * (1.0 - 2.0 / (tl.exp(2.0 * bounded / c) + 1.0))
    tl.store(out + n, z, mask=valid)


@triton.jit(do_not_specialize=["capacity", "n_splits"])
def finish_targets_kernel(
    sums,  # (2, splits, capacity) float32
    selves,  # (capacity,) float64: t[u] . t[u]
    count,  # () int64
    out,  # (3, capacity) float64: m, sum e^((s-m)/tau), the target's share q of it
    capacity,
    n_splits,
    inv_t,
    BLOCK_N: tl.constexpr,
):
    """Merges the splits, in float64."""
    u = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = u < tl.load(count)
    step = n_splits.to(tl.int64) * capacity
    m = tl.load(sums + u, mask=valid, other=0.0).to(tl.float64)
    for i in range(1, n_splits):
        m = tl.maximum(m, tl.load(sums + i * capacity + u, mask=valid, other=0.0).to(tl.float64))
    total = m * 0.0
    for i in range(n_splits):
        part = sums + i * capacity + u
        shift = tl.load(part, mask=valid, other=0.0).to(tl.float64) - m
        total += tl.exp(shift * inv_t) * tl.load(part + step, mask=valid, other=1.0).to(tl.float64)
    own = tl.exp((tl.load(selves + u, mask=valid, other=0.0) - m) * inv_t)
    total += own
    tl.store(out + u, m, mask=valid)
    tl.store(out + capacity + u, total, mask=valid)
    tl.store(out + 2 * capacity.to(tl.int64) + u, own / total, mask=valid)


@triton.jit
def log1p(x):
    """log(1 + x) in float64 for x >= 0."""
    return tl.where(x < 1e-5, x - 0.5 * x * x, tl.log(1.0 + x))


@triton.jit
def divergence(q, x, log_r):
    """(q (expm1(x) - x), q expm1(x)) in float64, from x = log r - log q; where r is much the larger, r itself."""
    near = tl.where(x < 1.0, x, 0.0)
    small = tl.where(tl.abs(near) < 1e-2, near, 0.0)
    series = small * small * (1 / 2 + small * (1 / 6 + small * (1 / 24 + small * (1 / 120 + small * (1 / 720)))))
    excess = tl.where(tl.abs(near) < 1e-2, series, tl.exp(near) - 1.0 - near)
    r_minus_q = tl.where(x < 1.0, q * (excess + near), tl.exp(log_r) - q)
    return tl.where(x < 1.0, q * excess, r_minus_q - tl.where(q > 0, q * x, 0.0)), r_minus_q


@triton.jit(do_not_specialize=["N", "V", "capacity", "n_splits"])
def finish_tokens_kernel(
    sums,  # (6, splits, N) float32
    y,  # (N,) int64
    which,  # (N,) int64 place of a token's target among the distinct ones
    targets,  # (3, capacity) float64 of finish_targets_kernel
    zys,  # (N,) float64 logits at the targets, and
    selves,  # (capacity,) float64 similarities of the targets to themselves, of target_dots_kernel
    g,  # (N,) float32 upstream weights
    terms,  # (5, N) float32: CE, the target's share of KL, lse, entropy, correct
    rows,  # (13, N) float32, see the stores
    N,
    V,
    capacity,
    n_splits,
    inv_t,
    alpha,
    smoothing,
    z_loss,
    KL: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Closes the sums over each row, as finish_token in csrc/row_math.h; all of it in float64."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = tl.load(y + n, mask=n < N, other=-1) >= 0
    step = n_splits.to(tl.int64) * N
    m = tl.load(sums + n, mask=valid, other=0.0).to(tl.float64)
    for i in range(1, n_splits):
        m = tl.maximum(m, tl.load(sums + i * N + n, mask=valid, other=0.0).to(tl.float64))
    others, others_t, weighted, plain, zy = m * 0.0, m * 0.0, m * 0.0, m * 0.0, m * 0.0
    for i in range(n_splits):
        part = sums + i * N + n
        shift = tl.load(part, mask=valid, other=0.0).to(tl.float64) - m
        scale = tl.exp(shift)
        share = tl.load(part + step, mask=valid, other=0.0).to(tl.float64)
        others += scale * share
        others_t += tl.exp(shift * inv_t) * tl.load(part + 2 * step, mask=valid, other=0.0).to(tl.float64)
        share_weighted = tl.load(part + 3 * step, mask=valid, other=0.0).to(tl.float64) + shift * share
        weighted += tl.where(scale > 0, scale * share_weighted, 0.0)
        if SMOOTHING:
            plain += tl.load(part + 4 * step, mask=valid, other=0.0).to(tl.float64)
        zy += tl.load(part + 5 * step, mask=valid, other=0.0).to(tl.float64)

    # Take the target's column in.
    correct = zy >= m
    top = tl.where(correct, zy, m)
    shift = m - top
    scale = tl.exp(shift)
    weighted = tl.where(scale > 0, scale * (weighted + shift * others), 0.0)
    others = scale * others
    at_y = tl.exp(zy - top)
    total = others + at_y
    log_total = tl.where(correct, log1p(others), tl.log(total))
    lse = top + log_total
    not_y = others / total
    ce = (1.0 - smoothing) * ((top - zy) + log_total) + z_loss * lse * lse
    if SMOOTHING:
        ce += smoothing * (lse - plain / V)
    expected = weighted + tl.where(at_y > 0, at_y * (zy - top), 0.0)
    tl.store(terms + n, ce.to(tl.float32), mask=valid)
    tl.store(terms + 2 * N.to(tl.int64) + n, lse.to(tl.float32), mask=valid)
    tl.store(terms + 3 * N.to(tl.int64) + n, (log_total - expected / total).to(tl.float32), mask=valid)
    tl.store(terms + 4 * N.to(tl.int64) + n, correct.to(tl.float32), mask=valid)

    # For pass 2. A coefficient's rounding would be common to its row and add up in the products with w: two floats.
    weight = tl.load(g + n, mask=valid, other=0.0).to(tl.float64)
    rows += n
    coef_p = weight * (1.0 + 2.0 * z_loss * lse) / total
    high = coef_p.to(tl.float32)
    on_target = (smoothing - not_y) + 2.0 * z_loss * lse * (1.0 - not_y) - smoothing / V
    tl.store(rows, top.to(tl.float32), mask=valid)
    tl.store(rows + N, high, mask=valid)
    tl.store(rows + 2 * N.to(tl.int64), (coef_p - high.to(tl.float64)).to(tl.float32), mask=valid)
    tl.store(rows + 3 * N.to(tl.int64), (weight * smoothing / V).to(tl.float32), mask=valid)
    if KL:
        u = tl.load(which + n, mask=valid, other=0)
        ms = tl.load(targets + u, mask=valid, other=0.0)
        sum_s = tl.load(targets + capacity + u, mask=valid, other=1.0)
        q = tl.load(targets + 2 * capacity.to(tl.int64) + u, mask=valid, other=0.0)
        zy = tl.load(zys + n, mask=valid, other=0.0)
        # The maxima stay numbers that the tiles hold, so that they cancel there.
        total_t = tl.exp(shift * inv_t) * others_t + tl.exp((zy - top) * inv_t)
        log_total_t = tl.log(total_t)
        offset = tl.log(sum_s) - log_total_t
        high = offset.to(tl.float32)
        x = ((zy - tl.load(selves + u, mask=valid, other=0.0)) - (top - ms)) * inv_t + offset
        share, r_minus_q = divergence(q, x, (zy - top) * inv_t - log_total_t)
        on_target += r_minus_q * alpha * inv_t
        tl.store(terms + N + n, share.to(tl.float32), mask=valid)
        tl.store(rows + 5 * N.to(tl.int64), (weight * alpha * inv_t).to(tl.float32), mask=valid)
        tl.store(rows + 6 * N.to(tl.int64), (top - ms).to(tl.float32), mask=valid)
        tl.store(rows + 7 * N.to(tl.int64), high, mask=valid)
        tl.store(rows + 8 * N.to(tl.int64), (offset - high.to(tl.float64)).to(tl.float32), mask=valid)
        tl.store(rows + 9 * N.to(tl.int64), (1.0 / total_t).to(tl.float32), mask=valid)
        tl.store(rows + 10 * N.to(tl.int64), ms.to(tl.float32), mask=valid)
        tl.store(rows + 11 * N.to(tl.int64), (1.0 / sum_s).to(tl.float32), mask=valid)
        tl.store(rows + 12 * N.to(tl.int64), x.to(tl.float32), mask=valid)
    tl.store(rows + 4 * N.to(tl.int64), (weight * on_target).to(tl.float32), mask=valid)


def _dots(x: Tensor, rows: Tensor | None, w: Tensor, ids: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """softcap(x[rows] . w[ids] + bias[ids]), (N,) float64; of no meaning where ids (N,) is negative."""
    n = len(ids)
    out = x.new_empty(n, dtype=torch.float64)
    target_dots_kernel[(cdiv(n, DOT_TILE[0]),)](
        x, ids if rows is None else rows, w, ids, w if bias is None else bias, out, n, x.shape[1], x.stride(0),
        w.stride(0), softcap, HAS_ROWS=rows is not None, HAS_BIAS=bias is not None, SOFTCAP=softcap != 0,
        BLOCK_N=DOT_TILE[0], BLOCK_D=DOT_TILE[1],
    )  # fmt: skip
    return out


class TargetStats(NamedTuple):
    """Of the similarity rows of the distinct targets."""

    sums: Tensor  # (3, capacity) float64 of finish_targets_kernel
    selves: Tensor  # (capacity,) float64: t[u] . t[u]


def target_stats(t: Tensor, targets: Targets, inv_t: float, s: Tensor | None = None) -> TargetStats:
    """Statistics of the rows t[ids] t^T, t (V, D), which `s` (capacity, V) float32 may hold."""
    tile, constants = launch(t, "similarity", stored=s is not None)
    row_tiles = cdiv(targets.capacity, tile.rows)
    # On natural text a quarter of the tokens' targets are distinct; the other programs leave at once.
    n_splits, share = splits(cdiv(row_tiles, 4), len(t), tile, t.device)
    sums = t.new_empty(TARGET_SUMS, n_splits, targets.capacity, dtype=torch.float32)
    out = t.new_empty(TARGET_VALUES, targets.capacity, dtype=torch.float64)
    selves = _dots(t, targets.ids, t, targets.ids, None, 0.0)
    target_stats_kernel[(row_tiles * n_splits,)](
        t, sums if s is None else s, targets.ids, targets.count, sums, targets.capacity, *t.shape, t.stride(0),
        0 if s is None else s.stride(0), inv_t, share, STORED=s is not None, FAST=fast(t),
        **constants,
    )  # fmt: skip
    finish_targets_kernel[(cdiv(targets.capacity, SMALL_ROWS),)](
        sums, selves, targets.count, out, targets.capacity, n_splits, inv_t, BLOCK_N=SMALL_ROWS
    )
    return TargetStats(out, selves)


def token_stats(
    p: Problem,
    g: Tensor,
    targets: Targets,
    target_stats: TargetStats | None,
    inv_t: float,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Terms (5, N), of KL the target's share, and `rows` (13, N) for pass 2, both float32; g (N,) float32 weights.

    `z` (N, V) float32 may hold the products h w^T.
    """
    o, (n, d), v = p.options, p.h.shape, len(p.w)
    tile, constants = launch(p.h, "statistics", stored=z is not None, whole=o.softcap != 0)
    row_tiles = cdiv(n, tile.rows)
    n_splits, share = splits(row_tiles, v, tile, p.h.device)
    sums = p.h.new_empty(TOKEN_SUMS, n_splits, n, dtype=torch.float32)
    terms = p.h.new_zeros(5, n, dtype=torch.float32)
    rows = p.h.new_empty(ROW_VALUES, n, dtype=torch.float32)
    kl = target_stats is not None
    x = p.h if z is None else z
    token_stats_kernel[(row_tiles * n_splits,)](
        x, p.w, p.w if p.b is None else p.b, p.y, sums, n, v, d, x.stride(0), p.w.stride(0), inv_t, o.softcap, share,
        HAS_BIAS=p.b is not None, SOFTCAP=o.softcap != 0, SMOOTHING=o.label_smoothing != 0, KL=kl,
        STORED=z is not None, FAST=fast(p.h), **constants,
    )  # fmt: skip
    some = sums  # in the place of what is not there
    zys = some if target_stats is None else _dots(p.h, None, p.w, p.y, p.b, o.softcap)
    target_sums, selves = (some, some) if target_stats is None else target_stats
    finish_tokens_kernel[(cdiv(n, SMALL_ROWS),)](
        sums, p.y, targets.which, target_sums, zys, selves, g, terms, rows, n, v, targets.capacity, n_splits, inv_t,
        o.alpha, o.label_smoothing, o.z_loss, KL=kl, SMOOTHING=o.label_smoothing != 0, BLOCK_N=SMALL_ROWS,
    )  # fmt: skip
    return terms, rows
