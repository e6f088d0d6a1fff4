"""The specification as a backend: in float64, materialising several (N, V) matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..plan import Plan, Tuning
from ..problem import Grads, Needs, Problem, Terms

TUNING = Tuning(
    z_buffers=24,  # in float64
    s_buffers=0,
    row_buffers=0,
    token_block=1 << 62,
    min_token_block=1,
    min_vocab_block=1 << 62,
    panel=1 << 62,
)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Every device and floating dtype is supported."""
    return None


def tuning(dtype: torch.dtype, device: torch.device) -> Tuning:
    """The same for every dtype and device."""
    return TUNING


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms; the plan is ignored."""
    return Terms(*(x.to(problem.acc) for x in reference.forward(problem.to(torch.float64))))


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients; the plan is ignored."""
    terms, grads = reference.backward(problem.to(torch.float64), g.double(), needs)
    return (
        Terms(*(x.to(problem.acc) for x in terms)),
        Grads(*(None if d is None else d.to(problem.acc) for d in grads)),
    )
