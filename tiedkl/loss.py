"""The public face: `FusedTiedLoss`, `fused_tied_loss`, `explain`. tiedkl/arguments.py checks what users pass in."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import ops, transforms  # noqa: F401 - transforms registers the operators' vmap rules
from .arguments import Call, Number, Settings, check_call, check_settings
from .plan import Plan
from .problem import Options, Problem


class TiedLossOutput(NamedTuple):
    """What `return_terms=True` gives. All but `loss` are detached, and reduced like it: means, sums, or per token."""

    loss: Tensor  # ce + alpha * kl
    ce: Tensor  # cross-entropy in nats, smoothing and z-loss included
    kl: Tensor  # KL(similarity target || tempered softmax) in nats
    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor  # of the softmax, in nats
    accuracy: Tensor  # share of tokens whose target has the largest logit


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


def needs(c: Call, o: Options) -> int:
    if not torch.is_grad_enabled():
        return 0
    wanted = (
        (ops.requires_grad(c.h), ops.NEED_H),
        (ops.requires_grad(c.w), ops.NEED_W),
        (ops.requires_grad(c.b), ops.NEED_B),
        (o.target_grad and ops.requires_grad(c.t), ops.NEED_T),
    )
    return sum(bit for want, bit in wanted if want)


def _evaluate(settings: Settings, call: Call, shift: int) -> Tensor | TiedLossOutput:
    scalars = settings.scalars._replace(needs=needs(call, settings.scalars.options))
    loss, terms, scale, *_ = ops.evaluate(*call[:-1], *scalars.pack(), settings.impl)
    return output(settings, call.shape, shift, loss, terms, scale)


def output(
    settings: Settings, shape: torch.Size, shift: int, loss: Tensor, terms: Tensor, scale: Tensor
) -> Tensor | TiedLossOutput:
    """What the user gets, from `loss` () or (N,), `terms` (5, N) and `scale` (N,); `shape` is that of the targets."""

    def unflatten(x: Tensor) -> Tensor:
        x = x.reshape(shape)
        return x[..., :-shift] if shift else x

    reduction = settings.scalars.reduction
    if reduction == ops.NONE:
        loss = unflatten(loss)
    if not settings.return_terms:
        return loss
    if reduction == ops.NONE:
        reduced = [unflatten(x) for x in (terms * scale).unbind(0)]
    else:
        reduced = list((terms.double() @ scale.double()).to(terms.dtype).unbind(0))
    return TiedLossOutput(loss, *reduced)


class FusedTiedLoss(nn.Module):
    """Cross-entropy of a tied softmax plus the augmented loss of Inan, Khosravi and Socher (2017), in one fused pass.

    loss = CE + alpha * KL(q || r), with logits z = input weight^T + bias, r = softmax(z / tau), and the target
    q = softmax(weight[target] weight^T / tau): words whose embeddings resemble the target's are pulled up with it.
    No (tokens x vocabulary) matrix is ever held. The module owns no parameters: the model keeps the one tied matrix.
    Source: arXiv 1611.01462, equations 3.1-3.5; r includes the bias, the paper's does not (docs/math.md).

    Args:
        temperature: tau > 0 of both distributions; the paper uses 10 to 20. With tied embeddings and a `gamma` that
            stays, small ones are a strong loss that can end training: docs/compare.md, "The defaults".
        gamma: the paper's weight, alpha = gamma * temperature; 0.5 to 0.8 on PTB, 1.0 to 1.5 on WikiText-2.
        alpha: weight of the KL term as is; overrides `gamma`. 0 is plain cross-entropy at the cost of cross-entropy.
        ignore_index: targets with this value contribute neither loss nor gradient.
        reduction: "mean" over the token weights of valid tokens (or over `num_items`), "sum", or "none".
        label_smoothing: epsilon in [0, 1] of the cross-entropy, spread evenly over the vocabulary.
        z_loss: weight of l1^2, l1 the log-sum-exp of a token's logits.
        softcap: c > 0 replaces z by c tanh(z / c).
        target_grad: let the gradient flow into the similarity target; otherwise it is a constant.
        workspace_bytes: budget for scratch memory in bytes, default 64 MiB. A larger one can buy speed.
        impl: "auto", or one of "cpp", "triton", "cuda", "torch", "reference"; a named one that cannot run raises
            RuntimeError.
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
        self.settings = check_settings(
            temperature=temperature,
            gamma=gamma,
            alpha=alpha,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            target_grad=target_grad,
            workspace_bytes=workspace_bytes,
            impl=impl,
            return_terms=return_terms,
        )

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
        call = check_call(self.settings, input, weight, target, bias, target_weight, token_weight, num_items, shift)
        return _evaluate(self.settings, call, shift)

    def extra_repr(self) -> str:
        s, o = self.settings.scalars, self.settings.scalars.options
        reduction = ops.REDUCTIONS[s.reduction]
        return f"temperature={o.temperature:g}, alpha={o.alpha:g}, reduction={reduction!r}, impl={self.settings.impl!r}"


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
    return FusedTiedLoss(**options).forward(
        input,
        weight,
        target,
        bias,
        target_weight=target_weight,
        token_weight=token_weight,
        num_items=num_items,
        shift=shift,
    )


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
    settings = FusedTiedLoss(**options).settings
    c = check_call(settings, input, weight, target, bias, target_weight, token_weight, num_items, shift)
    o = settings.scalars.options
    problem = Problem(c.h, c.w, c.target, c.b, c.t, o)
    wanted = needs(c, o)
    plan = ops.plan_for(problem, settings.impl, options.get("workspace_bytes"), bool(wanted), bool(wanted & ops.NEED_W))
    return replace(plan, skipped=dict(plan.skipped))  # plans are cached: the caller gets a dictionary of their own
