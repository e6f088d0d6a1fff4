"""The operator pair on a GPU: opcheck, torch.compile, autocast and loss scaling, as tests/test_ops.py does on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiedkl
from tiedkl import ops

N, V, D = 130, 300, 32
TAU, ALPHA = 20.0, 10.0
IMPL = ""  # the fixture's
pytestmark = pytest.mark.usefixtures("impl")


def inputs(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(n, D, generator=g), torch.randn(V, D, generator=g) * 0.5
    y = torch.randint(V, (n,), generator=g)
    y[:: max(n // 4, 1)] = -100
    return h.to("cuda", dtype).requires_grad_(), w.to("cuda", dtype).requires_grad_(), y.cuda()


def loss_of(h: Tensor, w: Tensor, y: Tensor, **options: Any) -> Tensor:
    loss = tiedkl.fused_tied_loss(h, w, y, impl=IMPL, **options)
    assert isinstance(loss, Tensor)
    return loss


def raw_arguments(monkeypatch: pytest.MonkeyPatch, reduction: str, needs_grad: bool, **options: Any) -> tuple[Any, ...]:
    """What `fused_tied_loss` hands to the operator, caught on its way."""
    caught: list[tuple[Any, ...]] = []
    h, w, y = inputs()
    real = ops.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(ops, "evaluate", lambda *args: caught.append(args) or real(*args))
        loss_of(h if needs_grad else h.detach(), w if needs_grad else w.detach(), y, reduction=reduction, **options)
    return caught[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    bias = torch.randn(V, device="cuda", requires_grad=True)
    t = torch.randn(V, 3, device="cuda", requires_grad=True)
    weight = torch.rand(N, device="cuda")
    for options in ({}, {"bias": bias, "target_weight": t, "target_grad": True, "token_weight": weight}):
        torch.library.opcheck(ops.tied_loss, raw_arguments(monkeypatch, reduction, True, **options))
    torch.library.opcheck(ops.tied_loss, raw_arguments(monkeypatch, reduction, False))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager_with_ignored_rows_and_any_length(reduction: str, backend: str) -> None:
    torch._dynamo.reset()

    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.tanh(h), w, y, reduction=reduction)

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=True)
    for n in (N, 50, 257):
        h, w, y = inputs(n)
        upstream = torch.linspace(0.5, 2, n, device="cuda") if reduction == "none" else torch.tensor(1.7, device="cuda")
        want, got = f(h, w, y), compiled(h, w, y)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        pairs = zip(*(torch.autograd.grad(x, (h, w), upstream) for x in (want, got)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    h, w, y = inputs(50)
    assert float(compiled(h, w, torch.full_like(y, -100)).detach().abs().sum()) == 0


def test_compiled_in_a_cuda_graph() -> None:
    """mode="reduce-overhead" captures the step; the third call replays it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, y: loss_of(torch.tanh(h), w, y), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        h, w, y = inputs(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(h, w, y)
        d_got = [d.clone() for d in torch.autograd.grad(got, (h, w))]
        got = got.detach().clone()
        want = loss_of(torch.tanh(h), w, y)
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(want, (h, w)), d_got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    h, w, y = inputs()
    with torch.autocast("cuda", dtype):
        mixed = F.linear(h, torch.eye(D, device="cuda"))
        assert mixed.dtype == dtype
        loss = loss_of(mixed, w, y)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, (h, w))
    assert [d.dtype for d in got] == [torch.float32] * 2
    low_h, low_w = h.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
    want = loss_of(low_h, low_w, y)
    assert torch.equal(loss, want)
    for a, b in zip(got, torch.autograd.grad(want, (low_h, low_w)), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=1e-4)


def test_a_loss_scale_keeps_tiny_half_precision_gradients() -> None:
    h, w, y = inputs(dtype=torch.float16)
    items = 1e9
    scaled = loss_of(h, w, y, num_items=items) * 2**16
    got = [d.double() / 2**16 for d in torch.autograd.grad(scaled, (h, w))]
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    truth = tiedkl.fused_tied_loss(h64, w64, y, num_items=items, impl="reference")
    for a, b in zip(got, torch.autograd.grad(truth, (h64, w64)), strict=True):
        assert 0 < float(b.abs().max()) < 3e-8  # half the smallest float16
        torch.testing.assert_close(a, b, rtol=3e-3, atol=6e-8 / 2**16 + 1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("again", [False, True], ids=["last", "retained"])
def test_the_upstream_gradient_is_not_rounded(again: bool) -> None:
    """To the gradients' bfloat16, in which a third is off by 2e-3."""
    h, w, y = inputs(dtype=torch.bfloat16)
    loss = loss_of(h, w, y)
    unscaled = torch.autograd.grad(loss, (h, w), retain_graph=True)
    third = torch.tensor(1 / 3, device="cuda")
    for a, b in zip(torch.autograd.grad(loss, (h, w), third, retain_graph=again), unscaled, strict=True):
        ratio = a.double().flatten() @ b.double().flatten() / b.double().square().sum()
        assert float(ratio) == pytest.approx(1 / 3, rel=5e-4)


def test_a_second_backward_is_right() -> None:
    h, w, y = inputs()
    loss = loss_of(h, w, y)
    first = torch.autograd.grad(loss, (h, w), torch.tensor(0.3, device="cuda"), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), torch.tensor(0.6, device="cuda"))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=0)
