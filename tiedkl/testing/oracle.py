"""Three ways to evaluate a case: the float64 specification, eager PyTorch as users write it, and tiedkl itself.

Eager computes the logits in the case's dtype and upcasts them to float32 before the losses (float64 stays), as model
libraries do. Losses in half precision would be far worse and make every bound trivial.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tiedkl

from .. import backends, reference
from ..plan import Shape, scratch_bytes
from ..problem import Needs, Options, Problem
from .cases import IGNORE, NARROW, Case, Inputs, laid_out

TERMS = ("loss", "ce", "kl")
GRADS = ("dh", "dw", "db", "dt")
FIXED_ULPS = 32.0  # times 1 + max |z|: the bound where eager is no measure, see `Measured`


@dataclass
class Values:
    """What one evaluation gives, in float64: reduced and per-token terms (N,), gradients; keys of TERMS and GRADS."""

    reduced: dict[str, Tensor]
    tokens: dict[str, Tensor]
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Flat:
    """A case without its layout: every option that only selects or weighs tokens has become `scale`."""

    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    y: Tensor  # (N,) int64, IGNORE where ignored
    b: Tensor | None
    t: Tensor | None
    scale: Tensor  # (N,) float64: each token's factor in the reduced loss; in the per-token one for reduction "none"
    upstream: Tensor  # (N,) or () float64
    tokens: Tensor | None  # (N,)


def flatten(case: Case, x: Inputs) -> Flat:
    """Targets shifted, token weights and the normaliser folded into one factor per token."""
    y, weight = x.target.long(), x.token_weight
    weight = torch.ones(y.shape, dtype=torch.float64, device=y.device) if weight is None else weight.double()
    upstream = x.upstream.double()
    if case.shift:

        def ahead(a: Tensor, fill: float) -> Tensor:
            return torch.cat((a[..., case.shift :], torch.full_like(a[..., : case.shift], fill)), -1)

        y, weight = ahead(y, IGNORE), ahead(weight, 0.0)
        if case.reduction == "none":
            upstream = F.pad(upstream, (0, case.shift))
    scale = torch.where(y != IGNORE, weight, 0.0).reshape(-1)
    if case.reduction == "mean":
        norm = scale.sum() if case.num_items is None else torch.tensor(case.num_items, dtype=torch.float64)
        scale = scale / norm if norm != 0 else scale
    return Flat(
        h=x.h.reshape(-1, case.width),
        w=x.w,
        y=y.reshape(-1),
        b=x.b,
        t=x.t,
        scale=scale,
        upstream=upstream.reshape(-1) if upstream.dim() else upstream,
        tokens=None if x.tokens is None else x.tokens.reshape(-1),
    )


def _loss_options(case: Case) -> Options:
    o = case.options
    return Options(
        o["temperature"], o["alpha"], o["label_smoothing"], o["z_loss"], o["softcap"] or 0.0, o["target_grad"]
    )


def _values(case: Case, f: Flat, ce: Tensor, kl: Tensor, grads: dict[str, Tensor | None]) -> Values:
    per_token = {"ce": ce.double(), "kl": kl.double()}
    per_token["loss"] = per_token["ce"] + case.options["alpha"] * per_token["kl"]
    found = {name: d.double() for name, d in grads.items() if d is not None}
    if f.tokens is not None:  # one Parameter: the lookup's gradient lands on w as well
        found["dw"] = found["dw"].index_add(0, f.tokens, found.pop("dh"))
    weight = {name: x * f.scale for name, x in per_token.items()}
    reduced = weight if case.reduction == "none" else {name: x.sum() for name, x in weight.items()}
    return Values(reduced, per_token, found)


def truth(case: Case, f: Flat) -> Values:
    """The specification in float64 on the same quantised inputs."""
    p = Problem(f.h, f.w, torch.where(f.y == IGNORE, -1, f.y), f.b, f.t, _loss_options(case)).to(torch.float64)
    needs = Needs(h=True, w=True, b=f.b is not None, t=f.t is not None and case.options["target_grad"])
    terms, d = reference.backward(p, f.scale * f.upstream, needs)
    return _values(case, f, terms.ce, terms.kl, {"dh": d.h, "dw": d.w, "db": d.b, "dt": d.t})


def _products(x: Tensor, rows: Tensor, b: Tensor | None, other: Tensor | None) -> Tensor:
    """F.linear(x, rows, b); with `other`, an order of the features, the later half of the rows in that order.

    A BLAS multiplies blocks of other widths in other orders. Rows that are equal then have logits that are not, whose
    rounding errors no longer cancel in a softmax.
    """
    if other is None:
        return F.linear(x, rows, b)
    half = len(rows) // 2
    z = torch.cat((F.linear(x, rows[:half]), F.linear(x[:, other], rows[half:, other])), 1)
    return z if b is None else z + b


def eager(case: Case, f: Flat, others: tuple[Tensor, Tensor] | None = None) -> Values:
    """PyTorch as a user would write it: logits in the case's dtype, upcast, F.cross_entropy, F.kl_div, autograd.

    others: orders of the features, D and D' of them, in which half of the products are added up.
    """
    o = case.options
    tau, acc = o["temperature"], torch.float64 if case.dtype == "float64" else torch.float32
    h, w = f.h.detach().clone().requires_grad_(), f.w.detach().clone().requires_grad_()
    b = None if f.b is None else f.b.detach().clone().requires_grad_()
    t = None if f.t is None else f.t.detach().clone().requires_grad_(o["target_grad"])
    valid, y = f.y != IGNORE, f.y.clamp(min=0)
    other, other_t = others or (None, None)
    z = _products(h, w, b, other).to(acc)
    if o["softcap"]:
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    ce = F.cross_entropy(z, y, reduction="none", label_smoothing=o["label_smoothing"])
    if o["z_loss"]:
        ce = ce + o["z_loss"] * torch.logsumexp(z, -1) ** 2
    kl = torch.zeros_like(ce)
    if o["alpha"]:
        teacher = w if t is None else t
        teacher = teacher if o["target_grad"] else teacher.detach()
        s = _products(teacher[y], teacher, None, other if t is None else other_t).to(acc)
        kl = F.kl_div(F.log_softmax(z / tau, -1), F.softmax(s / tau, -1), reduction="none").sum(-1)
    ce, kl = torch.where(valid, ce, 0.0), torch.where(valid, kl, 0.0)
    loss = (ce + o["alpha"] * kl) * (f.scale * f.upstream).to(acc)
    loss.sum().backward()
    named = {"dh": h, "dw": w, "db": b, "dt": t if o["target_grad"] else None}
    grads = {name: x.grad if x.grad is not None else torch.zeros_like(x) for name, x in named.items() if x is not None}
    if f.tokens is not None:  # autograd adds the two contributions in the case's dtype
        grads["dw"] = grads["dw"].index_add(0, f.tokens, grads["dh"])
        grads["dh"] = torch.zeros_like(grads["dh"])
    return _values(case, f, ce.detach(), kl.detach(), dict(grads))


def eager_again(case: Case, f: Flat, generator: torch.Generator) -> Values:
    """Eager with tokens and features in other orders, which changes its rounding errors and nothing else."""

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator).to(f.h.device)

    n, d = f.h.shape
    rows, columns = order(n), order(d)
    moved = replace(
        f,
        h=f.h[rows][:, columns],
        w=f.w[:, columns],
        y=f.y[rows],
        scale=f.scale[rows],
        upstream=f.upstream[rows] if f.upstream.dim() else f.upstream,
        tokens=None if f.tokens is None else f.tokens[rows],
    )
    others = order(d), order(d if f.t is None else f.t.shape[1])
    x, undo, back = eager(case, moved, others), rows.argsort(), columns.argsort()
    tokens = {name: a[undo] for name, a in x.tokens.items()}
    reduced = {name: a[undo] if a.dim() else a for name, a in x.reduced.items()}
    grads = dict(x.grads)
    grads["dw"] = grads["dw"][:, back]
    if "dh" in grads:
        grads["dh"] = grads["dh"][undo][:, back]
    return Values(reduced, tokens, grads)


def arguments(case: Case, impl: str) -> dict[str, Any]:
    """`case.options` with a workspace in bytes: NARROW becomes one too few for the smallest useful token block."""
    if case.options["workspace_bytes"] != NARROW:
        return case.options
    n, dtype = torch.Size(case.shape).numel(), case.torch_dtype
    tuning = backends.load(impl).tuning(dtype, torch.device("cpu"))  # the scratch of a block is the same everywhere
    shape = Shape(
        tokens=n,
        vocab=case.vocab,
        width=case.width,
        teacher_width=case.teacher_width or case.width,
        kl=case.options["alpha"] != 0,
        target_grad=case.options["target_grad"],
        acc_bytes=8 if dtype == torch.float64 else 4,
        half=dtype.itemsize == 2,
    )
    tokens = max(1, min(n, tuning.min_token_block))
    targets = max(1, int(tokens * tuning.targets_per_token))
    return {**case.options, "workspace_bytes": scratch_bytes(shape, tuning, tokens, targets, case.vocab) - 1}


def use(case: Case, x: Inputs, impl: str) -> Values:
    """Call tiedkl twice: with the case's reduction and gradients, and without gradients for every token's terms."""
    leaves: dict[str, Tensor] = {"dw": x.w.detach().requires_grad_()}
    w = leaves["dw"]
    h = x.h.detach().requires_grad_()
    if x.tokens is None:
        leaves["dh"] = h
    else:
        h = F.embedding(x.tokens, w)
    b = t = None
    if x.b is not None:
        b = leaves["db"] = x.b.detach().requires_grad_()
    if x.t is not None:
        t = x.t.detach()
        if case.options["target_grad"]:
            t = leaves["dt"] = t.requires_grad_()
    same: dict[str, Any] = {"target_weight": t, "shift": case.shift, "impl": impl, "return_terms": True}
    options = arguments(case, impl)
    out = tiedkl.fused_tied_loss(
        h, w, x.target, b, token_weight=x.token_weight, num_items=case.num_items, **same, **options
    )
    assert isinstance(out, tiedkl.TiedLossOutput)
    out.loss.backward(x.upstream.to(out.loss.dtype))
    with torch.no_grad():
        per_token = tiedkl.fused_tied_loss(h, w, x.target, b, **same, **{**options, "reduction": "none"})

    def full(a: Tensor) -> Tensor:
        a = a.detach().double()
        if case.shift and a.dim():
            a = F.pad(a, (0, case.shift))
        return a.reshape(-1) if a.dim() or case.reduction == "none" else a

    reduced = {name: full(getattr(out, name)) for name in TERMS}
    tokens = {name: full(getattr(per_token, name)).reshape(-1) for name in TERMS}
    grads = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape
        grads[name] = leaf.grad.double()
    if "dh" in grads:
        grads["dh"] = grads["dh"].reshape(-1, case.width)
    return Values(reduced, tokens, grads)


def use_again(case: Case, x: Inputs, impl: str, generator: torch.Generator) -> Values:
    """`use` with the features in another order, laid out as they were."""
    columns = torch.randperm(case.width, generator=generator).to(x.h.device)
    moved = replace(x, h=laid_out(x.h[..., columns], case.layout), w=laid_out(x.w[:, columns], case.row_layout))
    found, back = use(case, moved, impl), columns.argsort()
    return replace(found, grads={n: d[:, back] if n in ("dh", "dw") else d for n, d in found.grads.items()})


def ulp(case: Case, quantity: str, scale: float) -> float:
    """One unit in the last place at `scale`, in the dtype of `quantity`: the loss's for terms, else the input's."""
    dtype = case.torch_dtype
    if quantity in TERMS and dtype != torch.float64:
        dtype = torch.float32
    info = torch.finfo(dtype)
    return max(info.eps * scale, info.smallest_normal * info.eps) if scale else 0.0
