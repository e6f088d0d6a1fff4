"""The specification: the tied-embedding CE + KL loss and its hand-written gradient, materialising freely.

This is the one home of the formulas; every other implementation is checked against this file run in float64, and this
file is checked against automatic differentiation of an independent expression. Source: Inan, Khosravi, Socher (2017),
arXiv 1611.01462, equations 3.1-3.5, extended by label smoothing, z-loss, softcap, a bias and per-token weights.

    z  = h w^T + b, softcapped             l1 = lse(z)    lt = lse(z/tau)    p = exp(z - l1)    r = exp(z/tau - lt)
    s  = t[y] t^T / tau                    ls = lse(s)    q  = exp(s - ls)
    d  = (s - z/tau) - (ls - lt)           which is log q - log r
    CE = (1-eps)(l1 - z_y) + eps (l1 - mean z) + lam l1^2
    KL = sum_v q (d + expm1(-d))           equal to sum_v q d because sum r = sum q; every summand is >= 0
    G  = p (1 + 2 lam l1) - (1-eps) onehot(y) - eps/V + (alpha/tau)(r - q)     with r - q = q expm1(-d)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Grads, Needs, Problem, Terms

# Beyond |d| of this take r - q as it is: nothing cancels any more, expm1(-d) would carry q's relative error into a
# larger r, and may overflow where q underflows.
DELTA_DIRECT = 1.0


def logits(p: Problem) -> Tensor:
    """Tied logits z (N, V) = h w^T + b, softcapped to c tanh(z / c)."""
    z = p.h @ p.w.T
    if p.b is not None:
        z = z + p.b
    if p.options.softcap:
        z = p.options.softcap * torch.tanh(z / p.options.softcap)
    return z


class Divergence(NamedTuple):
    """What the two tempered distributions give, each (N, V)."""

    q: Tensor  # similarity target
    delta: Tensor  # log q - log r
    excess: Tensor  # q (delta + expm1(-delta)) >= 0; its row sum is KL
    r_minus_q: Tensor  # q expm1(-delta)


class RowSum(NamedTuple):
    """A log-sum-exp before its logarithm: lse = top + log(total), each (N, 1)."""

    top: Tensor
    total: Tensor  # sum exp(x - top)


def row_sum(x: Tensor) -> RowSum:
    """Maximum and sum of the rows of x (N, V)."""
    top = x.amax(-1, keepdim=True)
    return RowSum(top, torch.exp(x - top).sum(-1, keepdim=True))


def lse_difference(sums: RowSum, sums_t: RowSum) -> tuple[Tensor, Tensor]:
    """ls - lt in two parts, to be subtracted from s - zt in this order.

    Where both rows have the same dominant column, s - zt and the first part are rounded alike there and cancel; the
    rest would be an error common to the row, and that reaches the gradient.
    """
    return sums.top - sums_t.top, torch.log(sums.total) - torch.log(sums_t.total)


def divergence(s: Tensor, zt: Tensor, sums: RowSum, sums_t: RowSum) -> Divergence:
    """Compare softmax(s) with softmax(zt), both (N, V), given what their rows add up to; columns may be any subset.

    delta subtracts the small difference s - zt first; an error in a log-sum-exp then enters KL to second order only.
    q and r are quotients: exp(s - ls) would share the rounding of a large ls among all its columns.
    """
    tops, logs = lse_difference(sums, sums_t)
    delta = (s - zt) - tops - logs
    q, r = torch.exp(s - sums.top) / sums.total, torch.exp(zt - sums_t.top) / sums_t.total
    near = delta.abs() < DELTA_DIRECT
    x = torch.where(near, -delta, 0.0)
    r_minus_q = torch.where(near, q * torch.expm1(x), r - q)
    q_delta = torch.where(q > 0, q * delta, 0.0)  # 0 * inf where z is -inf
    excess = torch.where(near, q * (torch.expm1(x) - x), q_delta + r_minus_q)
    return Divergence(q, delta, excess, r_minus_q)


def forward(p: Problem) -> Terms:
    """Per-token CE, KL, lse, entropy and correctness of `p`, each (N,)."""
    return _terms(p)[0]


def _terms(p: Problem) -> tuple[Terms, Tensor, Tensor, Tensor, Divergence | None]:
    o, valid = p.options, p.y >= 0
    y = p.y.clamp(min=0)
    z = logits(p)
    # The target's column is summed apart: l1 - z_y and 1 - p_y stay exact where p_y is nearly one.
    zy, top = z.gather(-1, y[:, None])[:, 0], z.amax(-1)
    others = torch.exp(z.scatter(-1, y[:, None], -torch.inf) - top[:, None]).sum(-1)
    total = others + torch.exp(zy - top)
    l1 = top + torch.log(total)
    below = torch.where(zy >= top, torch.log1p(others), (top - zy) + torch.log(total))  # l1 - z_y
    ce = (1 - o.label_smoothing) * below + o.z_loss * l1**2
    if o.label_smoothing:
        ce = ce + o.label_smoothing * (l1 - z.mean(-1))
    prob = torch.exp(z - top[:, None]) / total[:, None]
    entropy = -torch.where(prob > 0, prob * (z - l1[:, None]), 0.0).sum(-1)
    correct = (zy >= top).to(z.dtype)
    kl, div = torch.zeros_like(ce), None
    if o.alpha:
        t = p.teacher
        s, zt = (t[y] @ t.T) / o.temperature, z / o.temperature
        div = divergence(s, zt, row_sum(s), row_sum(zt))
        kl = div.excess.sum(-1)
    masked = [torch.where(valid, term, 0.0) for term in (ce, kl, l1, entropy, correct)]
    return Terms(*masked), z, others / total, prob, div


def backward(p: Problem, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Terms of `p`, and the gradients of sum_n g_n (CE_n + alpha KL_n); g (N,) is zero for skipped tokens."""
    o, valid = p.options, p.y >= 0
    y = p.y.clamp(min=0)
    terms, z, not_y, prob, div = _terms(p)
    grow = 2 * o.z_loss * terms.lse
    at_y = (o.label_smoothing - not_y) + grow * (1 - not_y)  # p_y (1 + 2 lam l1) - (1 - eps)
    grad = (prob * (1 + grow[:, None])).scatter(1, y[:, None], at_y[:, None]) - o.label_smoothing / z.shape[1]
    if div is not None:
        grad = grad + (o.alpha / o.temperature) * div.r_minus_q
    if o.softcap:
        grad = grad * (1 - (z / o.softcap) ** 2)
    g = torch.where(valid, g, 0.0)
    grad = torch.where(valid[:, None], g[:, None] * grad, 0.0)

    d_h = grad @ p.w if needs.h else None
    d_w = grad.T @ p.h if needs.w else None
    d_b = grad.sum(0) if needs.b else None
    d_t = None
    if o.target_grad and div is not None and (needs.t if p.t is not None else needs.w):
        # From the delta at q's peak: where q is large, and roundings count, the differences are small then.
        delta = torch.where(div.q > 0, div.delta - div.delta.gather(-1, div.q.argmax(-1, keepdim=True)), 0.0)
        mean = (div.q * delta).sum(-1, keepdim=True)  # KL, but from the same deltas: the row then sums to zero
        d_s = (o.alpha / o.temperature) * div.q * (delta - mean)
        d_s = torch.where(valid[:, None], g[:, None] * d_s, 0.0)
        t = p.teacher
        d_t = d_s.T @ t[y]
        d_t.index_add_(0, y, d_s @ t)
        if p.t is None:
            d_w, d_t = (d_t if d_w is None else d_w + d_t), None
    elif needs.t and p.t is not None:
        d_t = torch.zeros_like(p.t)
    return terms, Grads(d_h, d_w, d_b, d_t)
