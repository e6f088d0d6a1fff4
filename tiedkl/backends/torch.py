"""The blocked walk in plain PyTorch: any device, no compiler, scratch within the plan. The fallback everywhere.

Reference: tiedkl/reference.py, whose divergence is used as it is. The walk is that of csrc/driver.cpp. As there, the
target's column is kept out of the sums, so that 1 - p_y and l1 - z_y do not cancel when p_y is near one.

The targets are copied to the host once, to sort them; on a GPU that is one synchronisation per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan, Tuning
from ..problem import Grads, Needs, Problem, Terms
from ..reference import DELTA_DIRECT, RowSum, divergence, lse_difference

TUNING = Tuning(
    z_buffers=11,
    s_buffers=1,
    row_buffers=0,
    token_block=1024,
    min_token_block=32,  # products of fewer rows are slow, and less accurate
    min_vocab_block=512,
    panel=1 << 62,
    block_bytes=16 << 20,
)
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplication permutes the int64s


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Every device and floating dtype is supported."""
    return None


def tuning(dtype: torch.dtype) -> Tuning:
    """The same for every dtype."""
    return TUNING


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs (2 + 2 rho in vocabulary blocks)."""
    return _Walk(problem, plan, None, Needs()).run()[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in one walk."""
    return _Walk(problem, plan, g, needs).run()


@dataclass
class _Block:
    """Tokens of one block, adjacent when they share a target, and what their rows need."""

    tokens: Tensor  # (C,) positions in the problem
    targets: Tensor  # (Cw,) distinct ids
    which: Tensor  # (C,) row of `targets` of each token
    y: Tensor  # (C,)
    h: Tensor  # (C, D)
    u: Tensor  # (Cw, D')
    g: Tensor | None  # (C, 1)


def blocks(problem: Problem, plan: Plan, g: Tensor | None) -> Iterator[_Block]:
    """Valid tokens grouped by target, cut at C tokens or Cw distinct targets.

    Groups come in an order unrelated to frequency, so that every block holds about the same number of distinct targets.
    """
    device, acc = problem.h.device, problem.acc
    y = problem.y.cpu()
    order = torch.argsort(y * GOLDEN, stable=True)
    order = order[y[order] >= 0]
    y = y[order]
    new = torch.ones_like(y)
    new[1:] = y[1:] != y[:-1]
    rank = (new.cumsum(0) - 1).tolist()  # index of each token's target among the distinct ones
    first = 0
    while first < len(rank):
        last = min(first + plan.token_block, len(rank))
        while rank[last - 1] - rank[first] >= plan.target_block:
            last -= 1
        part = slice(first, last)
        ids, which = torch.unique_consecutive(y[part], return_inverse=True)
        tokens, targets = order[part].to(device), ids.to(device)
        yield _Block(
            tokens=tokens,
            targets=targets,
            which=which.to(device),
            y=y[part].to(device),
            h=problem.h[tokens].to(acc),
            u=problem.teacher[targets].to(acc),
            g=None if g is None else g[tokens, None],
        )
        first = last


class _Walk:
    def __init__(self, p: Problem, plan: Plan, g: Tensor | None, needs: Needs):
        self.p, self.plan, self.g, self.needs, self.o = p, plan, g, needs, p.options
        self.target_grad = g is not None and bool(p.options.alpha) and p.options.target_grad
        self.target_grad &= needs.w if p.t is None else needs.t
        self.terms = p.h.new_zeros(5, p.h.shape[0], dtype=p.acc)
        shapes = {"h": p.h, "w": p.w, "b": p.b, "t": p.t}
        self.d = {
            k: x.new_zeros(x.shape, dtype=p.acc) for k, x in shapes.items() if x is not None and getattr(needs, k)
        }

    def run(self) -> tuple[Terms, Grads]:
        for block in blocks(self.p, self.plan, self.g):
            self.block(block)
        return Terms(*self.terms.unbind(0)), Grads(*(self.d.get(k) for k in "hwbt"))

    def tiles(self, block: _Block) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Columns, logits (C, B) and distinct similarity rows (Cw, B), one vocabulary block after another."""
        p, o = self.p, self.o
        for v in range(0, p.w.shape[0], self.plan.vocab_block):
            columns = slice(v, v + self.plan.vocab_block)
            z = block.h @ p.w[columns].to(p.acc).T
            if p.b is not None:
                z += p.b[columns]
            if o.softcap:
                z.div_(o.softcap).tanh_().mul_(o.softcap)
            s = (block.u @ p.teacher[columns].to(p.acc).T).div_(o.temperature) if o.alpha else None
            yield columns, z, s

    def block(self, block: _Block) -> None:
        p, o = self.p, self.o
        tiles = list(self.tiles(block)) if self.plan.vocab_block >= p.w.shape[0] else None
        rows = _Rows(block, p)
        for columns, z, s in tiles or self.tiles(block):
            rows.add(columns, z, s)
        rows.finish()
        # The target gradient needs each token's KL before its first column is written, as does a loss without gradient.
        if o.alpha and (self.g is None or self.target_grad):
            for _, z, s in tiles or self.tiles(block):
                assert s is not None
                rows.kl += rows.divergence(z, s)[0]
                if self.target_grad:
                    q = rows.target(s)
                    rows.mean_delta += torch.where(q > 0, q * rows.delta(z, s), 0.0).sum(-1)
        if self.g is not None:
            for columns, z, s in tiles or self.tiles(block):
                self.gradients(block, rows, columns, z, s)
        self.terms[:, block.tokens] = torch.stack([rows.ce, rows.kl, rows.l1, rows.entropy, rows.correct])

    def gradients(self, block: _Block, rows: _Rows, columns: slice, z: Tensor, s: Tensor | None) -> None:
        """Add one vocabulary block's share of every gradient; z is overwritten."""
        p, o, d = self.p, self.o, self.d
        assert block.g is not None
        share = None
        if s is not None:
            if self.target_grad:
                self.target_gradients(block, rows, columns, rows.target(s), rows.delta(z, s))
            kl, share = rows.divergence(z, s)
            if not self.target_grad:
                rows.kl += kl
            share.mul_(o.alpha / o.temperature)
        cap = 1 - (z / o.softcap) ** 2 if o.softcap else None
        grad = rows.cross_entropy_gradient(z, columns)
        if share is not None:
            grad += share
        if cap is not None:
            grad *= cap
        grad *= block.g
        if "h" in d:
            d["h"][block.tokens] += grad @ p.w[columns].to(p.acc)
        if "w" in d:
            d["w"][columns].addmm_(grad.T, block.h)
        if "b" in d:
            d["b"][columns] += grad.sum(0)

    def target_gradients(self, block: _Block, rows: _Rows, columns: slice, q: Tensor, delta: Tensor) -> None:
        """d KL / d s per distinct target, through s = t[u] t^T / tau."""
        p, o = self.p, self.o
        assert block.g is not None
        per_token = torch.where(q > 0, q * (delta - rows.mean_delta[:, None]), 0.0).mul_(
            block.g * (o.alpha / o.temperature)
        )
        per_target = q.new_zeros(len(block.targets), q.shape[1]).index_add_(0, block.which, per_token)
        d_t = self.d["w" if p.t is None else "t"]
        d_t[columns].addmm_(per_target.T, block.u)
        d_t.index_add_(0, block.targets, per_target @ p.teacher[columns].to(p.acc))


class _Rows:
    """Statistics of a block's rows over all columns but the target's, merged over vocabulary blocks; each (C,)."""

    def __init__(self, block: _Block, p: Problem):
        self.block, self.p, self.o = block, p, p.options
        lowest = torch.finfo(p.acc).min
        self.m = block.h.new_full((len(block.tokens),), lowest)
        self.sum, self.sum_t, self.weighted, self.total, self.zy, self.kl, self.z_peak, self.mean_delta = (
            self.m.new_zeros(8, len(self.m)).unbind(0)
        )  # mean_delta: of `delta` itself, for the target gradient to sum to zero
        self.ms = block.h.new_full((len(block.targets),), lowest)
        self.sum_s = torch.zeros_like(self.ms)

    def at_target(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Rows whose target lies in `columns`, and its place there."""
        local = self.block.y - columns.start
        rows = ((local >= 0) & (local < columns.stop - columns.start)).nonzero()[:, 0]
        return rows, local[rows]

    def add(self, columns: slice, z: Tensor, s: Tensor | None) -> None:
        """Merge one vocabulary block; z is unchanged on return."""
        o = self.o
        rows, place = self.at_target(columns)
        if o.label_smoothing:
            self.total += z.sum(-1)
        if s is not None:
            ms, peak = s.max(-1)
            higher, which = ms > self.ms, self.block.which
            self.z_peak = torch.where(higher[which], z.gather(-1, peak[which, None])[:, 0], self.z_peak)
        zy = z[rows, place]
        self.zy[rows] = zy
        z[rows, place] = torch.finfo(z.dtype).min
        m = torch.maximum(self.m, z.amax(-1))
        shift = self.m - m
        scale = shift.exp()
        self.weighted = torch.where(scale > 0, scale * (self.weighted + shift * self.sum), 0.0)
        self.sum *= scale
        self.sum_t *= torch.exp(shift / o.temperature)
        self.m = m
        d = z - m[:, None]
        if self.p.b is not None:
            d.clamp_(min=torch.finfo(z.dtype).min / 4)  # a logit of -inf weighs nothing
        e = d.exp()
        self.sum += e.sum(-1)
        self.weighted += torch.linalg.vecdot(e, d)
        if s is not None:
            self.sum_t += d.div_(o.temperature).exp_().sum(-1)
            ms = torch.maximum(self.ms, ms)
            self.sum_s = self.sum_s * torch.exp(self.ms - ms) + torch.exp(s - ms[:, None]).sum(-1)
            self.ms = ms
        z[rows, place] = zy

    def finish(self) -> None:
        """Close the sums: CE, entropy, log-sum-exps. Mirrors finish_token in csrc/row_math.h."""
        o, v = self.o, self.p.w.shape[0]
        self.correct = (self.zy >= self.m).to(self.m.dtype)
        top = torch.maximum(self.m, self.zy)
        shift = self.m - top
        scale, at_y = shift.exp(), (self.zy - top).exp()
        others = self.sum * scale
        weighted = torch.where(scale > 0, scale * (self.weighted + shift * self.sum), 0.0)
        log_sum = torch.where(self.correct > 0, torch.log1p(others), torch.log(others + at_y))
        self.top, self.sum_all, self.not_target = top, others + at_y, others / (others + at_y)
        self.l1 = top + log_sum
        self.ce = (1 - o.label_smoothing) * ((top - self.zy) + log_sum) + o.z_loss * self.l1**2
        if o.label_smoothing:
            self.ce += o.label_smoothing * (self.l1 - self.total / v)
        expected = weighted + torch.where(at_y > 0, at_y * (self.zy - top), 0.0)
        self.entropy = log_sum - expected / self.sum_all
        sum_t = self.sum_t * torch.exp(shift / o.temperature) + torch.exp((self.zy - top) / o.temperature)
        which = self.block.which
        self.sums = RowSum(self.ms[which, None], self.sum_s[which, None])
        self.sums_t = RowSum((top / o.temperature)[:, None], sum_t[:, None])
        self.tops, self.logs = lse_difference(self.sums, self.sums_t)

    def target(self, s: Tensor) -> Tensor:
        """Target distribution q of every token, (C, B); computed once per distinct target."""
        return torch.exp(s - self.ms[:, None]).div_(self.sum_s[:, None])[self.block.which]

    def log_ratio(self, z: Tensor, s: Tensor) -> Tensor:
        """log r - log q of one vocabulary block, (C, B); the small difference of the logits first."""
        return (z / self.o.temperature).sub_(s[self.block.which]).add_(self.tops).add_(self.logs)

    def delta(self, z: Tensor, s: Tensor) -> Tensor:
        """log q - log r of one vocabulary block, (C, B), less its value at q's peak, as in tiedkl/reference.py."""
        at_peak = ((self.z_peak / self.o.temperature) - self.sums.top[:, 0])[:, None] + self.tops + self.logs
        return self.log_ratio(z, s).neg_().add_(at_peak)

    def divergence(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The block's share of KL (C,), and r - q (C, B)."""
        x = self.log_ratio(z, s)
        if x.device.type != "cpu" or not bool(x.abs().amax() < DELTA_DIRECT if x.numel() else True):
            div = divergence(s[self.block.which], z / self.o.temperature, self.sums, self.sums_t)
            return div.excess.sum(-1), div.r_minus_q
        q = self.target(s)  # the same formula where no log ratio is large, in fewer passes
        e = torch.expm1(x)
        kl = torch.linalg.vecdot(q, x.neg_().add_(e))
        return kl, q.mul_(e)

    def cross_entropy_gradient(self, z: Tensor, columns: slice) -> Tensor:
        """p (1 + 2 lam l1) - (1-eps) onehot - eps/V for one vocabulary block, over z."""
        o, v = self.o, self.p.w.shape[0]
        # Quotients: a reciprocal's rounding would be an error common to the row, and add up in the products with w.
        grad = z.sub_(self.top[:, None]).exp_().div_(self.sum_all[:, None])
        if o.z_loss:
            grad *= (1 + 2 * o.z_loss * self.l1)[:, None]
        if o.label_smoothing:
            grad -= o.label_smoothing / v
        rows, place = self.at_target(columns)
        at_y = (o.label_smoothing - self.not_target) + 2 * o.z_loss * self.l1 * (1 - self.not_target)
        grad[rows, place] = (at_y - o.label_smoothing / v)[rows]
        return grad
