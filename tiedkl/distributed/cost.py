"""Bytes of one step: which collectives `VocabParallelTiedLoss` calls, and with how much."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..problem import Options, acc_dtype
from .collectives import HEADER
from .walk import reduced_sums

WIDE = 8  # bytes of the float64 in which sums travel


class Collective(NamedTuple):
    """One call of a collective."""

    what: str
    op: str  # "all_reduce", "all_gather" or "reduce_scatter"
    size: int  # bytes of the whole tensor: what is reduced, gathered, or scattered
    ranks: int

    @property
    def sent(self) -> int:
        """Bytes that each rank sends, as ring algorithms do it: (P-1)/P of the tensor, twice for all_reduce."""
        return -(-self.size * (self.ranks - 1) * (2 if self.op == "all_reduce" else 1) // self.ranks)


def traffic(
    n_tokens: int,
    width: int,
    distinct: int,
    ranks: int,
    *,
    dtype: torch.dtype = torch.float32,
    valid: int | None = None,
    teacher_width: int | None = None,
    kl: bool = True,
    label_smoothing: bool = False,
    target_grad: bool = False,
    token_weight: int = 0,
    per_token: bool = False,
    backward: bool = True,
    input_grad: bool = True,
    sequence_parallel: bool = False,
    longest: int | None = None,
) -> list[Collective]:
    """The collectives of one forward and backward, in order; sum of `.sent` is what a rank sends.

    Args:
        n_tokens, width, distinct, ranks: N over all ranks, D, number of distinct valid targets W, process group's size.
        dtype: of `input` and the matrix. valid: tokens that are not ignored, default N.
        teacher_width: D' of a `target_weight`, default D. kl: alpha is not zero. label_smoothing: it is not zero.
        target_grad: the option, with a gradient wanted. per_token: reduction="none".
        token_weight: bytes of an element of it, where given. backward: gradients are wanted and taken.
        input_grad: the gradient of `input` is added up. sequence_parallel: the option.
        longest: tokens of the rank that has most, default N / ranks rounded up.
    """
    n = n_tokens if valid is None else valid
    w, d_t = (distinct if kl else 0), width if teacher_width is None else teacher_width
    acc = acc_dtype(dtype).itemsize
    padded = ranks * (-(-n_tokens // ranks) if longest is None else longest)
    sums = len(reduced_sums(Options(alpha=float(kl), label_smoothing=float(label_smoothing), target_grad=target_grad)))
    calls: list[tuple[str, str, int]] = [("sizes and checks", "all_gather", 8 * HEADER * ranks)]
    if sequence_parallel:
        calls.append(("target", "all_gather", 8 * padded))
        calls.append(("token_weight", "all_gather", token_weight * padded))
        calls.append(("input", "all_gather", dtype.itemsize * padded * width))
    calls.append(("rows of the targets", "all_reduce", dtype.itemsize * w * d_t))
    calls.append(("maxima", "all_reduce", WIDE * (n + w)))
    calls.append(("sums", "all_reduce", WIDE * (sums * n + w)))
    with_mean = 2 if target_grad and backward else 1
    calls.append(("KL", "all_reduce", WIDE * (1 if per_token else with_mean) * n if kl else 0))
    if backward and per_token:
        calls.append(("upstream gradient", "all_gather", acc * padded if sequence_parallel else 0))
        calls.append(("KL and its mean", "all_reduce", WIDE * 2 * n if kl and target_grad else 0))
    if target_grad and backward and kl:
        calls.append(("gradient of the targets' rows", "all_reduce", acc * w * d_t))
    if backward and sequence_parallel:
        calls.append(("gradient of input", "reduce_scatter", acc * padded * width if input_grad else 0))
    elif backward and input_grad:
        calls.append(("gradient of input", "all_reduce", acc * n_tokens * width))
    return [Collective(what, op, size, ranks) for what, op, size in calls if size]
