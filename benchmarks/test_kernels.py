"""Every kernel, through the part of a walk that runs it.

A walk is made of few kernels: which of them run depends on what is asked for. `logits` runs the logits product and the
row statistics alone; each other part adds one kernel, so differences between rows are what it takes.

    logits             cross-entropy forward: logits and their statistics
    similarities       + KL: similarity product, its statistics, the divergence
    d_h, d_w, d_b      + one gradient of cross-entropy: the gradient row kernel, and one product or sum
    divergence         d_h with KL
    target_gradient    d_w with the gradient through the similarity target
    softcap, smoothing the row kernels' options
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tiedkl import backends, reference
from tiedkl.bench.measure import BOUND
from tiedkl.bench.shapes import Workload
from tiedkl.bench.steps import inputs, relative
from tiedkl.ops import plan_for
from tiedkl.problem import Needs, Options, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = Options(alpha=0.0)
CHECKED = 64


@dataclass(frozen=True)
class Part:
    options: Options
    needs: Needs
    bias: bool = False


PARTS = {
    "logits": Part(PLAIN, Needs()),
    "similarities": Part(Options(), Needs()),
    "d_h": Part(PLAIN, Needs(h=True)),
    "d_w": Part(PLAIN, Needs(w=True)),
    "d_b": Part(PLAIN, Needs(b=True), bias=True),
    "divergence": Part(Options(), Needs(h=True)),
    "target_gradient": Part(Options(target_grad=True), Needs(w=True)),
    "softcap": Part(replace(PLAIN, softcap=30.0), Needs(h=True)),
    "smoothing": Part(replace(PLAIN, label_smoothing=0.1, z_loss=1e-4), Needs(h=True)),
}


def problem(part: Part, size: tuple[int, int, int], dtype: str) -> Problem:
    h, w, y = inputs(Workload(*size, dtype, DEVICE, targets="zipf"))
    b = torch.linspace(-0.5, 0.5, len(w), device=DEVICE).to(w.dtype) if part.bias else None
    return Problem(h.detach(), w.detach(), y, b, None, part.options)


def run(p: Problem, impl: str, needs: Needs) -> list[torch.Tensor]:
    """CE, KL and the gradients that are wanted."""
    backend = backends.load(impl)
    plan = plan_for(p, impl, None, needs.any)
    if not needs.any:
        terms = backend.forward(p, plan)
        return [terms.ce, terms.kl]
    g = torch.full((len(p.y),), 1 / len(p.y), dtype=p.acc, device=p.h.device)
    terms, grads = backend.backward(p, plan, g, needs)
    return [terms.ce, terms.kl, *(d for d in grads if d is not None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("impl", [name for name in backends.BACKENDS if name != "reference"])
def test_kernel(benchmark: Any, size: tuple[int, int, int], impl: str, part: str, dtype: str) -> None:
    why = backends.load(impl).unsupported(torch.device(DEVICE), getattr(torch, dtype))
    if why:
        pytest.skip(why)
    p, needs = problem(PARTS[part], size, dtype), PARTS[part].needs
    few = replace(p, h=p.h[:CHECKED], y=p.y[:CHECKED])
    right = few.to(torch.float64)
    g = torch.full((len(few.y),), 1 / len(few.y), dtype=torch.float64, device=p.h.device)
    terms, grads = reference.backward(right, g, needs)
    wanted = [terms.ce, terms.kl, *(d for d in grads if d is not None)]
    for found, true in zip(run(few, impl, needs), wanted, strict=True):
        assert relative(found, true) <= BOUND[dtype]

    def timed() -> None:
        run(p, impl, needs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{part} {dtype}"
    benchmark.pedantic(timed, rounds=3, warmup_rounds=1)
