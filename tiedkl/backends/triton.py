"""The fused Triton kernels (kernels/), in either strategy of docs/design.md, "Strategies".

vocab_blocks: logits exist only as tiles, and nothing of vocabulary size is in memory. Two passes over the vocabulary:
statistics of the rows, then blocks of B vocabulary rows, each with its logits computed again: the gradient block
G (C, B) in the input dtype, d_h += G w and d_w = G^T h.

token_blocks: where the budget holds whole rows of many tokens their logits are computed once, by the BLAS, and kept in
float32; the same kernels read their tiles instead of multiplying.

Reference: tiedkl/reference.py. Nothing waits for the device, and there are no atomics: reruns give the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..plan import TOKEN_BLOCKS, Plan, Tuning
from ..problem import Grads, Needs, Problem, Terms, kept_dtype

try:
    from ..kernels import grads, launch, products, scale, stats
except ImportError as error:
    MISSING: str | None = f"triton cannot be imported ({error})"
else:
    MISSING = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Block sizes by reckoning, not tried against others on a GPU. G in the input dtype and a 64th of it in running sums;
# every token may have a target of its own. Rows of h and w are read where they are.
SUMS = 1 / 64
FULL = Tuning(
    z_buffers=1 + SUMS,
    s_buffers=1,
    row_buffers=0,
    token_block=4096,
    min_token_block=1024,  # a block of fewer rows reads all of w for little work
    min_vocab_block=2048,  # d_h is read and written once a block: about as many columns as tokens cost least
    panel=1 << 62,
    targets_per_token=1.0,
    widened=0,
    delta_buffers=2,
    row_copies=False,
    vocab_multiple=128,  # whole tiles, and rows of G that start at 16 bytes
    token_multiple=16,  # vectors of a block start at 16 bytes too: kernels are compiled once for all blocks
)
ALIGNED = (
    16  # elements: Triton compiles wide stores, and cuBLAS takes its fast kernels, for rows that start at 16 bytes
)
LARGE_HALF, LARGE_LSE = 2.0**13, 1000.0  # an entry of G in float16, an eighth of what it can be; and such an lse
HALF = replace(FULL, z_buffers=0.5 + SUMS, kept_buffers=1)
# With all tokens in one block d_w is rounded block by block: a V x D in float32 less. Blocks narrower than some 2,000
# columns pass d_h through memory more often, at 512 for 8% of the time (N=16,384, V=128,256, D=2,048 on an H200).
BFLOAT16 = replace(HALF, delta_buffers=1.5, whole_block=512)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None on GPUs with triton, and on CPU tensors under TRITON_INTERPRET=1."""
    if MISSING:
        return MISSING
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported: tensor cores multiply float32, bfloat16 and float16"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")):
        return None
    return f"it runs on a GPU, or in Triton's interpreter under TRITON_INTERPRET=1; got device {device}"


def tuning(dtype: torch.dtype, device: torch.device) -> Tuning:
    """Blocks in units of the accumulation dtype, which fill the device."""
    usual = {torch.float32: FULL, torch.bfloat16: BFLOAT16}.get(dtype, HALF)
    tile = launch.tiles(launch.architecture(device), dtype.itemsize).gradient
    return replace(usual, programs=launch.programs(tile, device))


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs (2 + 2 rho in vocabulary blocks; 1 without KL)."""
    return _walk(problem, plan, None, Needs())[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in 3 + rho GEMMs (4 + 2 rho in vocabulary blocks)."""
    return _walk(problem, plan, g, needs)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous, times factor (1,) float32, in place."""
    with launch.current(x.device):
        return scale.scale_(x, factor)


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _walk(p: Problem, plan: Plan, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
    inputs = replace(
        p,
        h=_rows(p.h),
        w=_rows(p.w),
        y=p.y.contiguous(),
        b=None if p.b is None else p.b.contiguous(),
        t=None if p.t is None else _rows(p.t),
    )
    with launch.current(p.h.device):
        return _Walk(inputs, plan, g, needs).run()


def _multiply(out: Tensor, x: Tensor, y: Tensor, add: bool) -> None:
    """out = x y (+ out), float32 from operands of any dtype."""
    if x.dtype == torch.float32:
        torch.addmm(out, x, y, beta=float(add), out=out)
    elif x.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, x, y, torch.float32, beta=float(add), out=out)
    else:  # the interpreter
        torch.addmm(out, x.float(), y.float(), beta=float(add), out=out)


class _Walk:
    def __init__(self, p: Problem, plan: Plan, g: Tensor | None, needs: Needs):
        self.p, self.plan, self.needs, self.o = p, plan, needs, p.options
        self.inv_t = 1.0 / p.options.temperature
        self.stored = plan.strategy == TOKEN_BLOCKS
        self.step = plan.vocab_block
        self.stride = -(-self.step // ALIGNED) * ALIGNED  # of all blocks of columns
        self.kl = bool(p.options.alpha)
        self.target_grad = g is not None and self.kl and p.options.target_grad and (needs.w if p.t is None else needs.t)
        self.grad = g is not None
        self.g = torch.zeros_like(p.y, dtype=torch.float32) if g is None else g
        self.scale: Tensor | None = None
        if g is not None and p.h.dtype == torch.float16 and len(g):
            # G in float16 must not underflow: most of its entries are as small as 1/V of the largest.
            o = p.options
            most = 1 + o.alpha * self.inv_t + 2 * o.z_loss * LARGE_LSE  # of |G| where g is 1
            self.scale = g.abs().amax() * (most / LARGE_HALF)
            self.scale = torch.where(self.scale > 0, self.scale, 1.0)
            self.g = g / self.scale
        self.terms = p.h.new_zeros(5, len(p.y), dtype=torch.float32)
        fill = torch.empty if len(p.y) else torch.zeros
        like = {"h": p.h, "w": p.w, "b": p.b, "t": p.t}
        one_block = not self.stored and plan.token_block >= len(p.y) > 0
        through = self.kl and p.options.target_grad  # whether or not anybody wants it: so the plan has it
        self.rounds_w = one_block and needs.w and not through and kept_dtype(p.w.dtype) != torch.float32
        if self.rounds_w:
            self.w_block = p.w.new_empty(self.step, p.w.shape[1], dtype=torch.float32)
        self.d = {
            k: (torch.zeros if k in "ht" else fill)(
                x.shape, dtype=x.dtype if k == "w" and self.rounds_w else torch.float32, device=x.device
            )
            for k, x in like.items()
            if x is not None and getattr(needs, k)
        }

    def run(self) -> tuple[Terms, Grads]:
        for begin in range(0, len(self.p.y), self.plan.token_block):
            self.block(slice(begin, begin + self.plan.token_block))
        if self.scale is not None:
            for d in self.d.values():
                d.mul_(self.scale)
        return Terms(*self.terms.unbind(0)), Grads(*(self.d.get(k) for k in "hwbt"))

    def block(self, tokens: slice) -> None:
        """Everything that becomes of some tokens."""
        p = replace(self.p, h=self.p.h[tokens], y=self.p.y[tokens])
        targets = launch.distinct(p.y, len(p.w))

        def buffer(rows: int, dtype: torch.dtype, wanted: bool) -> Any:
            return p.h.new_empty(rows, self.stride, dtype=dtype) if wanted else None

        s = buffer(targets.capacity, torch.float32, self.kl)
        z = buffer(len(p.y), torch.float32, self.stored)
        if z is not None:
            _multiply(z[:, : len(p.w)], p.h, p.w.T, False)
            if self.kl:
                grads.similarities(p.teacher, targets, slice(0, len(p.w)), s)
        sums = stats.target_stats(p.teacher, targets, self.inv_t, s if self.stored else None) if self.kl else None
        terms, rows = stats.token_stats(p, self.g[tokens], targets, sums, self.inv_t, z)

        in_place = z is not None and z.dtype == p.h.dtype
        grad = z if in_place else buffer(len(p.y), p.h.dtype, self.grad)
        delta = buffer(len(p.y), torch.float32, self.target_grad)
        slots = grads.column_tiles(p.h, self.step, self.stored)
        kl = p.h.new_zeros(slots, len(p.y), dtype=torch.float32) if self.kl else None

        def evaluate(columns: slice, kl: Tensor | None, grad: Tensor | None, delta: Tensor | None) -> None:
            if self.kl and not self.stored:
                grads.similarities(p.teacher, targets, columns, s)
            which = targets.which
            grads.gradient_block(
                p, rows, which, s, columns, self.inv_t, z=z, kl=kl, grad=grad, delta=delta, terms=terms
            )

        # The target gradient needs each token's KL before its first column, as does a loss without gradient.
        divergence_first = self.target_grad or not self.grad
        if divergence_first and kl is not None:
            for columns in self.columns():
                evaluate(columns, kl, None, None)
            terms[1] += kl.sum(0)
        if self.grad:
            through = _ThroughTargets(self, p, targets) if self.target_grad else None
            for columns in self.columns():
                evaluate(columns, None if divergence_first else kl, grad, delta)
                self.products(grad[:, : columns.stop - columns.start], p.h, tokens, columns)
                if through and sums:
                    through.block(delta, s, sums.sums, columns)
            if through:
                through.finish()
            if kl is not None and not divergence_first:
                terms[1] += kl.sum(0)
        self.terms[:, tokens] = terms

    def columns(self) -> Iterator[slice]:
        v = len(self.p.w)
        for begin in range(0, v, self.step):
            yield slice(begin, min(begin + self.step, v))

    def products(self, grad: Tensor, h: Tensor, tokens: slice, columns: slice) -> None:
        """d_h += G w, d_w += G^T h, d_b += sum G of one block; the first tokens write d_w and d_b."""
        add = tokens.start > 0
        if "h" in self.d:
            _multiply(self.d["h"][tokens], grad, self.p.w[columns], True)
        if self.rounds_w:
            _multiply(block := self.w_block[: columns.stop - columns.start], grad.T, h, False)
            self.d["w"][columns] = block
        elif "w" in self.d:
            _multiply(self.d["w"][columns], grad.T, h, add)
        if "b" in self.d:
            share = grad.sum(0, dtype=torch.float32)
            self.d["b"][columns] = self.d["b"][columns] + share if add else share


class _ThroughTargets:
    """d KL / d s of one token block, through s = t[u] t^T / tau: T_u t into row u of d_t, T_u^T t[u] into all rows."""

    def __init__(self, walk: _Walk, p: Problem, targets: Any):
        self.t, self.targets, self.inv_t = p.teacher, targets, walk.inv_t
        self.d_t = walk.d["w" if p.t is None else "t"]
        key, self.order = torch.where(p.y >= 0, targets.which, targets.capacity).sort(stable=True)
        places = torch.arange(targets.capacity + 1, device=key.device)
        self.start = torch.searchsorted(key, places)
        self.u = self.t[targets.ids]
        self.d_u = torch.zeros(self.u.shape, dtype=torch.float32, device=key.device)
        # What hundreds of tokens of a frequent word add up to can be beyond float16.
        dtype = torch.float32 if self.u.dtype == torch.float16 else self.u.dtype
        self.block_t = self.u.new_empty(targets.capacity, walk.stride, dtype=dtype)

    def block(self, delta: Tensor, s: Tensor, sums: Any, columns: slice) -> None:
        """Add the share of some vocabulary rows, whose delta and s are given."""
        width = columns.stop - columns.start
        grads.target_gradient(delta, self.order, self.start, s, sums, self.targets, columns, self.inv_t, self.block_t)
        t_block = self.block_t[:, :width]
        count = self.targets.count
        products.add_counted_product(self.d_t[columns], t_block.T, self.u, count, inner=True)
        products.add_counted_product(self.d_u, t_block, self.t[columns], count, inner=False)

    def finish(self) -> None:
        """Add the rows of the targets themselves; no two of them are one, but for zero rows beyond their count."""
        self.d_t.index_add_(0, self.targets.ids, self.d_u)
