"""Backends among other work on the device: no waiting, capture, streams, devices, reruns, invalid targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tiedkl

N, V, D = 700, 1500, 96
IMPL = ""  # the fixture's
pytestmark = pytest.mark.usefixtures("impl")
Options = dict[str, Any]
EVERYTHING: Options = {
    "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "target_grad": True, "temperature": 3.0, "alpha": 4.0,
}  # fmt: skip
OPTIONS: dict[str, Options] = {
    "mean": {},
    "sum": {"reduction": "sum", "alpha": 0.0},
    "none": {"reduction": "none"},
    "blocks": {"workspace_bytes": 1 << 20},
    "token_blocks": {"workspace_bytes": 1 << 30},
    "target_grad": {"target_grad": True},
    "everything": EVERYTHING,
}


def inputs(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * 0.4
    y = torch.randint(V // (1 + seed), (N,), generator=g)  # another seed, another number of distinct targets
    y[seed :: 5 + seed] = -100
    return h.to(device, dtype).requires_grad_(), w.to(device, dtype).requires_grad_(), y.to(device)


def step(h: Tensor, w: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    """Loss and both gradients."""
    loss = tiedkl.fused_tied_loss(h, w, y, impl=IMPL, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), device=h.device).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (h, w), upstream)]


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed() -> None:
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    step(*inputs(dtype), **OPTIONS[name])  # compiles
    h, w, y = inputs(dtype, seed=1)
    with waiting_is_an_error():
        loss = tiedkl.fused_tied_loss(h, w, y, impl=IMPL, **OPTIONS[name])
        (loss if loss.dim() == 0 else loss.sum()).backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_no_argument_waits_for_the_device() -> None:
    h, w, y = (x.reshape(7, 100, *x.shape[1:]) if len(x) == N else x for x in inputs())
    bias = torch.randn(V, device="cuda", dtype=h.dtype, requires_grad=True)
    t = torch.randn(V, 24, device="cuda", dtype=h.dtype, requires_grad=True)
    weight = torch.rand(7, 100, device="cuda")

    def call() -> tiedkl.TiedLossOutput:
        out = tiedkl.fused_tied_loss(
            h, w, y, bias, target_weight=t, token_weight=weight, num_items=1234.5, shift=1, return_terms=True,
            impl=IMPL, **EVERYTHING,
        )  # fmt: skip
        assert isinstance(out, tiedkl.TiedLossOutput)
        out.loss.backward()
        return out

    first = call()
    with waiting_is_an_error():
        second = call()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_captured_step_follows_its_inputs(name: str) -> None:
    h, w, y = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(h, w, y, **OPTIONS[name])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(h, w, y, **OPTIONS[name])
    before = None
    for seed in (0, 1, 3):
        new = inputs(seed=seed)
        with torch.no_grad():
            for static, x in zip((h, w, y), new, strict=True):
                static.copy_(x)
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(*new, **OPTIONS[name]), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-7)
        assert before is None or not torch.equal(before, captured[2]), "other inputs, other gradients"
        before = captured[2].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_reruns_give_the_same_bits_whatever_memory_held_before(name: str, dtype: torch.dtype) -> None:
    h, w, y = inputs(dtype)
    first = step(h, w, y, **OPTIONS[name])
    for filling in (torch.nan, 3e38, 0.0):
        torch.cuda.empty_cache()
        for size in (1 << 26, 1 << 20, 1 << 18, 1 << 12):  # the allocator hands these out again
            used = [torch.full((size,), filling, device="cuda") for _ in range(4)]
            del used
        for a, b in zip(first, step(h, w, y, **OPTIONS[name]), strict=True):
            assert torch.equal(a, b)


def test_another_stream_gives_the_same_bits() -> None:
    h, w, y = inputs()
    first = step(h, w, y, **EVERYTHING)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = step(h, w, y, **EVERYTHING)
    side.synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("bad", [V, V + 5, -1, -(2**40), 2**40])
def test_an_invalid_target_spoils_its_token_only(bad: int, reduction: str) -> None:
    h, w, y = inputs(torch.float32)
    places = torch.tensor([0, 133, N - 1], device="cuda")
    spoilt, ignored = y.clone(), y.clone()
    spoilt[places], ignored[places] = bad, -100
    loss, *grads = step(h, w, spoilt, reduction=reduction, target_grad=True)
    want, *want_grads = step(h, w, ignored, reduction=reduction, target_grad=True)
    if reduction == "none":
        assert loss.isnan().nonzero().flatten().tolist() == places.tolist()
        others = torch.ones(N, dtype=torch.bool, device="cuda").index_fill_(0, places, False)
        assert torch.equal(loss[others], want[others])
    else:
        assert loss.isnan()
        assert not want.isnan()
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b)


def test_an_invalid_target_raises_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, y = inputs()
    y[7] = V
    monkeypatch.setenv("TIEDKL_CHECK_TARGETS", "1")
    with pytest.raises(ValueError, match=rf"target\[7\]={V} is outside \[0, {V}\)"):
        tiedkl.fused_tied_loss(h, w, y, impl=IMPL)
    y[7] = 0
    tiedkl.fused_tied_loss(h, w, y, impl=IMPL)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_second_device() -> None:
    """While the first one is current."""
    first, second = (step(*inputs(device=device), **EVERYTHING) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device == torch.device("cuda:1")
        rtol = 2**-6 if a.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol * float(a.abs().max()))


def test_auto_takes_the_kernels(impl: str) -> None:
    h, w, y = inputs()
    assert tiedkl.explain(h, w, y, impl=impl).impl == impl
    assert tiedkl.explain(h, w, y).impl == "triton"
    assert tiedkl.explain(h.double(), w.double(), y).impl == "torch"
