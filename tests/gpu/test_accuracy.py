"""The suite of tests/test_backends.py on a GPU: the same cases, the same bounds, float64 on the device as the truth.

One test per kind and dtype, so that pytest-xdist can spread what takes the time: compiling kernels.
"""

from __future__ import annotations

import pytest
import torch

import tiedkl
from tiedkl import backends, testing

ROUNDS = {"float32": 6, "bfloat16": 4, "float16": 3}  # cases of each kind
DEVICE = "cuda"


def chosen(kind: str, dtype: str, rounds: int) -> list[testing.Case]:
    first = list(testing.KINDS).index(kind)
    return [testing.make_case(0, first + i * len(testing.KINDS), dtype) for i in range(rounds)]


def breaches(cases: list[testing.Case], impl: str) -> list[str]:
    judgements = [j for case in cases for j in testing.judge(case, impl, DEVICE)]
    assert len(judgements) == len(cases)
    return [f"{j.case.id} ({j.case.kind}) {text}" for j in judgements for text in j.breaches]


@pytest.mark.parametrize("dtype", ROUNDS)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_every_case_is_within_its_bounds(impl: str, kind: str, dtype: str) -> None:
    found = breaches(chosen(kind, dtype, ROUNDS[dtype]), impl)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_fallback_is_within_its_bounds_too(dtype: str) -> None:
    found = breaches([case for kind in testing.KINDS for case in chosen(kind, dtype, 1)], "torch")
    assert not found, "\n".join(found)


def test_the_cases_reach_the_device_as_they_were_made() -> None:
    for case in testing.cases(2 * len(testing.KINDS), seed=0, dtypes=("float32", "bfloat16")):
        here, there = testing.make_inputs(case), testing.make_inputs(case, DEVICE)
        for a, b in ((here.h, there.h), (here.w, there.w), (here.target, there.target)):
            assert b.device.type == DEVICE
            assert a.stride() == b.stride(), case.id
            assert torch.equal(a.nan_to_num(), b.cpu().nan_to_num()), case.id


def test_a_slightly_wrong_gradient_is_a_breach(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds must be able to fail here: a float32 gradient that is off by 0.1%."""
    backend = backends.load(impl)
    honest = backend.backward

    def wrong(problem, plan, g, needs):
        terms, d = honest(problem, plan, g, needs)
        return terms, d._replace(w=None if d.w is None else d.w * 1.001)

    monkeypatch.setattr(backend, "backward", wrong)
    assert any(" dw: " in text for text in breaches(chosen("random", "float32", 3), impl))


@pytest.mark.parametrize("budget", [4 << 20, 1 << 30])
def test_sums_over_a_large_vocabulary_are_as_accurate_as_eager(impl: str, budget: int) -> None:
    """Sums over 262,144 columns in float32, where the cases above have thousands."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(256, 32, generator=g).to(DEVICE), torch.randn(1 << 18, 32, generator=g).to(DEVICE) * 0.2
    y = torch.randint(1 << 18, (256,), generator=g).to(DEVICE)
    out = tiedkl.fused_tied_loss(
        h, w, y, reduction="none", return_terms=True, impl=impl, workspace_bytes=budget, alpha=0.0
    )
    assert isinstance(out, tiedkl.TiedLossOutput)
    right = torch.logsumexp(h.double() @ w.double().T, -1)
    error, eager = ((x.double() - right).square().mean().sqrt() for x in (out.lse, torch.logsumexp(h @ w.T, -1)))
    assert float(error) <= 1.5 * float(eager)


@pytest.mark.parametrize("budget", [8 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_kernels_agree(impl: str, dtype: torch.dtype, budget: int) -> None:
    """Two implementations that share no code: what they compute in float32 differs by roundings only."""
    if impl == "triton":
        pytest.skip("the one the other is compared with")
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(1500, 128, generator=g), torch.randn(7001, 128, generator=g) * 0.3
    h, w = h.to(DEVICE, dtype).requires_grad_(), w.to(DEVICE, dtype).requires_grad_()
    y = torch.randint(7001, (1500,), generator=g).to(DEVICE)
    found = []
    for name in ("triton", impl):
        out = tiedkl.fused_tied_loss(
            h, w, y, target_grad=True, reduction="none", return_terms=True, impl=name, workspace_bytes=budget
        )
        assert isinstance(out, tiedkl.TiedLossOutput)
        grads = torch.autograd.grad(out.loss.sum(), (h, w))
        found.append(([x.detach() for x in (out.loss, out.ce, out.kl, out.lse, out.entropy)], grads))
    (terms, grads), (other_terms, other_grads) = found
    for a, b in zip(terms, other_terms, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for a, b in zip(grads, other_grads, strict=True):
        error = (a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()
        assert float(error) < (1e-5 if dtype == torch.float32 else 5e-3)
