"""The loss under the transforms of torch.func (grad, vjp, jacrev, vmap), which know no custom operator with a gradient.

torch.compile cannot trace these autograd functions, and is kept away from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._compile import _disable_dynamo

from .ops import (
    double_backward,
    double_setup,
    evaluate,
    gradients,
    no_forward_mode,
    setup,
    tied_loss,
    tied_loss_backward,
)


def _vmap(
    call: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Any, *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each element of the batch: the backends have no batch dimension."""
    flat, spec = pytree.tree_flatten(args)
    dims = pytree._broadcast_to_and_flatten(in_dims, spec) or []

    def element(i: int) -> tuple[Tensor, ...]:
        here = [x if d is None else x.select(d, i) for x, d in zip(flat, dims, strict=True)]
        return call(*pytree.tree_unflatten(here, spec))

    columns = list(zip(*map(element, range(info.batch_size)), strict=True))
    return tuple(torch.stack(x) for x in columns), (0,) * len(columns)


# For a gradient that was set up outside the vmap. TransformedLoss has rules of its own.
tied_loss.register_vmap(functools.partial(_vmap, tied_loss))
tied_loss_backward.register_vmap(functools.partial(_vmap, tied_loss_backward))


@_disable_dynamo
def transformed(*args: Any) -> tuple[Tensor, ...]:
    """`ops.evaluate` while a transform is active."""
    return TransformedLoss.apply(*args)


class TransformedLoss(torch.autograd.Function):
    """`tied_loss` under torch.func's transforms, which know no custom operator with a gradient of its own."""

    setup_context = staticmethod(setup)
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tied_loss(*args)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return gradients(ctx, upstream, _transformed_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap(evaluate, info, in_dims, *args)


@_disable_dynamo
def _transformed_backward(upstream: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    return TransformedBackward.apply(upstream, *args, *saved)


class TransformedBackward(torch.autograd.Function):
    """`tied_loss_backward` under torch.func's transforms. The saved gradients come last: each is an argument."""

    @staticmethod
    def forward(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tied_loss_backward(upstream, list(args[9:]), *args[:9])

    setup_context = staticmethod(double_setup)
    backward = staticmethod(double_backward)
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap(TransformedBackward.apply, info, in_dims, *args)
