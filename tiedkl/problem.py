"""The vocabulary every backend shares: what goes in (`Problem`), and what comes out (`Terms`, `Grads`).

Symbols are those of docs/design.md: N tokens, V vocabulary rows, D width; h, w, b, y inputs; t the matrix that gives
the similarity target (w itself unless `target_weight` was given).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SKIPPED = -1  # a target that is ignored: no loss, no gradient
POISONED = -2  # a target outside [0, V) on a device where raising would cost a synchronisation: its loss is NaN


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, statistics and unscaled gradients: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which unscaled gradients wait for the upstream one: bfloat16 has float32's range, float16 has not."""
    return dtype if dtype == torch.bfloat16 else acc_dtype(dtype)


@dataclass(frozen=True)
class Options:
    """The scalars of the loss. alpha = 0 means plain cross-entropy, softcap = 0 means none."""

    temperature: float = 20.0
    alpha: float = 10.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    target_grad: bool = False


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    h: bool = False
    w: bool = False
    b: bool = False
    t: bool = False

    @property
    def any(self) -> bool:
        return self.h or self.w or self.b or self.t


@dataclass(frozen=True)
class Problem:
    """One loss evaluation, flattened and checked."""

    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    y: Tensor  # (N,) int64; in [0, V), or SKIPPED, or POISONED
    b: Tensor | None  # (V,)
    t: Tensor | None  # (V, D') similarity source; None means w
    options: Options

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.h.dtype)

    @property
    def teacher(self) -> Tensor:
        """The matrix whose rows define the similarity target, (V, D')."""
        return self.w if self.t is None else self.t

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with every floating tensor converted to `dtype`."""
        b, t = self.b, self.t
        return replace(
            self,
            h=self.h.to(dtype),
            w=self.w.to(dtype),
            b=None if b is None else b.to(dtype),
            t=None if t is None else t.to(dtype),
        )


class Terms(NamedTuple):
    """Per-token results, each (N,) in the accumulation dtype and zero for skipped tokens."""

    ce: Tensor  # cross-entropy with smoothing and z-loss
    kl: Tensor  # KL(q || r); zero when alpha is zero
    lse: Tensor  # l1, the log-sum-exp of the logits
    entropy: Tensor  # of softmax(z), in nats
    correct: Tensor  # 1 where no logit exceeds the target's


class Grads(NamedTuple):
    """Gradients of sum_n g_n (CE_n + alpha KL_n), None where not wanted.

    In the accumulation dtype, or in `kept_dtype` where a backend has a sum complete at once.
    """

    h: Tensor | None  # (N, D)
    w: Tensor | None  # (V, D)
    b: Tensor | None  # (V,)
    t: Tensor | None  # (V, D')
