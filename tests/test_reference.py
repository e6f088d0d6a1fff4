"""tiedkl/reference.py against automatic differentiation of an expression written another way, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiedkl import reference
from tiedkl.problem import Grads, Needs, Options, Problem, Terms

N, V, D, D_TEACHER = 7, 11, 5, 3
ALL = Needs(h=True, w=True, b=True, t=True)


def problem(options: Options, *, bias: bool = True, teacher: bool = False, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    y = torch.randint(V, (N,), generator=g)
    y[2] = y[5]  # one target twice
    y[3] = -1  # skipped
    return Problem(
        normal(N, D), normal(V, D), y, normal(V) if bias else None, normal(V, D_TEACHER) if teacher else None, options
    )


def independent(p: Problem) -> tuple[Tensor, Tensor]:
    """(CE, KL) of every token with probabilities and entropies spelled out; shares nothing with the module."""
    o, valid, y = p.options, p.y >= 0, p.y.clamp(min=0)
    z = torch.einsum("nd,vd->nv", p.h, p.w)
    z = z if p.b is None else z + p.b[None]
    z = o.softcap * torch.tanh(z / o.softcap) if o.softcap else z
    smooth = torch.full_like(z, o.label_smoothing / V)
    smooth[torch.arange(N), y] += 1 - o.label_smoothing
    partition = torch.exp(z).sum(-1)
    ce = -(smooth * torch.log(torch.exp(z) / partition[:, None])).sum(-1) + o.z_loss * torch.log(partition) ** 2
    t = p.w if p.t is None else p.t
    t = t if o.target_grad else t.detach()
    q = torch.softmax(torch.stack([t @ t[i] for i in y]) / o.temperature, -1)
    r = torch.softmax(z / o.temperature, -1)
    kl = (q * q.log()).sum(-1) - (q * r.log()).sum(-1)
    return torch.where(valid, ce, 0.0), torch.where(valid, kl if o.alpha else 0.0 * kl, 0.0)


OPTIONS = {
    "default": Options(),
    "plain": Options(alpha=0.0),
    "cold": Options(temperature=0.7, alpha=2.0),
    "smoothing": Options(label_smoothing=0.2),
    "all_smoothing": Options(label_smoothing=1.0),
    "z_loss": Options(z_loss=0.1),
    "softcap": Options(softcap=1.5),
    "target_grad": Options(target_grad=True, temperature=2.0),
    "everything": Options(3.0, 4.0, 0.1, 0.02, 2.5, True),
}


@pytest.mark.parametrize(("bias", "teacher"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_match_autograd(name: str, bias: bool, teacher: bool) -> None:
    p = problem(OPTIONS[name], bias=bias, teacher=teacher)
    g = torch.linspace(0.2, 3.0, N, dtype=torch.float64)
    needs = Needs(h=True, w=True, b=bias, t=teacher)
    terms, got = reference.backward(p, torch.where(p.y >= 0, g, 0.0), needs)

    leaves = {
        k: x.clone().requires_grad_() for k, x in (("h", p.h), ("w", p.w), ("b", p.b), ("t", p.t)) if x is not None
    }
    ce, kl = independent(replace(p, **leaves))
    torch.testing.assert_close(terms.ce, ce.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(terms.kl, kl.detach(), rtol=1e-10, atol=1e-13)
    ((ce + p.options.alpha * kl) * g).sum().backward()
    for k, leaf in leaves.items():
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(getattr(got, k), want, rtol=1e-10, atol=1e-12, msg=lambda m, k=k: f"d_{k}: {m}")
    assert (got.b is not None) == bias
    assert (got.t is not None) == teacher


def test_forward_is_the_forward_half_of_backward() -> None:
    p = problem(OPTIONS["everything"])
    for a, b in zip(reference.forward(p), reference.backward(p, torch.ones(N).double(), ALL)[0], strict=True):
        assert torch.equal(a, b)


def test_other_terms() -> None:
    p = problem(Options())
    terms, z = reference.forward(p), p.h @ p.w.T + p.b
    prob, valid = torch.softmax(z, -1), p.y >= 0
    torch.testing.assert_close(terms.lse[valid], z[valid].logsumexp(-1))
    torch.testing.assert_close(terms.entropy[valid], torch.distributions.Categorical(prob[valid]).entropy())
    assert torch.equal(terms.correct[valid], (z.argmax(-1) == p.y)[valid].double())
    for term in terms:
        assert term[3] == 0, "a skipped token contributes nothing"


def test_needs_select_gradients() -> None:
    p = problem(Options(target_grad=True), teacher=True)
    full = reference.backward(p, torch.ones(N).double(), ALL)[1]
    for name in Grads._fields:
        only = reference.backward(p, torch.ones(N).double(), Needs(**{name: True}))[1]
        assert torch.equal(getattr(only, name), getattr(full, name))
        assert all(getattr(only, other) is None for other in Grads._fields if other != name)


def test_confident_token_keeps_its_digits() -> None:
    # Two words, z = (0, gap) with target 1: CE = log1p(e^-gap), d z_1 = -1 / (1 + e^gap), both far below an ulp of one.
    gap = torch.tensor([40.0, 80.0, 300.0], dtype=torch.float64)
    w = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    p = Problem(gap[:, None], w, torch.ones(3, dtype=torch.int64), None, None, Options(alpha=0.0))
    terms, d = reference.backward(p, torch.ones(3).double(), Needs(h=True))
    torch.testing.assert_close(terms.ce, torch.exp(-gap), rtol=1e-13, atol=0)
    assert d.h is not None
    torch.testing.assert_close(d.h[:, 0], -torch.exp(-gap), rtol=1e-13, atol=0)


def test_kl_vanishes_where_student_is_teacher() -> None:
    p = problem(Options(), bias=False)
    valid = p.y >= 0
    p = replace(p, h=p.w[p.y.clamp(min=0)])  # z / tau is s
    terms, d = reference.backward(p, valid.double(), Needs(h=True))
    plain = reference.backward(replace(p, options=Options(alpha=0.0)), valid.double(), Needs(h=True))[1]
    assert float(terms.kl.abs().max()) < 1e-25
    torch.testing.assert_close(d.h, plain.h, rtol=0, atol=1e-12)


def test_kl_is_never_negative_and_accurate_in_float32() -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(300, 32, generator=g) * 0.3
    y = torch.randint(300, (40,), generator=g)
    h = w[y] + 10 ** torch.linspace(-2, 0, 40)[:, None] * torch.randn(40, 32, generator=g)
    p = Problem(h, w, y, None, None, Options())
    got, want = reference.forward(p).kl.double(), reference.forward(p.to(torch.float64)).kl
    assert bool((got >= 0).all())
    big = want >= 1e-6
    assert int(big.sum()) > 20
    assert float(((got - want).abs() / want)[big].max()) < 1e-5


def test_extreme_logits_stay_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        g = torch.Generator().manual_seed(2)
        w = torch.randn(50, 8, generator=g).to(dtype)
        h = torch.randn(20, 8, generator=g).to(dtype) * 5e3
        p = Problem(h, w, torch.randint(50, (20,), generator=g), None, None, Options(temperature=1.0, target_grad=True))
        terms, grads = reference.backward(p, torch.ones(20, dtype=dtype), Needs(h=True, w=True))
        assert all(bool(torch.isfinite(x).all()) for x in (*terms, grads.h, grads.w))


@pytest.mark.parametrize("target_grad", [False, True])
def test_gradcheck(target_grad: bool) -> None:
    """The hand-written gradient as an autograd function, against finite differences of its own forward."""
    p = problem(Options(2.0, 1.5, 0.1, 0.05, 3.0, True), teacher=True)
    p = p if target_grad else replace(p, t=None, options=replace(p.options, target_grad=True))

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, w, b, t):
            ctx.p = replace(p, h=h, w=w, b=b, t=t)
            terms: Terms = reference.forward(ctx.p)
            return terms.ce + p.options.alpha * terms.kl

        @staticmethod
        def backward(ctx, g):
            return tuple(reference.backward(ctx.p, g, ALL)[1])

    leaves = [None if x is None else x.clone().requires_grad_() for x in (p.h, p.w, p.b, p.t)]
    assert torch.autograd.gradcheck(Loss.apply, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)
