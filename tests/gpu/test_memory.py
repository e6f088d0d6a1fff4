"""Peak device memory against what the plan promises, and sizes whose products exceed 2^31."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiedkl
from tiedkl import backends, ops, reference
from tiedkl.plan import MIB, VOCAB_BLOCKS
from tiedkl.problem import Needs, Options, Problem

SLACK = 4 * MIB
# Bytes of vectors as long as the tokens (statistics, targets) or the vocabulary (the list of targets).
PER_TOKEN, PER_ROW = {"triton": 400, "cuda": 600, "reference": 400}, 32
IMPL = ""  # the fixture's
pytestmark = pytest.mark.usefixtures("impl")
V, D = 40_000, 1024
FEW, MANY = 1024, 8192
BIG = 1 << 31


def data(n: int, v: int, d: int, dtype: torch.dtype, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(n + v)
    h = torch.randn(n, d, generator=g, device="cuda", dtype=dtype)
    w = torch.randn(v, d, generator=g, device="cuda", dtype=dtype) * d**-0.5
    return h.requires_grad_(grad), w.requires_grad_(grad), torch.randint(v, (n,), generator=g, device="cuda")


def measure(n: int, dtype: torch.dtype, budget: int, grad: bool, impl: str = "", **options: Any) -> dict[str, int]:
    """Growth of the allocated memory in one step, of which the gradients, and what the plan says of the scratch."""
    impl = impl or IMPL
    h, w, y = data(n, V, D, dtype, grad)
    options |= {"impl": impl, "workspace_bytes": budget}

    def step() -> None:
        loss = tiedkl.fused_tied_loss(h, w, y, **options)
        if grad:
            loss.backward()
        h.grad = w.grad = None

    step()  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    assert torch.cuda.memory_allocated() == before, "nothing is kept"
    plan = tiedkl.explain(h, w, y, **options)
    assert plan.impl == impl
    # Sums of gradients are in float32: part of the gradients, not of the scratch. In bfloat16 that of w is rounded a
    # block at a time where all tokens are one block.
    whole = impl == "triton" and plan.strategy == VOCAB_BLOCKS and plan.token_block >= n and dtype == torch.bfloat16
    whole = whole and not options.get("target_grad")
    rounded = dtype.itemsize if dtype.itemsize < 4 else 0
    gradients = grad * (h.numel() * (4 + rounded) + w.numel() * (rounded if whole else 4 + rounded))
    return {"extra": growth - gradients, "scratch": plan.scratch_bytes, "vectors": PER_TOKEN[impl] * n + PER_ROW * V}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [32 * MIB, 64 * MIB, 512 * MIB])
def test_peak_is_within_the_plan(budget: int, dtype: torch.dtype, grad: bool) -> None:
    found = measure(MANY, dtype, budget, grad)
    assert found["scratch"] <= budget
    assert found["extra"] <= found["scratch"] + found["vectors"] + SLACK


def test_d_w_in_bfloat16_takes_no_second_copy() -> None:
    """The default workspace holds a block of all these tokens."""
    if IMPL != "triton":
        pytest.skip("the others add up d_w in float32")
    found = measure(MANY, torch.bfloat16, 64 * MIB, True)
    assert found["extra"] + V * D * 4 > found["scratch"] + found["vectors"] + SLACK, "a bound that a copy would break"
    assert found["extra"] <= found["scratch"] + found["vectors"] + SLACK


@pytest.mark.parametrize("options", [{"target_grad": True}, {"reduction": "sum", "alpha": 0.0}], ids=str)
def test_peak_is_within_the_plan_for_other_options(options: dict[str, Any]) -> None:
    found = measure(MANY, torch.bfloat16, 128 * MIB, True, **options)
    assert found["extra"] <= found["scratch"] + found["vectors"] + SLACK


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_peak_does_not_grow_with_the_tokens(grad: bool) -> None:
    few, many = (measure(n, torch.bfloat16, 32 * MIB, grad) for n in (FEW, MANY))
    assert many["extra"] <= max(few["extra"], many["scratch"]) + PER_TOKEN[IMPL] * MANY + SLACK
    assert many["scratch"] + many["vectors"] + SLACK < MANY * V * 2 / 8, "a bound that an (N, V) matrix would break"


def test_the_measurement_sees_a_matrix_of_logits() -> None:
    """The specification holds several (N, V) matrices: the bound above must not hold for it."""
    found = measure(FEW, torch.float32, 64 * MIB, True, impl="reference")
    assert found["extra"] > 2 * FEW * V * 4
    assert found["extra"] > 64 * MIB + found["vectors"] + SLACK


def needs_free(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB are free, {gib:g} are needed")


def relative(got: Tensor, right: Tensor) -> float:
    """RMS error over the RMS of the true values."""
    return float((got.double() - right).square().mean().sqrt() / right.square().mean().sqrt())


@pytest.mark.parametrize("budget", [None, 32 << 30])
def test_more_than_2_to_the_31_logits(
    budget: int | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of all tokens and rows, not of some: an index that overflows may hit any. The large budget makes G that large."""
    needs_free(52 if budget else 14)
    if budget:  # all tokens in one block
        module = backends.load(IMPL)
        usual = module.tuning(torch.bfloat16, torch.device("cuda"))
        monkeypatch.setattr(module, "tuning", lambda *_: replace(usual, token_block=usual.token_block and 1 << 20))
        ops._plan.cache_clear()
        request.addfinalizer(ops._plan.cache_clear)
    n, v, d = 66_000, 34_000, 16
    assert n * v > BIG
    h, w, y = data(n, v, d, torch.bfloat16)
    y[5::7] = -100
    options = Options(2.0, 3.0)
    loss = tiedkl.fused_tied_loss(
        h, w, y, temperature=2.0, alpha=3.0, reduction="none", impl=IMPL, workspace_bytes=budget
    )
    assert isinstance(loss, Tensor)
    if budget:
        plan = tiedkl.explain(h, w, y, temperature=2.0, alpha=3.0, impl=IMPL, workspace_bytes=budget)
        assert plan.token_block * plan.vocab_block > BIG, plan
    upstream = torch.linspace(0.5, 2.0, n, device="cuda")
    d_h, d_w = torch.autograd.grad(loss, (h, w), upstream)
    right_w = torch.zeros(v, d, dtype=torch.float64, device="cuda")
    h64, w64 = h.detach().double(), w.detach().double()
    for begin in range(0, n, 1000):
        some = slice(begin, begin + 1000)
        p = Problem(h64[some], w64, torch.where(y[some] < 0, -1, y[some]), None, None, options)
        terms, grads = reference.backward(p, upstream[some].double(), Needs(h=True, w=True))
        right = terms.ce + options.alpha * terms.kl
        assert float((loss[some].double() - right).abs().max()) < 1e-4, begin
        assert grads.h is not None
        assert grads.w is not None
        assert relative(d_h[some], grads.h) < 1e-2, begin
        right_w += grads.w
    assert relative(d_w, right_w) < 1e-2


def test_more_than_2_to_the_31_weights() -> None:
    needs_free(62)
    n, v, d = 8, 1_050_001, 2048
    assert v * d > BIG
    h, w, y = data(n, v, d, torch.bfloat16)
    y[:4] = torch.tensor([v - 1, v - 2, 0, BIG // d + 1], device="cuda")
    loss = tiedkl.fused_tied_loss(h, w, y, temperature=2.0, alpha=3.0, reduction="sum", impl=IMPL)
    assert isinstance(loss, Tensor)
    d_h, d_w = torch.autograd.grad(loss, (h, w))
    w64 = w.detach().double()
    rows = torch.cat((y, torch.tensor([1, BIG // d - 1, BIG // d, v - 3], device="cuda")))
    total, right_w = 0.0, torch.zeros(len(rows), d, dtype=torch.float64, device="cuda")
    one = torch.ones(1, dtype=torch.float64, device="cuda")
    for i in range(n):  # the gradient of a bias is the gradient of the logits
        b = torch.zeros(v, dtype=torch.float64, device="cuda")
        p = Problem(h.detach()[i : i + 1].double(), w64, y[i : i + 1], b, None, Options(2.0, 3.0))
        terms, grads = reference.backward(p, one, Needs(h=True, b=True))
        total += float(terms.ce + 3.0 * terms.kl)
        assert grads.h is not None
        assert grads.b is not None
        assert relative(d_h[i : i + 1], grads.h) < 1e-2, i
        right_w += grads.b[rows, None] * p.h
    assert float(loss) == pytest.approx(total, rel=1e-5)
    for i, row in enumerate(rows.tolist()):
        assert relative(d_w[row], right_w[i]) < 2e-2, row
