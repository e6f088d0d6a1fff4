"""The public face: `FusedTiedLoss`, `fused_tied_loss`, `explain`, and every check of what users pass in."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import backends, ops
from .plan import Plan
from .problem import Options, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Number = int | float


class TiedLossOutput(NamedTuple):
    """What `return_terms=True` gives. All but `loss` are detached, and reduced like it: means, sums, or per token."""

    loss: Tensor  # ce + alpha * kl
    ce: Tensor  # cross-entropy in nats, smoothing and z-loss included
    kl: Tensor  # KL(similarity target || tempered softmax) in nats
    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor  # of the softmax, in nats
    accuracy: Tensor  # share of tokens whose target has the largest logit


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high or value == math.inf or (open_low and value == low):  # NaN fails the first
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}={value} is outside {interval}")
    return float(value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


class LossOptions(TypedDict, total=False):
    """The keyword arguments of `FusedTiedLoss`, for `fused_tied_loss` and `explain`."""

    temperature: float
    gamma: float
    alpha: float | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    target_grad: bool
    workspace_bytes: int | None
    impl: str
    return_terms: bool


class _Settings(NamedTuple):
    scalars: ops.Scalars  # needs = 0
    impl: str
    return_terms: bool


def _settings(
    temperature: float = 20.0,
    gamma: float = 0.5,
    alpha: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    target_grad: bool = False,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    return_terms: bool = False,
) -> _Settings:
    """Check everything that is not a tensor. TypeError for types, ValueError for ranges and enums."""
    temperature = _number("temperature", temperature, 0.0, math.inf, open_low=True)
    gamma = _number("gamma", gamma, 0.0, math.inf)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    for name, flag in (("target_grad", target_grad), ("return_terms", return_terms)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if workspace_bytes is not None:
        if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
            raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={workspace_bytes} must be positive")
    options = Options(
        temperature=temperature,
        alpha=gamma * temperature if alpha is None else _number("alpha", alpha, 0.0, math.inf),
        label_smoothing=_number("label_smoothing", label_smoothing, 0.0, 1.0),
        z_loss=_number("z_loss", z_loss, 0.0, math.inf),
        softcap=0.0 if softcap is None else _number("softcap", softcap, 0.0, math.inf, open_low=True),
        target_grad=target_grad,
    )
    scalars = ops.Scalars(
        options=options,
        ignore_index=ignore_index,
        reduction=ops.REDUCTIONS.index(_choice("reduction", reduction, ops.REDUCTIONS)),
        workspace_bytes=-1 if workspace_bytes is None else workspace_bytes,
        needs=0,
    )
    return _Settings(scalars, _choice("impl", _impl(impl), ("auto", *backends.BACKENDS)), return_terms)


def _tensor(name: str, x: object, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, input is on {device}")
    return x


class _Call(NamedTuple):
    # in the order of the op's arguments
    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    target: Tensor  # (N,)
    b: Tensor | None
    t: Tensor | None
    token_weight: Tensor | None  # (N,)
    num_items: Tensor | None  # ()
    shape: torch.Size  # of `target`


def _arguments(
    settings: _Settings,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    target_weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Number | Tensor | None,
    shift: int,
) -> _Call:
    """Check, autocast, shift and flatten the tensors. TypeError for dtypes, ValueError for shapes and devices."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    device = input.device
    weight, target = _tensor("weight", weight, device), _tensor("target", target, device)
    floats = {"input": input, "weight": weight}
    if bias is not None:
        floats["bias"] = _tensor("bias", bias, device)
    if target_weight is not None:
        floats["target_weight"] = _tensor("target_weight", target_weight, device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        floats = {
            k: x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for k, x in floats.items()
        }
    input, weight = floats["input"], floats["weight"]
    bias, target_weight = floats.get("bias"), floats.get("target_weight")
    if input.dtype not in DTYPES:
        raise TypeError(f"input.dtype={input.dtype} is not one of {', '.join(map(str, DTYPES))}")
    for name, x in floats.items():
        if x.dtype != input.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} does not match input.dtype={input.dtype}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target.dtype={target.dtype} is not torch.int64 or torch.int32")
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension (..., D), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, D), got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight.shape[0]=0: the vocabulary is empty")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input.shape[-1]={input.shape[-1]} does not match weight.shape[1]={weight.shape[1]}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target.shape={tuple(target.shape)} does not match input.shape[:-1]={tuple(input.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias.shape={tuple(bias.shape)} does not match weight.shape[:1]={tuple(weight.shape[:1])}")
    if target_weight is not None and (target_weight.dim() != 2 or target_weight.shape[0] != weight.shape[0]):
        raise ValueError(
            f"target_weight.shape={tuple(target_weight.shape)} does not match (weight.shape[0]={weight.shape[0]}, D')"
        )
    if token_weight is not None:
        token_weight = _tensor("token_weight", token_weight, device)
        if not token_weight.is_floating_point():
            raise TypeError(f"token_weight.dtype={token_weight.dtype} is not a floating dtype")
        if token_weight.shape != target.shape:
            raise ValueError(
                f"token_weight.shape={tuple(token_weight.shape)} does not match target.shape={tuple(target.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(
                "token_weight requires a gradient, but it is treated as a constant: pass token_weight.detach()"
            )
    count = _num_items(num_items, ops.REDUCTIONS[settings.scalars.reduction], device)
    target, token_weight = _shift(target, token_weight, shift, settings.scalars.ignore_index)
    return _Call(
        h=input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input,
        w=weight,
        target=target.reshape(-1),
        b=bias,
        t=target_weight,
        token_weight=None if token_weight is None else token_weight.reshape(-1),
        num_items=count,
        shape=target.shape,
    )


def _num_items(num_items: Number | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_items applies to reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must hold one number, got shape {tuple(num_items.shape)}")
        return num_items.detach().reshape(()).to(device)
    value = _number("num_items", num_items, 0.0, math.inf, open_low=True)
    return torch.tensor(value, dtype=torch.float64, device=device)  # a count above 2^24 is no float32


def _shift(target: Tensor, token_weight: Tensor | None, shift: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets `shift` places ahead, the last ones ignored: the input itself is not copied."""
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift must be an int, got {type(shift).__name__}")
    if shift == 0:
        return target, token_weight
    if target.dim() == 0 or not 0 < shift <= target.shape[-1]:
        raise ValueError(f"shift={shift} is outside [0, target.shape[-1]] for target.shape={tuple(target.shape)}")
    ahead = torch.full_like(target, ignore_index, memory_format=torch.contiguous_format)
    ahead[..., :-shift] = target[..., shift:]
    if token_weight is not None:
        weights = torch.zeros_like(token_weight, memory_format=torch.contiguous_format)
        weights[..., :-shift] = token_weight[..., shift:]
        token_weight = weights
    return ahead, token_weight


def _needs(c: _Call, o: Options) -> int:
    if not torch.is_grad_enabled():
        return 0
    through_t = o.target_grad and c.t is not None and c.t.requires_grad
    wanted = (
        (c.h.requires_grad, ops.NEED_H),
        (c.w.requires_grad, ops.NEED_W),
        (c.b is not None and c.b.requires_grad, ops.NEED_B),
        (through_t, ops.NEED_T),
    )
    return sum(bit for want, bit in wanted if want)


def _evaluate(settings: _Settings, call: _Call, shift: int) -> Tensor | TiedLossOutput:
    scalars = settings.scalars._replace(needs=_needs(call, settings.scalars.options))
    loss, terms, scale, *_ = ops.evaluate(*call[:-1], *scalars.pack(), settings.impl)

    def unflatten(x: Tensor) -> Tensor:
        x = x.reshape(call.shape)
        return x[..., :-shift] if shift else x

    if scalars.reduction == ops.NONE:
        loss = unflatten(loss)
    if not settings.return_terms:
        return loss
    if scalars.reduction == ops.NONE:
        reduced = [unflatten(x) for x in (terms * scale).unbind(0)]
    else:
        reduced = list((terms.double() @ scale.double()).to(terms.dtype).unbind(0))
    return TiedLossOutput(loss, *reduced)


def _impl(impl: str) -> str:
    """The `impl` argument, or TIEDKL_IMPL where it says "auto"."""
    return os.environ.get("TIEDKL_IMPL") or impl if impl == "auto" else impl


def fused_tied_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Number | Tensor | None = None,
    shift: int = 0,
    **options: Unpack[LossOptions],
) -> Tensor | TiedLossOutput:
    """Tied cross-entropy + alpha * KL(softmax(w[y] w^T / tau) || softmax(z / tau)), z = input weight^T + bias.

    The functional form of `FusedTiedLoss`, which documents the arguments and the options, their defaults and errors.
    """
    settings = _settings(**options)
    call = _arguments(settings, input, weight, target, bias, target_weight, token_weight, num_items, shift)
    return _evaluate(settings, call, shift)


class FusedTiedLoss(nn.Module):
    """Cross-entropy of a tied softmax plus the augmented loss of Inan, Khosravi and Socher (2017), in one fused pass.

    loss = CE + alpha * KL(q || r), with logits z = input weight^T + bias, r = softmax(z / tau), and the target
    q = softmax(weight[target] weight^T / tau): words whose embeddings resemble the target's are pulled up with it.
    No (tokens x vocabulary) matrix is ever held. The module owns no parameters: the model keeps the one tied matrix.
    Source: arXiv 1611.01462, equations 3.1-3.5.

    Args:
        temperature: tau > 0 of both distributions; the paper uses 10 to 20.
        gamma: the paper's weight, alpha = gamma * temperature; 0.5 to 0.8 on PTB, 1.0 to 1.5 on WikiText-2.
        alpha: weight of the KL term as is; overrides `gamma`. 0 is plain cross-entropy at the cost of cross-entropy.
        ignore_index: targets with this value contribute neither loss nor gradient.
        reduction: "mean" over the token weights of valid tokens (or over `num_items`), "sum", or "none".
        label_smoothing: epsilon in [0, 1] of the cross-entropy, spread evenly over the vocabulary.
        z_loss: weight of l1^2, l1 the log-sum-exp of a token's logits.
        softcap: c > 0 replaces z by c tanh(z / c).
        target_grad: let the gradient flow into the similarity target; otherwise it is a constant.
        workspace_bytes: budget for scratch memory in bytes, default 64 MiB. A larger one can buy speed.
        impl: "auto", or one of "cpp", "torch", "reference"; a named one that cannot run raises RuntimeError.
        return_terms: return a `TiedLossOutput` instead of the loss alone, at no extra pass.

    Arguments of a call, `loss_fn(input, weight, target, bias=None, *, target_weight=None, ...)`:
        input: (..., D) hidden states; float32, bfloat16, float16 or float64, any strides.
        weight: (V, D), same dtype: the embedding matrix.
        target: (...) int64 or int32 ids in [0, V), or `ignore_index`.
        bias: (V,), same dtype.
        target_weight: (V, D') replaces `weight` in the similarity target, e.g. pretrained vectors.
        token_weight: (...) floating; multiplies each token's loss, and defines the mean. A constant.
        num_items: divides the sum instead of the weights' sum, e.g. the tokens of all accumulated batches.
        shift: k > 0 lets input[..., :-k, :] predict target[..., k:], without a copy of the input.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or for reduction="none" shaped like `target`, its
        last dimension shorter by `shift`. 0 with zero gradients when no token is valid.

    Raises:
        TypeError: for types and dtypes. ValueError: for shapes, ranges, devices and enums, and on the CPU for a target
        outside [0, V); on other devices such a target makes its loss NaN unless TIEDKL_CHECK_TARGETS=1.
        RuntimeError: when `impl` cannot run, or when the backward pass is differentiated again.
    """

    def __init__(
        self,
        *,
        temperature: float = 20.0,
        gamma: float = 0.5,
        alpha: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        target_grad: bool = False,
        workspace_bytes: int | None = None,
        impl: str = "auto",
        return_terms: bool = False,
    ):
        super().__init__()
        self.settings = _settings(
            temperature, gamma, alpha, ignore_index, reduction, label_smoothing, z_loss, softcap, target_grad,
            workspace_bytes, impl, return_terms,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        target_weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: Number | Tensor | None = None,
        shift: int = 0,
    ) -> Tensor | TiedLossOutput:
        """The loss; see the class for shapes and errors."""
        call = _arguments(self.settings, input, weight, target, bias, target_weight, token_weight, num_items, shift)
        return _evaluate(self.settings, call, shift)

    def extra_repr(self) -> str:
        s, o = self.settings.scalars, self.settings.scalars.options
        reduction = ops.REDUCTIONS[s.reduction]
        return f"temperature={o.temperature:g}, alpha={o.alpha:g}, reduction={reduction!r}, impl={self.settings.impl!r}"


def explain(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Number | Tensor | None = None,
    shift: int = 0,
    **options: Unpack[LossOptions],
) -> Plan:
    """How `fused_tied_loss` with the same arguments would run: backend, strategy, blocks, scratch, GEMM count.

    Nothing is computed; `print(explain(...))` is readable. Raises what the call itself would raise for its arguments.
    """
    settings = _settings(**options)
    c = _arguments(settings, input, weight, target, bias, target_weight, token_weight, num_items, shift)
    o = settings.scalars.options
    problem = Problem(c.h, c.w, c.target, c.b, c.t, o)
    plan = ops.plan_for(problem, settings.impl, options.get("workspace_bytes"), bool(_needs(c, o)))
    return replace(plan, skipped=dict(plan.skipped))  # plans are cached: the caller gets a dictionary of their own
