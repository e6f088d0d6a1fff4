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

DELTA_DIRECT = 40.0  # beyond |d| of this, expm1(-d) may overflow where q underflows: use r - q itself


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


def divergence(s: Tensor, zt: Tensor, ls: Tensor, lt: Tensor) -> Divergence:
    """Compare softmax(s) with softmax(zt), both (N, V), given their log-sum-exps (N, 1); columns may be any subset.

    delta subtracts the small difference s - zt first; an error in a log-sum-exp then enters KL to second order only.
    """
    delta = (s - zt) - (ls - lt)
    q, r = torch.exp(s - ls), torch.exp(zt - lt)
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
    l1 = z.logsumexp(-1)
    zy = z.gather(-1, y[:, None])[:, 0]
    ce = (1 - o.label_smoothing) * (l1 - zy) + o.z_loss * l1**2
    if o.label_smoothing:
        ce = ce + o.label_smoothing * (l1 - z.mean(-1))
    prob = torch.exp(z - l1[:, None])
    entropy = -torch.where(prob > 0, prob * (z - l1[:, None]), 0.0).sum(-1)
    correct = (zy >= z.amax(-1)).to(z.dtype)
    kl, div = torch.zeros_like(ce), None
    if o.alpha:
        t = p.teacher
        s, zt = (t[y] @ t.T) / o.temperature, z / o.temperature
        div = divergence(s, zt, s.logsumexp(-1, keepdim=True), zt.logsumexp(-1, keepdim=True))
        kl = div.excess.sum(-1)
    masked = [torch.where(valid, term, 0.0) for term in (ce, kl, l1, entropy, correct)]
    return Terms(*masked), z, l1, prob, div


def backward(p: Problem, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Terms of `p`, and the gradients of sum_n g_n (CE_n + alpha KL_n); g (N,) is zero for skipped tokens."""
    o, valid = p.options, p.y >= 0
    y = p.y.clamp(min=0)
    terms, z, l1, prob, div = _terms(p)
    n_vocab = z.shape[1]
    grad = prob * (1 + 2 * o.z_loss * l1[:, None]) - o.label_smoothing / n_vocab
    grad.scatter_add_(1, y[:, None], torch.full_like(l1, -(1 - o.label_smoothing))[:, None])
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
        d_s = (o.alpha / o.temperature) * div.q * (div.delta - terms.kl[:, None])
        d_s = torch.where(valid[:, None], g[:, None] * torch.where(div.q > 0, d_s, 0.0), 0.0)
        t = p.teacher
        d_t = d_s.T @ t[y]
        d_t.index_add_(0, y, d_s @ t)
        if p.t is None:
            d_w, d_t = (d_t if d_w is None else d_w + d_t), None
    elif needs.t and p.t is not None:
        d_t = torch.zeros_like(p.t)
    return terms, Grads(d_h, d_w, d_b, d_t)
