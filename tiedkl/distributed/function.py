"""The autograd function of `VocabParallelTiedLoss`: what is computed when, and what is sent in backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..plan import Plan
from ..problem import Needs, Problem
from .collectives import all_gather, all_reduce, reduce_scatter
from .walk import ShardWalk, Tokens


@dataclass
class Job:
    """What one evaluation needs beside the tensors that may require gradients."""

    scalars: ops.Scalars
    group: Any
    plan: Plan
    y: Tensor  # (N,) on the host, negative where skipped
    scale: Tensor  # (N,) of every token's loss
    first: int  # global id of the shard's first row
    vocab: int
    sizes: list[int]  # tokens of every rank's input
    sequence_parallel: bool
    reduce_input_grad: bool

    @property
    def here(self) -> slice:
        """This rank's tokens among all."""
        rank = dist.get_rank(self.group)
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))


class VocabParallel(torch.autograd.Function):
    """(loss, terms (5, n), scale (n,)) of this rank's tokens, or of all in vocabulary-parallel form.

    As in tiedkl/ops.py: "mean" and "sum" compute their gradients at once, and "none" when it knows the upstream ones.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, t: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = job.scalars
        if job.sequence_parallel:
            h = all_gather(h, job.sizes, job.group)
        p = Problem(h, w, job.y, b, t, c.options)
        now = bool(c.needs) and c.reduction != ops.NONE
        with ops.without_autocast(h.device.type):
            tokens = Tokens.of(job.y, job.first, len(w), job.plan, h.device)
            walk = ShardWalk(p, job.plan, tokens, job.vocab, job.group)
            terms, grads = walk.evaluate(job.scale if now else None, c.wanted if now else Needs())
        per_token = terms.ce + c.options.alpha * terms.kl if c.options.alpha else terms.ce
        stacked, scale = torch.stack(terms), job.scale
        if c.reduction != ops.NONE:
            loss = (scale.double() @ per_token.double()).to(p.acc)
        else:
            loss = scale * per_token
            if job.sequence_parallel:
                loss, stacked, scale = loss[job.here], stacked[:, job.here], scale[job.here]
        ctx.mark_non_differentiable(stacked, scale)
        ctx.set_materialize_grads(False)
        ctx.job, ctx.dtype, ctx.walk = job, h.dtype, walk if c.needs and not now else None
        ctx.save_for_backward(*(grads if now else (h, w, b, t)))
        return loss, stacked, scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        may_overwrite = ops.may_overwrite([])
        with torch.no_grad():
            grads = VocabParallel.gradients(ctx, upstream, may_overwrite)
        if torch.is_grad_enabled():
            probe = torch.zeros((), requires_grad=True)
            grads = tuple(None if d is None else _Once.apply(d, probe) for d in grads)
        return grads

    @staticmethod
    def gradients(ctx: Any, upstream: Tensor | None, may_overwrite: bool) -> tuple[Tensor | None, ...]:
        """What backward returns; `may_overwrite`: nobody asks again for what forward saved."""
        job: Job = ctx.job
        if upstream is None or not job.scalars.needs:
            return (None,) * 5
        saved = ctx.saved_tensors  # an error if somebody changed them
        if ctx.walk is not None:
            if job.sequence_parallel:
                upstream = all_gather(upstream, job.sizes, job.group)
            with ops.without_autocast(upstream.device.type):
                grads = list(ctx.walk.evaluate(upstream * job.scale, job.scalars.wanted)[1])
        elif may_overwrite:
            grads = [None if d is None else d.mul_(upstream) for d in saved]
        else:
            grads = [None if d is None else d * upstream for d in saved]
        d_h, *others = grads
        if d_h is not None and job.sequence_parallel:
            d_h = reduce_scatter(d_h, job.sizes, dist.get_rank(job.group), job.group)
        elif d_h is not None and job.reduce_input_grad:
            d_h = all_reduce(d_h, job.group)
        return (*(None if d is None else d.to(ctx.dtype) for d in (d_h, *others)), None)


class _Once(torch.autograd.Function):
    """d as it is; its derivative is an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, probe: Tensor) -> Tensor:
        return d.view_as(d)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        raise RuntimeError(
            "VocabParallelTiedLoss has no second derivative: its backward cannot be differentiated (create_graph=True)"
        )
