"""The walk of tiedkl/backends/torch.py over one rank's rows of the vocabulary, with what has to be added up over ranks.

    1  U (W, D')             rows of the W distinct targets                              sum over ranks
    2  local pass            z over this rank's columns -> row sums
    3  maxima (N + W), sums (k N + W), in float64                                        max, then sum
    4  local pass            z again -> KL, and G with d_h, d_w, d_b
    5  KL (N), in float64                                                                sum
       with target_grad KL has a pass of its own before G, and T t (W, D') is added up   sum

z is kept from 2 to 4 where all of it is one block. All ranks walk the same blocks of tokens, so that what each computes
from the sums is the same to the last bit. The host sorts the targets; nothing else of the walk waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.torch import Block, Rows, Sums, Walk, cut, group_by_target, target_logits, wide_dot, wide_dtype
from ..plan import Plan
from ..problem import Grads, Needs, Options, Problem, Terms
from .collectives import all_reduce

Tile = tuple[slice, Tensor, Tensor | None]


def reduced_sums(o: Options) -> tuple[str, ...]:
    """Attributes of `Shared` that are summed over ranks, each (N,); N counts valid tokens."""
    names = ["sum", "weighted", "zy"]
    if o.label_smoothing:
        names.append("total")
    if o.alpha:
        names += ["sum_t", "zy_wide"]
        if o.target_grad:
            names += ["z_peak", "peaks"]
    return tuple(names)


@dataclass
class Tokens:
    """Valid tokens grouped by target and cut into blocks; ids count from the first row of this rank's shard."""

    order: Tensor  # (N,) positions in the problem
    y: Tensor  # (N,) ids, negative or too large where another rank has the row
    rank: Tensor  # (N,) index of each token's target among the distinct ones
    ids: Tensor  # (W,) distinct ids
    own: Tensor  # places in `y` that this rank has
    own_ids: Tensor  # places in `ids` that this rank has
    blocks: list[tuple[slice, slice, slice]]  # tokens, distinct targets, part of `own`

    @classmethod
    def of(cls, y: Tensor, first: int, rows: int, plan: Plan, device: torch.device) -> Tokens:
        """From y (N,) on the host: global ids, negative for skipped tokens; the shard is [first, first + rows)."""
        order, y, rank = group_by_target(y)
        ids, y = torch.unique_consecutive(y) - first, y - first
        own, own_ids = (((x >= 0) & (x < rows)).nonzero()[:, 0] for x in (y, ids))
        ranks, blocks = rank.tolist(), []
        for part in cut(ranks, plan):
            held = torch.searchsorted(own, torch.tensor([part.start, part.stop])).tolist()
            blocks.append((part, slice(ranks[part.start], ranks[part.stop - 1] + 1), slice(*held)))
        order, y, rank, ids, own, own_ids = (x.to(device) for x in (order, y, rank, ids, own, own_ids))
        return cls(order, y, rank, ids, own, own_ids, blocks)


class Shared(Sums):
    """The sums of all valid tokens, in float64: this rank's, and after `merge` everybody's."""

    def __init__(self, p: Problem, tokens: Tokens):
        super().__init__(p, len(tokens.y), len(tokens.ids), wide_dtype(p.h.device))
        self.tokens = tokens
        self.zy_wide, self.peaks = torch.zeros_like(self.m), torch.zeros_like(self.m)

    def merge(self, group: Any) -> None:
        """Add up over the ranks."""
        n, ms, kl = len(self.m), self.ms, bool(self.o.alpha)
        tops = all_reduce(torch.cat([self.m, ms]) if kl else self.m.clone(), group, dist.ReduceOp.MAX)
        self.rebase(tops[:n], tops[n:] if kl else None)
        # Any constant serves as a row's peak, but it has to be everybody's: the mean, where ranks tie.
        self.peaks = (ms == self.ms)[self.tokens.rank].to(self.m.dtype)
        self.z_peak = torch.where(self.peaks > 0, self.z_peak, 0.0)
        names = reduced_sums(self.o)
        sums = torch.cat([*(getattr(self, name) for name in names), *([self.sum_s] if kl else [])])
        all_reduce(sums, group)
        for i, name in enumerate(names):
            setattr(self, name, sums[i * n : (i + 1) * n])
        self.sum_s = sums[len(names) * n :] if kl else self.sum_s
        self.z_peak = self.z_peak / self.peaks.clamp(min=1)


@dataclass
class ShardBlock(Block):
    """A block whose target ids count from the first row of the shard."""

    part: slice  # of the sorted tokens
    distinct: slice  # of the distinct targets
    own: Tensor  # tokens of the block whose targets this rank has


class ShardWalk(Walk):
    """One evaluation. `p` holds all tokens and this rank's rows; its targets are not read, `tokens` has them."""

    shared: Shared | None = None
    kept: list[Tile] | None = None

    def __init__(self, p: Problem, plan: Plan, tokens: Tokens, vocab: int, group: Any):
        super().__init__(p, plan)
        self.tokens, self.vocab, self.group = tokens, vocab, group
        self.u = p.teacher.new_zeros(len(tokens.ids) if self.o.alpha else 0, p.teacher.shape[1])  # (W, D')
        if self.o.alpha:
            ids = tokens.own_ids
            self.u[ids] = p.teacher[tokens.ids[ids]]
            all_reduce(self.u, group)
            self.self_s = wide_dot(self.u, torch.arange(len(self.u), device=self.u.device), self.u)

    def evaluate(self, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
        """Terms, and gradients with g (N,) if that is given; d_h (N, D) is this rank's share.

        A second evaluation starts from the sums of the first.
        """
        self.start(g, needs)
        first = self.shared is None
        if self.shared is None:
            self.shared = self.statistics()
        compared = bool(self.o.alpha) and (g is None or self.target_grad)
        if compared:
            self.compare()
        if g is not None:
            self.differentiate(kl=bool(self.o.alpha) and first and not compared)
        elif not self.o.alpha:
            for place in self.tokens.blocks:
                self.rows_of(self.block_of(*place))
        self.kept = None
        self.terms[1, self.tokens.order] = self.shared.kl.to(self.p.acc)
        return Terms(*self.terms.unbind(0)), Grads(*(self.d.get(k) for k in "hwbt"))

    def block_of(self, part: slice, distinct: slice, own: slice) -> ShardBlock:
        p, x, shared = self.p, self.tokens, self.shared
        tokens = x.order[part]
        return ShardBlock(
            tokens=tokens,
            targets=x.ids[distinct],
            which=x.rank[part] - distinct.start,
            y=x.y[part],
            h=p.h[tokens].to(p.acc),
            u=self.u[distinct].to(p.acc),
            g=None if self.g is None else self.g[tokens, None],
            zy=None if shared is None else shared.zy_wide[part],
            self_s=self.self_s[distinct] if self.o.alpha else None,
            part=part,
            distinct=distinct,
            own=x.own[own] - part.start,
        )

    def columns(self, block: Block) -> Iterable[Tile]:
        """The tiles of this rank's rows; kept ones where they are."""
        if self.kept is None:
            tiles = self.tiles(block)
            if len(self.tokens.blocks) > 1 or self.plan.vocab_block < self.p.w.shape[0]:
                return tiles
            self.kept = list(tiles)
        return self.kept

    def statistics(self) -> Shared:
        """Pass 1, and everybody's sums."""
        p, shared = self.p, Shared(self.p, self.tokens)
        for place in self.tokens.blocks:
            block = self.block_of(*place)
            rows = Rows(block, p, self.vocab)
            for tile in self.columns(block):
                rows.add(*tile)
            for name in ("m", "sum", "sum_t", "weighted", "total", "zy", "z_peak"):
                getattr(shared, name)[block.part] = getattr(rows, name)
            shared.ms[block.distinct], shared.sum_s[block.distinct] = rows.ms, rows.sum_s
            if self.o.alpha:
                wide = target_logits(p, block.h[block.own], block.y[block.own])
                shared.zy_wide[block.part].index_copy_(0, block.own, wide)
        shared.merge(self.group)
        return shared

    def rows_of(self, block: ShardBlock) -> Rows:
        """The finished sums of a block; its terms but KL are written down."""
        assert self.shared is not None
        rows, shared, acc = Rows(block, self.p, self.vocab), self.shared, self.p.acc
        for name in ("sum", "sum_t", "weighted", "total"):
            setattr(rows, name, getattr(shared, name)[block.part])
        for name in ("m", "zy", "z_peak", "mean_delta"):
            setattr(rows, name, getattr(shared, name)[block.part].to(acc))
        rows.ms, rows.sum_s = shared.ms[block.distinct].to(acc), shared.sum_s[block.distinct]
        rows.finish()
        terms = (rows.ce, torch.zeros_like(rows.ce), rows.l1, rows.entropy, rows.correct)
        self.terms[:, block.tokens] = torch.stack([x.to(acc) for x in terms])
        return rows

    def compare(self) -> None:
        """KL, and for `target_grad` the mean of delta under q, of which a column's gradient needs all."""
        shared = self.shared
        assert shared is not None
        for place in self.tokens.blocks:
            block = self.block_of(*place)
            rows = self.rows_of(block)
            rows.mean_delta = torch.zeros_like(rows.kl)
            for columns, z, s in self.columns(block):
                assert s is not None
                rows.kl += rows.divergence(z, s, columns)[0]
                if self.target_grad:
                    q = rows.target(s, columns)
                    rows.mean_delta += torch.where(q > 0, q * rows.delta(z, s, columns), 0.0).sum(-1)
            shared.kl[block.part], shared.mean_delta[block.part] = rows.kl, rows.mean_delta
        both = torch.cat([shared.kl, shared.mean_delta]) if self.target_grad else shared.kl
        all_reduce(both, self.group)
        if self.target_grad:
            shared.kl, shared.mean_delta = both.chunk(2)

    def differentiate(self, kl: bool) -> None:
        """Pass 2: this rank's share of every gradient, and KL."""
        p, shared = self.p, self.shared
        assert shared is not None
        self.d_u = self.u.new_zeros(self.u.shape if self.target_grad else 0, dtype=p.acc)
        for place in self.tokens.blocks:
            block = self.block_of(*place)
            rows = self.rows_of(block)
            for columns, z, s in self.columns(block):
                self.gradients(block, rows, columns, z, s)
            if kl:
                shared.kl[block.part] = rows.kl
        if kl:
            all_reduce(shared.kl, self.group)
        if self.target_grad:
            all_reduce(self.d_u, self.group)
            ids = self.tokens.own_ids
            self.d["w" if p.t is None else "t"].index_add_(0, self.tokens.ids[ids], self.d_u[ids])

    def target_rows(self, block: Block, rows: Tensor) -> None:
        assert isinstance(block, ShardBlock)
        self.d_u[block.distinct] += rows
