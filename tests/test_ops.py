"""tiedkl/ops.py: the operator pair under autograd, torch.compile, autocast and loss scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiedkl
from tiedkl import backends, ops

RUNNABLE = [n for n in backends.BACKENDS if backends.load(n).unsupported(torch.device("cpu"), torch.float32) is None]
N, V, D = 19, 37, 8


def inputs(
    n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(n, D, generator=g), torch.randn(V, D, generator=g) * 0.5
    y = torch.randint(V, (n,), generator=g)
    if ignored:
        y[:: max(n // 4, 1)] = -100
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def eager(h: Tensor, w: Tensor, y: Tensor, tau: float = 20.0, alpha: float = 10.0) -> Tensor:
    """The loss of every token."""
    z = F.linear(h, w).float()
    s = F.linear(w.detach()[y.clamp(min=0)], w.detach()).float()
    ce = F.cross_entropy(z, y, reduction="none")
    kl = F.kl_div(F.log_softmax(z / tau, -1), F.softmax(s / tau, -1), reduction="none").sum(-1)
    return torch.where(y >= 0, ce + alpha * kl, 0.0)


def grads(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, upstream, **kwargs)


def raw_arguments(reduction: str, needs_grad: bool, **options: Any) -> tuple[Any, ...]:
    """What `fused_tied_loss` hands to the operator, caught on its way."""
    caught: list[tuple[Any, ...]] = []
    h, w, y = inputs()
    if not needs_grad:
        h, w = h.detach(), w.detach()
    real = ops.evaluate
    try:
        ops.evaluate = lambda *args: caught.append(args) or real(*args)
        tiedkl.fused_tied_loss(h, w, y, reduction=reduction, **options)
    finally:
        ops.evaluate = real
    return caught[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_opcheck(impl: str, reduction: str) -> None:
    bias = torch.randn(V, requires_grad=True)
    t = torch.randn(V, 3, requires_grad=True)
    for options in ({}, {"bias": bias, "target_weight": t, "target_grad": True, "token_weight": torch.rand(N)}):
        torch.library.opcheck(ops.tied_loss, raw_arguments(reduction, True, impl=impl, **options))
    torch.library.opcheck(ops.tied_loss, raw_arguments(reduction, False, impl=impl))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_the_direct_call_equals_the_operator(impl: str, reduction: str) -> None:
    arguments = raw_arguments(reduction, True, impl=impl)
    leaves = arguments[:2]
    direct, dispatched = ops.TiedLoss.apply(*arguments), ops.tied_loss(*arguments)
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    upstream = torch.rand_like(direct[0])
    for a, b in zip(*(grads(out[0], *leaves, upstream=upstream) for out in (direct, dispatched)), strict=True):
        assert torch.equal(a, b)


def test_who_traces_sees_the_operator() -> None:
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    h, w, y = inputs()
    with Recorder():
        tiedkl.fused_tied_loss(h, w, y)
    assert "tiedkl.tied_loss.default" in seen
    with FakeTensorMode() as mode:
        fake = tiedkl.fused_tied_loss(mode.from_tensor(h), mode.from_tensor(w), mode.from_tensor(y))
    assert isinstance(fake, FakeTensor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_compiled_equals_eager_with_ignored_rows_and_any_length(impl: str, reduction: str) -> None:
    torch._dynamo.reset()

    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return tiedkl.fused_tied_loss(h * 2, w, y, reduction=reduction, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (N, 5, 30):
        h, w, y = inputs(n)
        upstream = torch.linspace(0.5, 2, n) if reduction == "none" else torch.tensor(1.7)
        want, got = f(h, w, y), compiled(h, w, y)
        assert torch.equal(want, got)
        for a, b in zip(grads(want, h, w, upstream=upstream), grads(got, h, w, upstream=upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    h, w, y = inputs(8)
    assert float(compiled(h, w, torch.full_like(y, -100)).detach().abs().sum()) == 0


def test_compiled_module_and_terms() -> None:
    torch._dynamo.reset()
    module = tiedkl.FusedTiedLoss(return_terms=True, reduction="sum")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    h, w, y = inputs()
    for a, b in zip(module(h, w, y, shift=1), compiled(h, w, y, shift=1), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    h, w, y = inputs()
    f = torch.compile(lambda h, w: tiedkl.fused_tied_loss(torch.tanh(h), w, y), fullgraph=True)
    want = tiedkl.fused_tied_loss(torch.tanh(h), w, y)
    got = f(h, w)
    torch.testing.assert_close(got, want)
    for a, b in zip(grads(want, h, w), grads(got, h, w), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_a_second_backward_is_right(impl: str, reduction: str) -> None:
    h, w, y = inputs()
    loss = tiedkl.fused_tied_loss(h, w, y, reduction=reduction, impl=impl)
    want = eager(h, w, y)
    for i in range(3):
        g = torch.linspace(0.1 + i, 2.0, N) if reduction == "none" else torch.tensor(0.3 + i)
        got = grads(loss, h, w, upstream=g, retain_graph=i < 2)
        for a, b in zip(got, grads((want * g).sum(), h, w, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        grads(loss, h, w, upstream=g)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_says_why_not(reduction: str) -> None:
    h, w, y = inputs()
    loss = tiedkl.fused_tied_loss(h, w, y, reduction=reduction)
    (d_h,) = grads(loss, h, upstream=torch.ones_like(loss), create_graph=True)
    with pytest.raises(RuntimeError, match="FusedTiedLoss has no second derivative"):
        grads(d_h.square().sum(), h)


def walks(monkeypatch: pytest.MonkeyPatch, impl: str) -> list[tuple[str, Any]]:
    """Records every call of a backend: ("forward", None) or ("backward", needs)."""
    calls: list[tuple[str, Any]] = []
    module = backends.load(impl)
    forward, backward = module.forward, module.backward
    monkeypatch.setattr(module, "forward", lambda p, plan: calls.append(("forward", None)) or forward(p, plan))
    monkeypatch.setattr(
        module, "backward", lambda p, plan, g, needs: calls.append(("backward", needs)) or backward(p, plan, g, needs)
    )
    return calls


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
@pytest.mark.parametrize("frozen", ["trunk", "head"])
def test_a_frozen_side_costs_nothing(monkeypatch: pytest.MonkeyPatch, impl: str, reduction: str, frozen: str) -> None:
    calls = walks(monkeypatch, impl)
    h, w, y = inputs()
    (h if frozen == "trunk" else w).requires_grad_(False)
    loss = tiedkl.fused_tied_loss(h, w, y, reduction=reduction, impl=impl)
    loss.sum().backward()
    [needs] = [needs for kind, needs in calls if kind == "backward"]
    assert (needs.h, needs.w, needs.b, needs.t) == (frozen == "head", frozen == "trunk", False, False)
    assert (h.grad is None) == (frozen == "trunk")
    assert (w.grad is None) == (frozen == "head")
    arguments = raw_arguments(reduction, True, impl=impl)
    both = ops.tied_loss(*arguments)[3:]
    assert [d.numel() > 0 for d in both] == [reduction != "none"] * 2 + [False] * 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", RUNNABLE)
@pytest.mark.parametrize("separate", [False, True])
def test_target_grad_with_a_frozen_source(impl: str, reduction: str, separate: bool) -> None:
    """The similarity target is a constant when nothing behind it is trained."""
    h, w, y = inputs()
    t = torch.randn(V, 3) if separate else None
    w.requires_grad_(separate)
    leaves = [h, w] if separate else [h]
    got, want = (
        tiedkl.fused_tied_loss(h, w, y, target_weight=t, target_grad=grad, reduction=reduction, impl=impl)
        for grad in (True, False)
    )
    for a, b in zip(grads(got.sum(), *leaves), grads(want.sum(), *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif("cpp" not in RUNNABLE, reason="the extension is not built")
def test_a_frozen_head_runs_one_matrix_product_less() -> None:
    def flops(frozen: bool) -> int:
        h, w, y = inputs(ignored=False)
        h, w = (x.detach().double().requires_grad_() for x in (h, w))  # in which every product is ATen's, and counted
        w.requires_grad_(not frozen)
        with torch.profiler.profile(with_flops=True, record_shapes=True) as profile:
            tiedkl.fused_tied_loss(h, w, y, alpha=0.0, workspace_bytes=1 << 28, impl="cpp")
        return sum(event.flops for event in profile.key_averages())

    unit = 2 * N * V * D
    assert flops(False) >= 3 * unit
    assert flops(False) - flops(True) == pytest.approx(unit, rel=0.05)


@pytest.mark.parametrize("impl", RUNNABLE)
def test_no_gradient_means_no_gradient_work(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    calls = walks(monkeypatch, impl)
    h, w, y = inputs()
    with torch.no_grad():
        assert not tiedkl.fused_tied_loss(h, w, y, impl=impl).requires_grad
    assert not tiedkl.fused_tied_loss(h.detach(), w.detach(), y, impl=impl).requires_grad
    assert [kind for kind, _ in calls] == ["forward", "forward"]


@pytest.mark.parametrize("impl", RUNNABLE)
def test_one_parameter_as_embedding_head_and_metric(impl: str) -> None:
    g = torch.Generator().manual_seed(3)
    embedding = nn.Embedding(V, D)
    mix = torch.randn(D, D, generator=g)
    x = torch.randint(V, (4, 9), generator=g)
    want = eager((embedding(x[:, :-1]) @ mix).flatten(0, 1), embedding.weight, x[:, 1:].flatten()).mean()
    got = tiedkl.fused_tied_loss(embedding(x) @ mix, embedding.weight, x, shift=1, impl=impl)
    torch.testing.assert_close(got, want)
    (a,), (b,) = grads(want, embedding.weight), grads(got, embedding.weight)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", RUNNABLE)
def test_two_losses_share_a_weight(impl: str) -> None:
    h, w, y = inputs()
    k = torch.randn(N, D, requires_grad=True)
    first, second = tiedkl.fused_tied_loss(h, w, y, impl=impl), tiedkl.fused_tied_loss(k, w, y, alpha=0.0, impl=impl)
    valid = int((y >= 0).sum())
    want = eager(h, w, y).sum() / valid + 3 * eager(k, w, y, alpha=0.0).sum() / valid
    for a, b in zip(grads(first + 3 * second, h, k, w), grads(want, h, k, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", RUNNABLE)
def test_a_loss_scale_keeps_tiny_half_precision_gradients(impl: str) -> None:
    # Unscaled gradients of about 1e-9 vanish in float16, whose smallest number is 6e-8; times 2^16 they do not.
    h, w, y = inputs(dtype=torch.float16)
    items = 1e9
    loss = tiedkl.fused_tied_loss(h, w, y, num_items=items, impl=impl)
    got = [d.double() / 2**16 for d in grads(loss * 2**16, h, w)]
    h32, w32 = h.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    want = [d.double() for d in grads(eager(h32, w32, y).sum() / items, h32, w32)]
    for a, b in zip(got, want, strict=True):
        assert 0 < float(b.abs().max()) < 3e-8  # half the smallest float16
        torch.testing.assert_close(a, b, rtol=2e-3, atol=6e-8 / 2**16)  # float16 itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_autocast(impl: str, dtype: torch.dtype) -> None:
    h, w, y = inputs()
    with torch.autocast("cpu", dtype):
        mixed = F.linear(h, torch.eye(D))  # comes out in `dtype`, as from a trunk
        assert mixed.dtype == dtype
        loss = tiedkl.fused_tied_loss(mixed, w, y, impl=impl)
    assert loss.dtype == torch.float32
    got = grads(loss, h, w)
    assert [d.dtype for d in got] == [torch.float32] * 2
    low_h, low_w = h.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
    want = tiedkl.fused_tied_loss(low_h, low_w, y, impl=impl)
    assert torch.equal(loss, want)
    for a, b in zip(got, grads(want, low_h, low_w), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=1e-4)


def test_autocast_leaves_float64_alone() -> None:
    h, w, y = inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiedkl.fused_tied_loss(h, w, y), tiedkl.fused_tied_loss(h, w, y))
        assert tiedkl.fused_tied_loss(h, w, y).dtype == torch.float64


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_changed_before_backward_is_noticed(which: int) -> None:
    h, w, y = inputs()
    loss = tiedkl.fused_tied_loss(h, w, y, reduction="none")
    with torch.no_grad():
        (h, w)[which].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_gradients_own_their_memory() -> None:
    """A caller may scale .grad in place without changing what another backward gives."""
    h, w, y = inputs()
    loss = tiedkl.fused_tied_loss(h, w, y)
    first = grads(loss, h, w, retain_graph=True)
    kept = [d.clone() for d in first]
    for d in first:
        d.zero_()
    for a, b in zip(grads(loss, h, w), kept, strict=True):
        assert torch.equal(a, b)


def test_only_the_loss_is_differentiable() -> None:
    h, w, y = inputs()
    out = tiedkl.fused_tied_loss(h, w, y, return_terms=True)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
