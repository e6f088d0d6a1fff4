"""Inputs, steps, their errors and their time: the parts of bench_gpu.py that know nothing of its tables."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from _candidates import ALPHA, TAU, Candidate
from torch import Tensor

from tiedkl import reference
from tiedkl.problem import Needs, Options, Problem

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


def zipf_targets(n: int, v: int, generator: torch.Generator) -> Tensor:
    """(n,) ids with natural-text statistics: frequency 1 / (rank + 2.7), ranks shuffled over the vocabulary."""
    p = 1 / (torch.arange(v, dtype=torch.float64) + 2.7)
    return torch.randperm(v, generator=generator)[torch.multinomial(p, n, replacement=True, generator=generator)]


def inputs(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    y = zipf_targets(n, v, torch.Generator().manual_seed(n + v)).to(device)
    g = torch.Generator(device).manual_seed(n + v + d)
    h = torch.randn(n, d, generator=g, device=device, dtype=dtype)
    w = torch.randn(v, d, generator=g, device=device, dtype=dtype) * d**-0.5
    return h.requires_grad_(), w.requires_grad_(), y


def prepare(c: Candidate, h: Tensor, w: Tensor, y: Tensor) -> Step:
    """A step that gives loss, d_h and d_w."""
    assert c.loss is not None

    def step() -> tuple[Tensor, Tensor, Tensor]:
        h.grad = w.grad = None
        value = c.loss(h, w, y)
        value.backward()
        assert h.grad is not None
        assert w.grad is not None
        found = value.detach(), h.grad, w.grad
        h.grad = w.grad = None
        return found

    if not c.graph:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay() -> tuple[Tensor, Tensor, Tensor]:
        graph.replay()
        return captured

    return replay


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def relative(got: Tensor, right: Tensor) -> float:
    """RMS error over the RMS of the true values; in parts, as float64 copies of a gradient are large."""
    parts = zip(got.reshape(-1).split(1 << 26), right.reshape(-1).split(1 << 26), strict=True)
    squares = [(float((a.double() - b).square().sum()), float(b.square().sum())) for a, b in parts]
    return (sum(e for e, _ in squares) / sum(s for _, s in squares)) ** 0.5


def truth(h: Tensor, w: Tensor, y: Tensor, kl: bool) -> dict[str, Tensor]:
    """Loss, d_h, d_w in float64."""
    o, n = Options(TAU, ALPHA if kl else 0.0), len(y)
    p = Problem(h.detach().double(), w.detach().double(), y, None, None, o)
    upstream = torch.full((n,), 1 / n, dtype=torch.float64, device=h.device)
    terms, grads = reference.backward(p, upstream, Needs(h=True, w=True))
    assert grads.h is not None
    assert grads.w is not None
    return {"loss": (terms.ce + o.alpha * terms.kl).mean(), "dh": grads.h, "dw": grads.w}


def once(step: Step, flush: Tensor) -> float:
    """Seconds of one step, from a cold L2 cache."""
    flush.zero_()
    if flush.device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
