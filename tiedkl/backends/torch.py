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
from ..reference import DELTA_DIRECT, RowSum, divergence

TUNING = Tuning(
    z_buffers=11,
    s_buffers=1,
    row_buffers=0,
    token_block=1024,
    min_token_block=32,  # products of fewer rows are slow, and less accurate
    min_vocab_block=512,
    panel=1 << 62,
    targets_per_token=1.0,  # rows of similarities are cheap beside the rest, and no block ends early
    block_bytes=16 << 20,
)
SMALL = {torch.float32: 1 / 16, torch.float64: 0.0}  # float64 has digits to spare
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplication permutes the int64s


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Every device and floating dtype is supported."""
    return None


def tuning(dtype: torch.dtype, device: torch.device) -> Tuning:
    """The same for every dtype and device."""
    return TUNING


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs (2 + 2 rho in vocabulary blocks)."""
    return Walk(problem, plan).run(None, Needs())[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in one walk."""
    return Walk(problem, plan).run(g, needs)


@dataclass
class Block:
    """Tokens of one block, adjacent when they share a target, and what their rows need."""

    tokens: Tensor  # (C,) positions in the problem
    targets: Tensor  # (Cw,) distinct ids
    which: Tensor  # (C,) row of `targets` of each token
    y: Tensor  # (C,)
    h: Tensor  # (C, D)
    u: Tensor  # (Cw, D')
    g: Tensor | None  # (C, 1)
    zy: Tensor | None  # (C,) wide: logits at the targets; both only with KL
    self_s: Tensor | None  # (Cw,) wide: similarities of the targets to themselves


def blocks(problem: Problem, plan: Plan, g: Tensor | None) -> Iterator[Block]:
    """Valid tokens grouped by target, cut at C tokens or Cw distinct targets.

    Groups come in an order unrelated to frequency, so that every block holds about the same number of distinct targets.
    """
    device, acc = problem.h.device, problem.acc
    order, y, rank = group_by_target(problem.y.cpu())
    for part in cut(rank.tolist(), plan):
        ids, which = torch.unique_consecutive(y[part], return_inverse=True)
        tokens, targets = order[part].to(device), ids.to(device)
        here = y[part].to(device)
        h, u = problem.h[tokens].to(acc), problem.teacher[targets].to(acc)
        yield Block(
            tokens=tokens,
            targets=targets,
            which=which.to(device),
            y=here,
            h=h,
            u=u,
            g=None if g is None else g[tokens, None],
            zy=target_logits(problem, h, here) if problem.options.alpha else None,
            self_s=wide_dot(u, targets, problem.teacher) if problem.options.alpha else None,
        )


def group_by_target(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Valid tokens, equal targets adjacent: their positions, targets, and each target's index among the distinct ones.

    All on the host, each (valid,); y (N,) is negative for tokens that are skipped.
    """
    order = torch.argsort(y * GOLDEN, stable=True)
    order = order[y[order] >= 0]
    y = y[order]
    new = torch.ones_like(y)
    new[1:] = y[1:] != y[:-1]
    return order, y, new.cumsum(0) - 1


def cut(rank: list[int], plan: Plan) -> Iterator[slice]:
    """Blocks of at most C tokens and Cw distinct targets; `rank` as `group_by_target` gives it."""
    first = 0
    while first < len(rank):
        last = min(first + plan.token_block, len(rank))
        while rank[last - 1] - rank[first] >= plan.target_block:
            last -= 1
        yield slice(first, last)
        first = last


def wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have


def wide_dot(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """x_i . w[ids_i], (C,) wide, in pieces of about a megabyte; x (C, D), w (V, D)."""
    wide, rows = wide_dtype(x.device), 1 + (1 << 16) // (1 + x.shape[1])
    pairs = zip(x.split(rows), ids.split(rows), strict=True)
    return torch.cat([torch.linalg.vecdot(a.to(wide), w[i].to(wide)) for a, i in pairs])


def target_logits(p: Problem, h: Tensor, y: Tensor) -> Tensor:
    """Logits at the targets, (C,) wide.

    KL depends on their small difference from the targets' similarities to themselves where the prediction is good: from
    two products in the accumulation dtype it would be off by the roundings of both.
    """
    z = wide_dot(h, y, p.w)
    if p.b is not None:
        z = z + p.b[y]
    c = p.options.softcap
    return c * torch.tanh(z / c) if c else z


class Walk:
    def __init__(self, p: Problem, plan: Plan):
        self.p, self.plan, self.o = p, plan, p.options

    def start(self, g: Tensor | None, needs: Needs) -> None:
        """Make room for the results."""
        p, self.g = self.p, g
        self.target_grad = g is not None and bool(p.options.alpha) and p.options.target_grad
        self.target_grad &= needs.w if p.t is None else needs.t
        self.terms = p.h.new_zeros(5, p.h.shape[0], dtype=p.acc)
        shapes = {"h": p.h, "w": p.w, "b": p.b, "t": p.t}
        self.d = {
            k: x.new_zeros(x.shape, dtype=p.acc) for k, x in shapes.items() if x is not None and getattr(needs, k)
        }

    def run(self, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
        self.start(g, needs)
        for block in blocks(self.p, self.plan, self.g):
            self.block(block)
        return Terms(*self.terms.unbind(0)), Grads(*(self.d.get(k) for k in "hwbt"))

    def tiles(self, block: Block) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Columns, logits (C, B) and distinct similarity rows (Cw, B), one vocabulary block after another."""
        p, o = self.p, self.o
        for v in range(0, p.w.shape[0], self.plan.vocab_block):
            columns = slice(v, v + self.plan.vocab_block)
            z = block.h @ p.w[columns].to(p.acc).T
            if p.b is not None:
                z += p.b[columns]
            if o.softcap:
                z.div_(o.softcap).tanh_().mul_(o.softcap)
            s = block.u @ p.teacher[columns].to(p.acc).T if o.alpha else None
            yield columns, z, s

    def block(self, block: Block) -> None:
        p, o = self.p, self.o
        tiles = list(self.tiles(block)) if self.plan.vocab_block >= p.w.shape[0] else None
        rows = Rows(block, p, p.w.shape[0])
        for columns, z, s in tiles or self.tiles(block):
            rows.add(columns, z, s)
        rows.finish()
        # The target gradient needs each token's KL before its first column is written, as does a loss without gradient.
        if o.alpha and (self.g is None or self.target_grad):
            for columns, z, s in tiles or self.tiles(block):
                assert s is not None
                rows.kl += rows.divergence(z, s, columns)[0]
                if self.target_grad:
                    q = rows.target(s, columns)
                    rows.mean_delta += torch.where(q > 0, q * rows.delta(z, s, columns), 0.0).sum(-1)
        if self.g is not None:
            for columns, z, s in tiles or self.tiles(block):
                self.gradients(block, rows, columns, z, s)
        terms = (rows.ce, rows.kl, rows.l1, rows.entropy, rows.correct)
        self.terms[:, block.tokens] = torch.stack([x.to(p.acc) for x in terms])

    def gradients(self, block: Block, rows: Rows, columns: slice, z: Tensor, s: Tensor | None) -> None:
        """Add one vocabulary block's share of every gradient; z is overwritten."""
        p, o, d = self.p, self.o, self.d
        assert block.g is not None
        share = None
        if s is not None:
            if self.target_grad:
                self.target_gradients(block, rows, columns, rows.target(s, columns), rows.delta(z, s, columns))
            kl, share = rows.divergence(z, s, columns)
            if not self.target_grad:
                rows.kl += kl
            share.mul_(block.g * (o.alpha / o.temperature))
        cap = 1 - (z / o.softcap) ** 2 if o.softcap else None
        grad = rows.gradient(z, share, columns)
        if cap is not None:
            grad *= cap
        if "h" in d:
            d["h"][block.tokens] += grad @ p.w[columns].to(p.acc)
        if "w" in d:
            d["w"][columns].addmm_(grad.T, block.h)
        if "b" in d:
            d["b"][columns] += grad.sum(0)

    def target_gradients(self, block: Block, rows: Rows, columns: slice, q: Tensor, delta: Tensor) -> None:
        """d KL / d s per distinct target, through s = t[u] t^T / tau."""
        p, o = self.p, self.o
        assert block.g is not None
        per_token = torch.where(q > 0, q * (delta - rows.mean_delta[:, None]), 0.0).mul_(
            block.g * (o.alpha / o.temperature)
        )
        per_target = q.new_zeros(len(block.targets), q.shape[1]).index_add_(0, block.which, per_token)
        d_t = self.d["w" if p.t is None else "t"]
        d_t[columns].addmm_(per_target.T, block.u)
        self.target_rows(block, per_target @ p.teacher[columns].to(p.acc))

    def target_rows(self, block: Block, rows: Tensor) -> None:
        """Add `rows` (Cw, D') to the gradient of the targets' own rows."""
        self.d["w" if self.p.t is None else "t"].index_add_(0, block.targets, rows)


def _inside(ids: Tensor, columns: slice, x: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the block of columns x has column ids_i, and which of x that is, or any; each (C, 1).

    `gather` and `scatter_` at such places do without the count of them, for which the host would wait for a GPU.
    """
    local = (ids - columns.start)[:, None]
    return (local >= 0) & (local < x.shape[1]), local.clamp(0, x.shape[1] - 1)


def _put(x: Tensor, ids: Tensor, columns: slice, values: Tensor | float) -> None:
    """x[i, ids_i] = values_i wherever the block of columns x has column ids_i; values (C,) or one number."""
    inside, place = _inside(ids, columns, x)
    values = values[:, None].to(x.dtype) if isinstance(values, Tensor) else values
    x.scatter_(1, place, torch.where(inside, values, x.gather(1, place)))


def _expm1_excess(x: Tensor) -> Tensor:
    """expm1(x) - x for |x| < DELTA_DIRECT; a series in rows of small x, where the two would cancel."""
    small = x.abs().amax(-1) < SMALL[x.dtype]
    if bool(small.all()):
        return _series(x)
    rows = small.nonzero()[:, 0]
    return torch.expm1(x).sub_(x).index_copy_(0, rows, _series(x[rows]))


def _series(x: Tensor) -> Tensor:
    """expm1(x) - x for |x| < SMALL, but for a relative error of x^4/360."""
    return (x / 120).add_(1 / 24).mul_(x).add_(1 / 6).mul_(x).add_(1 / 2).mul_(x).mul_(x)


class Sums:
    """What rows add up to over the columns seen so far, all but the target's.

    Each (C,) for tokens, or (Cw,) for similarities of the distinct targets: `ms` and `sum_s`.
    """

    def __init__(self, p: Problem, tokens: int, targets: int, dtype: torch.dtype):
        self.o = p.options
        lowest = torch.finfo(p.acc).min
        self.m = p.h.new_full((tokens,), lowest, dtype=dtype)
        self.sum, self.sum_t, self.weighted, self.total, self.zy, self.kl, self.z_peak, self.mean_delta = (
            self.m.new_zeros(8, tokens).unbind(0)
        )  # mean_delta: of `delta` itself, for the target gradient to sum to zero
        self.ms = self.m.new_full((targets,), lowest)
        self.sum_s = torch.zeros_like(self.ms)

    def rebase(self, m: Tensor, ms: Tensor | None) -> None:
        """State the sums relative to other maxima: m (C,) of the logits, ms (Cw,) of the similarities."""
        tau, shift = self.o.temperature, self.m - m
        scale = shift.exp()
        self.weighted = torch.where(scale > 0, scale * (self.weighted + shift * self.sum), 0.0)
        self.sum *= scale
        self.sum_t *= torch.exp(shift / tau)
        self.m = m
        if ms is not None:
            self.sum_s = self.sum_s * torch.exp((self.ms - ms) / tau)
            self.ms = ms


class Rows(Sums):
    """Statistics of a block's rows, merged over vocabulary blocks. `vocab` is V, of which p may hold a part."""

    def __init__(self, block: Block, p: Problem, vocab: int):
        super().__init__(p, len(block.tokens), len(block.targets), p.acc)
        self.p, self.block, self.vocab = p, block, vocab

    def add(self, columns: slice, z: Tensor, s: Tensor | None) -> None:
        """Merge one vocabulary block; z is unchanged on return."""
        o = self.o
        inside, place = _inside(self.block.y, columns, z)
        if o.label_smoothing:
            self.total += z.sum(-1)
        if s is not None:
            ms, peak = s.max(-1)
            higher, which = ms > self.ms, self.block.which
            self.z_peak = torch.where(higher[which], z.gather(-1, peak[which, None])[:, 0], self.z_peak)
        zy = z.gather(1, place)
        self.zy = torch.where(inside, zy, self.zy[:, None])[:, 0]
        z.scatter_(1, place, torch.where(inside, torch.finfo(z.dtype).min, zy))
        self.rebase(torch.maximum(self.m, z.amax(-1)), None if s is None else torch.maximum(self.ms, ms))
        d = z - self.m[:, None]
        if self.p.b is not None:
            d.clamp_(min=torch.finfo(z.dtype).min / 4)  # a logit of -inf weighs nothing
        e = d.exp()
        self.sum += e.sum(-1)
        self.weighted += torch.linalg.vecdot(e, d)
        if s is not None:
            self.sum_t += d.div_(o.temperature).exp_().sum(-1)
            e = (s - self.ms[:, None]).div_(o.temperature).exp_()
            _put(e, self.block.targets, columns, 0.0)  # added in `finish`
            self.sum_s += e.sum(-1)
        z.scatter_(1, place, zy)

    def finish(self) -> None:
        """Close the sums: CE, entropy, log-sum-exps. Mirrors finish_token in csrc/row_math.h."""
        o, v, wide = self.o, self.vocab, wide_dtype(self.m.device)
        self.correct = (self.zy >= self.m).to(self.m.dtype)
        self.top = torch.maximum(self.m, self.zy)
        m, zy, total, top = (x.to(wide) for x in (self.m, self.zy, self.sum, self.top))
        shift = m - top
        scale, at_y = shift.exp(), (zy - top).exp()
        others = total * scale
        weighted = torch.where(scale > 0, scale * (self.weighted + shift * total), 0.0)
        log_sum = torch.where(self.correct > 0, torch.log1p(others), torch.log(others + at_y))
        self.l1 = top + log_sum
        self.ce = (1 - o.label_smoothing) * ((top - zy) + log_sum) + o.z_loss * self.l1**2
        if o.label_smoothing:
            self.ce += o.label_smoothing * (self.l1 - self.total / v)
        expected = weighted + torch.where(at_y > 0, at_y * (zy - top), 0.0)
        self.entropy = log_sum - expected / (others + at_y)
        not_y, grow = others / (others + at_y), 2 * o.z_loss * self.l1
        self.coef_p = (1 + grow) / (others + at_y)
        self.grad_y = (o.label_smoothing - not_y) + grow * (1 - not_y) - o.label_smoothing / v
        if o.alpha:
            self.finish_comparison(top, shift)

    def finish_comparison(self, top: Tensor, shift: Tensor) -> None:
        """The tempered sums, and the comparison of the distributions at the target; `top` is the rows' maximum."""
        tau, which, zy, self_s = self.o.temperature, self.block.which, self.block.zy, self.block.self_s
        assert zy is not None
        assert self_s is not None
        sum_t = self.sum_t * torch.exp(shift / tau) + torch.exp((zy - top) / tau)
        at_self = torch.exp((self_s - self.ms) / tau)
        sum_s = self.sum_s + at_self
        acc = self.top.dtype
        self.sum_s = sum_s.to(acc)
        self.sums = RowSum((self.ms / tau)[which, None], self.sum_s[which, None])
        self.sums_t = RowSum((self.top / tau)[:, None], sum_t[:, None].to(acc))
        logs = torch.log(sum_s)[which] - torch.log(sum_t)
        self.tops, self.logs = (self.top - self.ms[which])[:, None], logs.to(acc)[:, None]
        self.x_y = ((zy - top) - (self_s - self.ms)[which]) / tau + logs
        self.q_self, q = (at_self / sum_s).to(acc), (at_self / sum_s)[which]
        r_minus_q = torch.where(self.x_y < 1, q * torch.expm1(self.x_y), torch.exp((zy - top) / tau) / sum_t - q)
        self.excess_y = (r_minus_q - torch.where(q > 0, q * self.x_y, 0.0)).to(acc)
        self.grad_y += (self.o.alpha / tau) * r_minus_q

    def target(self, s: Tensor, columns: slice) -> Tensor:
        """Target distribution q of every token, (C, B); computed once per distinct target."""
        q = (s - self.ms[:, None]).div_(self.o.temperature).exp_().div_(self.sum_s[:, None])
        _put(q, self.block.targets, columns, self.q_self)
        return q[self.block.which]

    def log_ratio(self, z: Tensor, s: Tensor) -> Tensor:
        """log r - log q of one vocabulary block, (C, B).

        The small differences first: the roundings of the dominant column cancel, however large it is.
        """
        return (z - s[self.block.which]).sub_(self.tops).div_(self.o.temperature).add_(self.logs)

    def delta(self, z: Tensor, s: Tensor, columns: slice) -> Tensor:
        """log q - log r of one vocabulary block, (C, B), less its value at q's peak, as in tiedkl/reference.py."""
        at_peak = ((self.z_peak - self.ms[self.block.which])[:, None] - self.tops) / self.o.temperature + self.logs
        delta = self.log_ratio(z, s).neg_().add_(at_peak)
        _put(delta, self.block.y, columns, at_peak[:, 0] - self.x_y)
        return delta

    def divergence(self, z: Tensor, s: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The block's share of KL (C,), and r - q (C, B), of no meaning at the target."""
        x = self.log_ratio(z, s)
        if x.device.type != "cpu" or not bool(x.abs().amax() < DELTA_DIRECT if x.numel() else True):
            tau = self.o.temperature
            div = divergence(s[self.block.which] / tau, z / tau, self.sums, self.sums_t)
            r_minus_q, x = div.r_minus_q, -div.delta
            excess = torch.where(x.abs() < SMALL[x.dtype], div.q * _series(x), div.excess)
            _put(excess, self.block.y, columns, self.excess_y)
            kl = excess.sum(-1)
        else:
            # The same formula where no log ratio is large, in fewer passes.
            q, e = self.target(s, columns), _expm1_excess(x)
            inside, place = _inside(self.block.y, columns, x)
            e.scatter_(1, place, torch.where(inside, 0.0, e.gather(1, place)))
            kl = torch.linalg.vecdot(q, e) + torch.where(inside[:, 0], self.excess_y, 0.0)
            r_minus_q = q.mul_(x.add_(e))
        return kl, r_minus_q

    def gradient(self, z: Tensor, share: Tensor | None, columns: slice) -> Tensor:
        """G of one vocabulary block before softcap's factor; `share` is g (alpha/tau) (r - q), z is overwritten."""
        g = self.block.g
        assert g is not None
        coef = g * self.coef_p[:, None]
        # In two parts: a coefficient's rounding would be common to the row, and add up in the products with w.
        high = coef.to(z.dtype)
        low = (coef - high).to(z.dtype)
        e = z.sub_(self.top[:, None]).exp_()
        grad = torch.addcmul(e * low if share is None else share.addcmul_(e, low), e, high)
        if self.o.label_smoothing:
            grad -= g * (self.o.label_smoothing / self.vocab)
        _put(grad, self.block.y, columns, g[:, 0] * self.grad_y)
        return grad
