"""The custom-op pair `tiedkl::tied_loss`, `tiedkl::tied_loss_backward`, their fakes and their autograd formula.

`evaluate` is how the library calls them.

For "mean" and "sum" the upstream gradient is one scalar: the forward op returns unscaled gradients in `kept_dtype` and
the backward op scales and casts them; bfloat16 ones are rounded again then, unless the scalar is a power of two. For
"none" the backward op walks again with the upstream weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends
from .plan import Plan, Shape, make_plan
from .problem import POISONED, SKIPPED, Grads, Needs, Options, Problem, Terms, acc_dtype, kept_dtype

log = logging.getLogger("tiedkl")

NEED_BITS = NEED_H, NEED_W, NEED_B, NEED_T = 1, 2, 4, 8  # bits of Scalars.needs
REDUCTIONS = ("mean", "sum", "none")
MEAN, SUM, NONE = range(3)
LARGE = 1 << 24  # elements; scaling fewer takes no longer than to launch a kernel of Triton's


class Scalars(NamedTuple):
    """Everything about one evaluation that is not a tensor or the name of a backend."""

    options: Options
    ignore_index: int
    reduction: int  # index into REDUCTIONS
    workspace_bytes: int  # -1: default
    needs: int  # gradients wanted, a sum of NEED_BITS

    @property
    def wanted(self) -> Needs:
        """`needs` as its fields."""
        return Needs(*(bool(self.needs & bit) for bit in NEED_BITS))

    def pack(self) -> tuple[list[float], list[int]]:
        """As the op's `floats` and `ints`."""
        o = self.options
        floats = [o.temperature, o.alpha, o.label_smoothing, o.z_loss, o.softcap]
        return floats, [int(o.target_grad), *self[1:]]

    @classmethod
    def unpack(cls, floats: list[float], ints: list[int]) -> Scalars:
        """The inverse of `pack`."""
        temperature, alpha, label_smoothing, z_loss, softcap = floats
        options = Options(temperature, alpha, label_smoothing, z_loss, softcap, bool(ints[0]))
        return cls(options, *ints[1:])


def plan_for(p: Problem, impl: str, workspace_bytes: int | None, grad: bool, weight_grad: bool = True) -> Plan:
    """The plan for one problem; weight_grad: whether that of w is among the gradients that are wanted, if any.

    RuntimeError when a named backend cannot run it.
    """
    o = p.options
    shape = Shape(
        tokens=p.h.shape[0],
        vocab=p.w.shape[0],
        width=p.h.shape[1],
        teacher_width=p.teacher.shape[1],
        kl=o.alpha != 0,
        grad=grad,
        target_grad=o.target_grad,
        weight_grad=weight_grad,
        acc_bytes=p.acc.itemsize,
        half=p.h.dtype != p.acc,
        threads=torch.get_num_threads() if p.h.device.type == "cpu" else 1,
    )
    return _plan(impl, p.h.device, p.h.dtype, shape, workspace_bytes)


@functools.lru_cache(maxsize=256)
def _plan(impl: str, device: torch.device, dtype: torch.dtype, shape: Shape, workspace_bytes: int | None) -> Plan:
    name, skipped = backends.choose(impl, device, dtype)
    return replace(make_plan(name, shape, backends.load(name).tuning(dtype, device), workspace_bytes), skipped=skipped)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for a type of device; nothing where it is off already, as switching costs time."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _run(p: Problem, g: Tensor | None, c: Scalars, impl: str) -> tuple[Terms, Grads]:
    """Plan and run one problem; g None means no gradient."""
    plan = plan_for(p, impl, c.workspace_bytes if c.workspace_bytes >= 0 else None, g is not None, c.wanted.w)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("N=%d V=%d D=%d %s\n%s", p.h.shape[0], p.w.shape[0], p.h.shape[1], p.h.dtype, plan)
    backend = backends.load(plan.impl)
    with without_autocast(p.h.device.type):
        if g is None:
            return backend.forward(p, plan), Grads(None, None, None, None)
        return backend.backward(p, plan, g, c.wanted)


def _targets(target: Tensor, n_vocab: int, ignore_index: int) -> tuple[Tensor, bool]:
    """Targets as int64 with ignored and, off the CPU, invalid ones marked; and whether all are known to be valid.

    ValueError for an invalid one on the CPU, and elsewhere under TIEDKL_CHECK_TARGETS=1.
    """
    on_cpu = target.device.type == "cpu"
    if on_cpu and target.numel() and not 0 <= ignore_index < n_vocab:
        low, high = torch.aminmax(target)
        if low.item() >= 0 and high.item() < n_vocab:
            return target.to(torch.int64), True
    y = torch.where(target == ignore_index, SKIPPED, target.to(torch.int64))
    invalid = ((y < 0) & (target != ignore_index)) | (y >= n_vocab)
    if not on_cpu and not environment_flag("TIEDKL_CHECK_TARGETS"):
        return torch.where(invalid, POISONED, y), False
    if bool(invalid.any()):
        where = int(invalid.nonzero()[0, 0])
        raise ValueError(
            f"target[{where}]={int(target[where])} is outside [0, {n_vocab}) and is not ignore_index={ignore_index} "
            f"({int(invalid.sum())} such targets)"
        )
    return y, False


def environment_flag(name: str) -> bool:
    """Whether environment variable `name` is set to something other than 0, false, no, off or nothing."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def token_scale(
    y: Tensor, all_valid: bool, weight: Tensor | None, num_items: Tensor | None, reduction: int, acc: torch.dtype
) -> Tensor:
    """What each token's loss is multiplied with, (N,): its weight, divided by the normaliser for "mean"."""
    if all_valid and weight is None and num_items is None:
        return torch.full(y.shape, 1 / len(y) if reduction == MEAN else 1.0, dtype=acc, device=y.device)
    scale = (y >= 0).to(acc) if weight is None else torch.where(y >= 0, weight.to(acc), 0.0)
    if reduction == MEAN:
        norm = scale.sum() if num_items is None else num_items.to(acc)
        scale = scale * torch.where(norm != 0, 1 / norm, 0.0)
    return scale


def _tied_loss(
    h: Tensor,
    w: Tensor,
    target: Tensor,
    b: Tensor | None,
    t: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    floats: list[float],
    ints: list[int],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, terms (5, N), scale (N,), d_h, d_w, d_b, d_t); gradients are empty unless their bit of `needs` is set.

    `floats` and `ints` are the fields of `Scalars`: dispatch time grows with the square of the number of arguments.
    """
    c = Scalars.unpack(floats, ints)
    y, all_valid = _targets(target, w.shape[0], c.ignore_index)
    p = Problem(h, w, y, b, t, c.options)
    scale = token_scale(y, all_valid, token_weight, num_items, c.reduction, p.acc)
    terms, grads = _run(p, scale if c.needs and c.reduction != NONE else None, c, impl)
    per_token = torch.add(terms.ce, terms.kl, alpha=c.options.alpha) if c.options.alpha else terms.ce
    if p.y.device.type != "cpu":
        per_token = torch.where(p.y == POISONED, float("nan"), per_token)
        scale = torch.where(p.y == POISONED, 1.0, scale)
    total = c.reduction != NONE
    loss = (scale.double() @ per_token.double()).to(p.acc) if total else scale * per_token
    kept = kept_dtype(h.dtype)
    d_h, d_w, d_b, d_t = (h.new_empty(0, dtype=kept) if d is None else d.to(kept) for d in grads)
    return loss, torch.stack(terms), scale, d_h, d_w, d_b, d_t


tied_loss = torch.library.custom_op("tiedkl::tied_loss", _tied_loss, mutates_args=())


@tied_loss.register_fake
def _(h, w, target, b, t, token_weight, num_items, floats, ints, impl):  # type: ignore[no-untyped-def]
    acc, n, c = acc_dtype(h.dtype), h.shape[0], Scalars.unpack(floats, ints)
    now = c.reduction != NONE

    def grad(x: Tensor | None, bit: int) -> Tensor:
        return h.new_empty(x.shape if now and x is not None and c.needs & bit else 0, dtype=kept_dtype(h.dtype))

    loss = h.new_empty(() if now else n, dtype=acc)
    grads = grad(h, NEED_H), grad(w, NEED_W), grad(b, NEED_B), grad(t, NEED_T)
    return loss, h.new_empty((5, n), dtype=acc), h.new_empty(n, dtype=acc), *grads


def factor(upstream: Tensor) -> Tensor:
    """A scalar to multiply with: a GPU would round one without a dimension to the other's dtype first."""
    return upstream.reshape(1) if upstream.device.type == "cuda" else upstream


def scaled_by_kernel(d: Tensor) -> bool:
    """Whether a kernel of Triton's is to scale d: of mixed dtypes, PyTorch's takes four times what its traffic does."""
    return (
        d.device.type == "cuda"
        and d.numel() >= LARGE
        and d.is_contiguous()
        and backends.load("triton").unsupported(d.device, d.dtype) is None
    )


def scale_(d: Tensor, upstream: Tensor) -> Tensor:
    """d times the upstream gradient, a scalar, in place."""
    if scaled_by_kernel(d):
        return backends.load("triton").scale_(d, upstream.reshape(1).float())
    return d.mul_(factor(upstream)) if d.numel() else d


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
    floats: list[float],
    ints: list[int],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_h, d_w, d_b, d_t) in their inputs' dtypes: `saved` times a scalar upstream, or a new walk for one (N,)."""
    if saved:
        scaled = [(d, h.new_empty(d.shape)) for d in saved]
        return tuple(torch.mul(d, factor(upstream), out=out) if d.numel() else out for d, out in scaled)  # type: ignore[return-value]
    c = Scalars.unpack(floats, ints)
    y, all_valid = _targets(target, w.shape[0], c.ignore_index)
    p = Problem(h, w, y, b, t, c.options)
    g = upstream.to(p.acc) * token_scale(y, all_valid, token_weight, None, NONE, p.acc)
    grads = _run(p, g, c, impl)[1]
    return tuple(h.new_empty(0) if d is None else d.to(h.dtype) for d in grads)  # type: ignore[return-value]


@tied_loss_backward.register_fake
def _(upstream, saved, h, w, target, b, t, token_weight, floats, ints, impl):  # type: ignore[no-untyped-def]
    needs = Scalars.unpack(floats, ints).needs
    inputs = ((h, NEED_H), (w, NEED_W), (b, NEED_B), (t, NEED_T))
    return tuple(h.new_empty(x.shape if x is not None and needs & bit else 0) for x, bit in inputs)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w, target, b, t, token_weight, _, floats, ints, impl = inputs
    c = Scalars.unpack(floats, ints)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has = (b is not None, t is not None, token_weight is not None)
    ctx.scalars, ctx.needs = (floats, ints, impl), c.needs
    grads = [] if c.reduction == NONE else output[3:]
    optional = [x for x in (b, t, token_weight) if x is not None]
    ctx.save_for_backward(h, w, target, *optional, *grads)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return gradients(ctx, upstream, tied_loss_backward)


def gradients(ctx: Any, upstream: Tensor | None, backward_op: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    nothing = (None,) * 5
    if upstream is None:
        return (None,) * 5 + nothing
    if any(ctx.needs_input_grad[i] and not ctx.needs & bit for i, bit in ((0, NEED_H), (1, NEED_W), (3, NEED_B))):
        raise RuntimeError(
            "FusedTiedLoss was traced where no gradient was wanted, such as torch.export under torch.no_grad, and has "
            "none now: trace it with gradients enabled"
        )
    if not ctx.needs:
        return (None,) * 5 + nothing
    h, w, target, *rest = ctx.saved_tensors
    b, t, token_weight = (rest.pop(0) if has else None for has in ctx.has)
    saved = rest
    if saved and may_overwrite(saved):
        grads = tuple(scale_(d, upstream).to(h.dtype) for d in saved)
    else:
        grads = backward_op(upstream, saved, h, w, target, b, t, token_weight, *ctx.scalars)
    d_h, d_w, d_b, d_t = (d if ctx.needs & bit else None for d, bit in zip(grads, NEED_BITS, strict=True))
    return (d_h, d_w, None, d_b, d_t, *nothing)


def may_overwrite(saved: list[Tensor]) -> bool:
    """Whether the graph is freed after this backward: saved gradients may be scaled in place, which saves one V x D."""
    if torch.is_grad_enabled() or any(type(d) is not Tensor for d in saved):  # a subclass: somebody is tracing
        return False
    if torch._C._are_functorch_transforms_active():  # the upstream gradient may be a batch of them
        return False
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is not None and not keep_graph()


tied_loss.register_autograd(_backward, setup_context=setup)


def no_forward_mode(ctx: Any, *tangents: Any) -> None:
    raise RuntimeError("FusedTiedLoss has no forward-mode derivative (torch.func.jvp, jacfwd): use reverse mode")


class TiedLoss(torch.autograd.Function):
    """`tied_loss` without the dispatcher, which takes a tenth of a small call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = _tied_loss(*args)
        setup(ctx, args, output)  # a setup_context would have every call's signature inspected
        return output

    backward = staticmethod(_backward)
    jvp = staticmethod(no_forward_mode)


def requires_grad(x: Tensor | None) -> bool:
    """Whether `x` requires a gradient, be it of an outer transform of torch.func: a batched tensor itself says no."""
    while x is not None and not x.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return x is not None


def evaluate(*args: Any) -> tuple[Tensor, ...]:
    """`tied_loss`; called directly where nobody is tracing, compiling or wrapping tensors."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # without fullgraph, torch.compile then leaves the function to eager
            raise RuntimeError("torch.compile cannot trace FusedTiedLoss under torch.func: do not set fullgraph=True")
        from .transforms import transformed

        return transformed(*args)
    if torch.compiler.is_compiling():
        return tied_loss(*args)
    watched = torch._C._len_torch_dispatch_stack() or any(
        isinstance(x, Tensor) and type(x) not in (Tensor, Parameter) for x in args
    )
    return tied_loss(*args) if watched else TiedLoss.apply(*args)


def double_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "FusedTiedLoss has no second derivative: its backward cannot be differentiated (create_graph=True)"
    )


tied_loss_backward.register_autograd(double_backward, setup_context=double_setup)
