"""The custom-op pair `tiedkl::tied_loss`, `tiedkl::tied_loss_backward`, their fakes and their autograd formula.

For "mean" and "sum" the upstream gradient is one scalar: the forward op returns unscaled gradients in the accumulation
dtype and the backward op scales and casts them. For "none" the backward op walks again with the upstream weights.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from . import backends
from .plan import Plan, Shape, make_plan
from .problem import POISONED, SKIPPED, Grads, Needs, Options, Problem, Terms, acc_dtype

log = logging.getLogger("tiedkl")

NEED_H, NEED_W, NEED_B, NEED_T = 1, 2, 4, 8  # bits of the op's `needs`


def plan_for(p: Problem, impl: str, workspace_bytes: int | None, grad: bool) -> Plan:
    """The plan for one problem. RuntimeError when a named backend cannot run it."""
    name, skipped = backends.choose(impl, p.h.device, p.h.dtype)
    o = p.options
    shape = Shape(
        tokens=p.h.shape[0],
        vocab=p.w.shape[0],
        width=p.h.shape[1],
        teacher_width=p.teacher.shape[1],
        kl=o.alpha != 0,
        grad=grad,
        target_grad=o.target_grad,
        acc_bytes=p.acc.itemsize,
        half=p.h.dtype != p.acc,
        threads=torch.get_num_threads() if p.h.device.type == "cpu" else 1,
    )
    plan = make_plan(name, shape, backends.load(name).TUNING, workspace_bytes)
    return plan if not skipped else _with_skipped(plan, skipped)


def _with_skipped(plan: Plan, skipped: dict[str, str]) -> Plan:
    plan.skipped.update(skipped)
    return plan


def _run(p: Problem, g: Tensor | None, needs: Needs, impl: str, workspace_bytes: int) -> tuple[Terms, Grads]:
    """Plan and run one problem; g None means no gradient."""
    plan = plan_for(p, impl, workspace_bytes if workspace_bytes >= 0 else None, g is not None)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("N=%d V=%d D=%d %s\n%s", p.h.shape[0], p.w.shape[0], p.h.shape[1], p.h.dtype, plan)
    device = p.h.device.type
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    backend = backends.load(plan.impl)
    with autocast:
        if g is None:
            return backend.forward(p, plan), Grads(None, None, None, None)
        return backend.backward(p, plan, g, needs)


def _targets(target: Tensor, n_vocab: int, ignore_index: int) -> Tensor:
    """Targets as int64 with ignored and, off the CPU, invalid ones marked. ValueError for an invalid one on the CPU."""
    y = torch.where(target == ignore_index, SKIPPED, target.to(torch.int64))
    invalid = ((y < 0) & (target != ignore_index)) | (y >= n_vocab)
    if y.device.type != "cpu" and not _check_targets():
        return torch.where(invalid, POISONED, y)
    if bool(invalid.any()):
        where = int(invalid.nonzero()[0, 0])
        raise ValueError(
            f"target[{where}]={int(target[where])} is outside [0, {n_vocab}) and is not ignore_index={ignore_index} "
            f"({int(invalid.sum())} such targets)"
        )
    return y


def _check_targets() -> bool:
    from .loss import environment_flag

    return environment_flag("TIEDKL_CHECK_TARGETS")


def _token_scale(y: Tensor, weight: Tensor | None, num_items: Tensor | None, reduction: str, acc: torch.dtype) -> Tensor:
    """What each token's loss is multiplied with, (N,): its weight, divided by the normaliser for "mean"."""
    scale = (y >= 0).to(acc) if weight is None else torch.where(y >= 0, weight.to(acc), 0.0)
    if reduction == "mean":
        norm = scale.sum() if num_items is None else num_items.to(acc)
        scale = scale * torch.where(norm != 0, 1 / norm, 0.0)
    return scale


@torch.library.custom_op("tiedkl::tied_loss", mutates_args=())
def tied_loss(
    h: Tensor,
    w: Tensor,
    target: Tensor,
    b: Tensor | None,
    t: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    target_grad: bool,
    reduction: str,
    ignore_index: int,
    impl: str,
    workspace_bytes: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, terms (5, N), scale (N,), d_h, d_w, d_b, d_t); gradients are empty unless their bit of `needs` is set."""
    options = Options(temperature, alpha, label_smoothing, z_loss, softcap, target_grad)
    p = Problem(h, w, _targets(target, w.shape[0], ignore_index), b, t, options)
    scale = _token_scale(p.y, token_weight, num_items, reduction, p.acc)
    wanted = Needs(bool(needs & NEED_H), bool(needs & NEED_W), bool(needs & NEED_B), bool(needs & NEED_T))
    now = wanted.any and reduction != "none"
    terms, grads = _run(p, scale if now else None, wanted, impl, workspace_bytes)
    per_token = terms.ce + alpha * terms.kl if alpha else terms.ce
    if p.y.device.type != "cpu":
        per_token = torch.where(p.y == POISONED, float("nan"), per_token)
        scale = torch.where(p.y == POISONED, 1.0, scale)
    if reduction == "none":
        loss = scale * per_token
    else:
        loss = (scale.double() @ per_token.double()).to(p.acc)
    empty = [h.new_empty(0, dtype=p.acc) if d is None else d for d in grads]
    return loss, torch.stack(terms), scale, *empty


@tied_loss.register_fake
def _(h, w, target, b, t, token_weight, num_items, temperature, alpha, label_smoothing, z_loss, softcap, target_grad,
      reduction, ignore_index, impl, workspace_bytes, needs):  # fmt: skip
    acc, n = acc_dtype(h.dtype), h.shape[0]
    now = reduction != "none"

    def grad(x: Tensor | None, bit: int) -> Tensor:
        return h.new_empty(x.shape if now and x is not None and needs & bit else 0, dtype=acc)

    loss = h.new_empty(() if now else n, dtype=acc)
    grads = grad(h, NEED_H), grad(w, NEED_W), grad(b, NEED_B), grad(t, NEED_T)
    return loss, h.new_empty((5, n), dtype=acc), h.new_empty(n, dtype=acc), *grads


@torch.library.custom_op("tiedkl::tied_loss_backward", mutates_args=())
def tied_loss_backward(
    upstream: Tensor,
    saved: list[Tensor],
    h: Tensor,
    w: Tensor,
    target: Tensor,
    b: Tensor | None,
    t: Tensor | None,
    token_weight: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    target_grad: bool,
    ignore_index: int,
    impl: str,
    workspace_bytes: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_h, d_w, d_b, d_t) in the dtypes of their inputs: `saved` times a scalar upstream, or a new walk for upstream (N,)."""
    if saved:
        return tuple((d * upstream).to(h.dtype) if d.numel() else h.new_empty(0) for d in saved)  # type: ignore[return-value]
    options = Options(temperature, alpha, label_smoothing, z_loss, softcap, target_grad)
    p = Problem(h, w, _targets(target, w.shape[0], ignore_index), b, t, options)
    wanted = Needs(bool(needs & NEED_H), bool(needs & NEED_W), bool(needs & NEED_B), bool(needs & NEED_T))
    g = upstream.to(p.acc) * _token_scale(p.y, token_weight, None, "none", p.acc)
    grads = _run(p, g, wanted, impl, workspace_bytes)[1]
    return tuple(h.new_empty(0) if d is None else d.to(h.dtype, copy=True) for d in grads)  # type: ignore[return-value]


@tied_loss_backward.register_fake
def _(upstream, saved, h, w, target, b, t, token_weight, temperature, alpha, label_smoothing, z_loss, softcap,
      target_grad, ignore_index, impl, workspace_bytes, needs):  # fmt: skip
    inputs = ((h, NEED_H), (w, NEED_W), (b, NEED_B), (t, NEED_T))
    return tuple(h.new_empty(x.shape if x is not None and needs & bit else 0) for x, bit in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w, target, b, t, token_weight, _, *scalars = inputs
    reduction, needs = scalars[6], scalars[10]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has = (b is not None, t is not None, token_weight is not None)
    ctx.scalars = (*scalars[:6], *scalars[7:])  # without the reduction
    ctx.reduction, ctx.needs = reduction, needs
    grads = [] if reduction == "none" else output[3:]
    optional = [x for x in (b, t, token_weight) if x is not None]
    ctx.save_for_backward(h, w, target, *optional, *grads)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 13
    if upstream is None or not ctx.needs:
        return (None,) * 5 + nothing
    h, w, target, *rest = ctx.saved_tensors
    b, t, token_weight = (rest.pop(0) if has else None for has in ctx.has)
    saved = rest
    if saved and _may_overwrite():
        grads = [d.mul_(upstream).to(h.dtype) if d.numel() else d for d in saved]
    else:
        grads = tied_loss_backward(upstream, saved, h, w, target, b, t, token_weight, *ctx.scalars)
    d_h, d_w, d_b, d_t = (d if ctx.needs & bit else None for d, bit in zip(grads, (1, 2, 4, 8), strict=True))
    return (d_h, d_w, None, d_b, d_t, *nothing)


def _may_overwrite() -> bool:
    """Whether the graph is freed after this backward, so that saved gradients may be scaled in place (saves one V x D)."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is not None and not keep_graph()


tied_loss.register_autograd(_backward, setup_context=_setup)


def _double_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("FusedTiedLoss has no second derivative: its backward cannot be differentiated (create_graph=True)")


tied_loss_backward.register_autograd(_double_backward, setup_context=_double_setup)
