"""Inputs, steps, their errors, time and memory: the parts that know nothing of tables."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import reference
from ..problem import Needs, Options, Problem
from .candidates import Candidate
from .shapes import Workload
from .targets import make_targets

Outcome = tuple[Tensor, Tensor | None, Tensor | None]  # loss, d_h, d_w


@dataclass
class Step:
    """One repetition: `before` is not timed, `timed` is."""

    before: Callable[[], None]
    timed: Callable[[], Outcome]

    def __call__(self) -> Outcome:
        self.before()
        return self.timed()


def inputs(w: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """h (N, D), w (V, D), y (N,); logits have unit variance."""
    device, dtype = torch.device(w.device), w.torch_dtype
    g = torch.Generator(device).manual_seed(w.tokens + w.vocab + w.width)
    h = torch.randn(w.tokens, w.width, generator=g, device=device, dtype=dtype)
    weight = torch.randn(w.vocab, w.width, generator=g, device=device, dtype=dtype) * w.width**-0.5
    return h.requires_grad_(), weight.requires_grad_(), make_targets(w).to(device)


def nothing() -> None:
    pass


def prepare(c: Candidate, mode: str, h: Tensor, w: Tensor, y: Tensor) -> Step:
    """A step that gives the loss and, but for "fwd", d_h and d_w."""
    assert c.loss is not None
    loss = c.loss

    def forward() -> Outcome:
        with torch.no_grad():
            return loss(h, w, y), None, None

    def backward(value: Tensor) -> Outcome:
        value.backward()
        found = value.detach(), h.grad, w.grad
        h.grad = w.grad = None
        return found

    def both() -> Outcome:
        return backward(loss(h, w, y))

    if mode == "fwd":
        return Step(nothing, forward)
    if mode == "bwd":
        values: list[Tensor] = []
        return Step(lambda: values.append(loss(h, w, y)), lambda: backward(values.pop()))
    return Step(nothing, captured(both) if c.graph else both)


def captured(step: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """`step` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay() -> Outcome:
        graph.replay()
        return found

    return replay


def clean(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def relative(got: Tensor, right: Tensor) -> float:
    """RMS error over the RMS of the true values; in parts, as float64 copies of a gradient are large."""
    parts = zip(got.reshape(-1).split(1 << 26), right.reshape(-1).split(1 << 26), strict=True)
    squares = [(float((a.double() - b).square().sum()), float(b.double().square().sum())) for a, b in parts]
    error, true = sum(e for e, _ in squares), sum(s for _, s in squares)
    return (error / true) ** 0.5 if true else error**0.5


@functools.cache
def start_compiler(device: torch.device) -> None:
    """Compile something small, so that the first row that is compiled does not pay for the compiler's own start."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: (x.exp() * 2).sum())(x).backward()


TRUTH_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 26}  # of the logits at a time: float64, in some twenty copies


def truth(w: Workload, h: Tensor, weight: Tensor, y: Tensor, kl: bool, target_grad: bool = False) -> dict[str, Tensor]:
    """Loss, d_h, d_w of the specification in float64, by blocks of tokens.

    Gradients of half-precision inputs are kept in float32, which is as good as exact beside their own precision.
    """
    keep = torch.float32 if w.torch_dtype.itemsize == 2 else torch.float64
    options = Options(w.temperature, w.alpha if kl else 0.0, target_grad=target_grad and kl)
    w64, y = weight.detach().double(), torch.where(y < 0, -1, y)
    upstream = 1.0 / max(1, int((y >= 0).sum()))
    loss, d_h, d_w = torch.zeros((), dtype=torch.float64, device=h.device), [], torch.zeros_like(w64)
    grads = w.mode != "fwd"
    for rows in torch.arange(len(y), device=h.device).split(max(1, TRUTH_ENTRIES[h.device.type] // len(w64))):
        p = Problem(h.detach()[rows].double(), w64, y[rows], None, None, options)
        if not grads:
            terms = reference.forward(p)
        else:
            g = torch.full((len(rows),), upstream, dtype=torch.float64, device=h.device)
            terms, found = reference.backward(p, g, Needs(h=True, w=True))
            assert found.h is not None
            assert found.w is not None
            d_h.append(found.h.to(keep))
            d_w += found.w
        loss += (terms.ce + options.alpha * terms.kl).sum() * upstream
    return {"loss": loss, "dh": torch.cat(d_h), "dw": d_w.to(keep)} if grads else {"loss": loss}


def once(step: Step, flush: Tensor, repeats: int = 1) -> float:
    """Seconds of one step; on a GPU from a cold L2 cache, on a CPU the mean of `repeats`."""
    if flush.device.type != "cuda":
        total = 0.0
        for _ in range(repeats):
            step.before()
            start = time.perf_counter()
            step.timed()
            total += time.perf_counter() - start
        return total / repeats
    step.before()
    flush.zero_()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step.timed()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak_bytes(step: Step, device: torch.device) -> tuple[int | None, Outcome]:
    """Memory at the peak of one step beyond what was there before and beyond the gradients it hands back.

    On a GPU what the allocator hands out; on a CPU the resident set (Linux), None where that cannot be measured.
    """
    clean(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = step()
        peak: int | None = torch.cuda.max_memory_allocated() - before
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # or the heap that earlier steps left would hide what this one needs
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            found = step()
            peak = _status("VmHWM") - before
        except (OSError, AttributeError, StopIteration):
            found, peak = step(), None
    gradients = sum(x.numel() * x.element_size() for x in found[1:] if x is not None)
    return None if peak is None else max(0, peak - gradients), found


@contextlib.contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """On a CPU, make an allocation beyond the memory there is fail, instead of the system ending the process."""
    try:
        import resource
    except ImportError:  # not on Windows
        yield
        return
    if device.type != "cpu":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit = _status("VmSize") + free
        if before[1] != resource.RLIM_INFINITY:
            limit = min(limit, before[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    except (OSError, ValueError, StopIteration):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
