"""The CUDA backend on the host: the same cases and bounds as every backend, and blocks that cross every border.

Kernels, walk and Python are those of a GPU; what differs is who runs the threads and who multiplies (cuda_on_host.h).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import tiedkl
from tiedkl import backends, reference, testing
from tiedkl.ops import plan_for
from tiedkl.plan import TOKEN_BLOCKS, VOCAB_BLOCKS
from tiedkl.problem import Needs, Options, Problem
from tiedkl.testing import random_problem as problem

backend = backends.load("cuda")
CPU = torch.device("cpu")
ROUNDS = {"float32": 2, "bfloat16": 1, "float16": 2}  # cases of each kind
OPTIONS = {
    "default": Options(2.0, 5.0),
    "plain": Options(alpha=0.0),
    "everything": Options(3.0, 2.0, 0.1, 0.01, 4.0, True),
    "target_grad": Options(1.5, 2.0, target_grad=True),
}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ALL = Needs(True, True, True, True)
WIDE = 4500  # columns: three steps of the gradient kernel, two of the statistics kernels


@pytest.mark.parametrize("dtype", ROUNDS)
def test_the_suite(extension: ModuleType, dtype: str) -> None:
    """Every case is within its bounds, and all of them together are as accurate as eager."""
    cases = testing.cases(ROUNDS[dtype] * len(testing.KINDS), seed=0, dtypes=(dtype,))
    judgements = [j for case in cases for j in testing.judge(case, "cuda")]
    found = [f"{j.case.id} ({j.case.kind}) {text}" for j in judgements for text in j.breaches]
    assert not found, "\n".join(found)
    ratios = testing.suite_ratios(judgements)
    assert {key[2] for key in ratios} == {*testing.TERMS, *testing.GRADS}
    assert not {key[2]: ratio for key, ratio in ratios.items() if ratio.broken}


def test_a_slightly_wrong_gradient_is_a_breach(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = backend.backward

    def wrong(problem, plan, g, needs):
        terms, d = honest(problem, plan, g, needs)
        return terms, d._replace(w=None if d.w is None else d.w * 1.001)

    monkeypatch.setattr(backend, "backward", wrong)
    (judgement,) = testing.judge(testing.make_case(0, 0, "float32"), "cuda")
    assert any(text.startswith("dw: ") for text in judgement.breaches)


def test_the_forced_strategies_are_used(extension: ModuleType) -> None:
    for kind, strategy in (("token_blocks", TOKEN_BLOCKS), ("vocab_blocks", VOCAB_BLOCKS)):
        for dtype in ROUNDS:
            case = testing.make_case(0, list(testing.KINDS).index(kind), dtype)
            x = testing.make_inputs(case)
            options = testing.arguments(case, "cuda")
            w = x.w.requires_grad_()
            plan = tiedkl.explain(x.h, w, x.target, x.b, target_weight=x.t, impl="cuda", **options)
            assert plan.strategy == strategy, (case.id, str(plan))


def evaluate(p: Problem, needs: Needs, token_block: int, vocab_block: int) -> list[Tensor]:
    """Terms, those of a forward call, and gradients, in blocks of the given size."""
    plan = replace(plan_for(p, "cuda", None, True), token_block=token_block, vocab_block=vocab_block)
    g = torch.where(p.y >= 0, torch.linspace(0.5, 2.0, len(p.y)), 0.0)
    terms, grads = backend.backward(p, plan, g, needs)
    assert [d is not None for d in grads] == [needs.h, needs.w, needs.b, needs.t]
    return [*terms, *backend.forward(p, plan), *(d for d in grads if d is not None)]


def check(p: Problem, needs: Needs, token_block: int, vocab_block: int) -> None:
    got = evaluate(p, needs, token_block, vocab_block)
    g = torch.where(p.y >= 0, torch.linspace(0.5, 2.0, len(p.y)), 0.0)
    terms, grads = reference.backward(p.to(torch.float64), g.double(), needs)
    for a, right in zip(got[:10], [*terms, *terms], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), right, rtol=1e-5, atol=1e-5)
    for a, right in zip(got[10:], (d for d in grads if d is not None), strict=True):
        assert a.dtype == torch.float32
        rtol = GRADIENT[p.h.dtype]
        atol = rtol * float(1 + right.abs().amax() if right.numel() else 1)
        torch.testing.assert_close(a.double(), right, rtol=rtol, atol=atol)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_any_size(extension: ModuleType, name: str, extras: bool) -> None:
    needs = Needs(True, True, extras, extras)
    for tokens, vocab in ((37, 70), (5, 70), (37, 33), (7, 32)):
        check(problem(37, 70, 19, OPTIONS[name], torch.float32, extras), needs, tokens, vocab)


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_several_steps(extension: ModuleType, name: str, dtype: torch.dtype) -> None:
    """G of two bytes lies over logits of four: what is read late must not have been overwritten."""
    check(problem(6, WIDE + 3, 8, OPTIONS[name], dtype, True), ALL, 6, WIDE + 3)
    check(problem(6, WIDE + 3, 8, OPTIONS[name], dtype, True), ALL, 4, WIDE // 2)


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("name", ["default", "everything"])
def test_the_order_of_threads_does_not_matter(extension: ModuleType, name: str, dtype: torch.dtype) -> None:
    """To the last bit: a barrier that is missing shows here, and in no other test."""
    p = problem(5, WIDE, 8, OPTIONS[name], dtype, True)
    runs = []
    for order in (0, 0, 1, 2, 2):  # forward, backward, shuffled
        extension.set_order(order)
        runs.append(evaluate(p, ALL, 5, WIDE) + evaluate(p, ALL, 3, WIDE - 1000))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_every_subset_of_gradients(extension: ModuleType) -> None:
    p = problem(5, 11, 3, OPTIONS["everything"], torch.float32, True)
    for wanted in itertools.product((False, True), repeat=4):
        check(p, Needs(*wanted), 5, 11)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 16), (17, 1, 2), (16, 32, 16)], ids=str)
def test_odd_shapes(extension: ModuleType, shape: tuple[int, int, int]) -> None:
    check(problem(*shape, OPTIONS["target_grad"], torch.float32, False), Needs(True, True), *shape[:2])


def test_no_token_and_no_valid_token(extension: ModuleType) -> None:
    for n in (0, 18):
        p = problem(n, 9, 3, OPTIONS["everything"], torch.float32, True)
        p.y.fill_(-1)
        for x in evaluate(p, ALL, max(n, 1), 9):
            assert not x.numel() or float(x.abs().sum()) == 0


def test_strides_of_any_kind(extension: ModuleType) -> None:
    p = problem(13, 31, 8, OPTIONS["everything"], torch.float32, True)
    assert p.b is not None
    assert p.t is not None
    strided = Problem(
        p.h.T.contiguous().T, torch.stack((p.w, p.w), -1)[..., 0], p.y, torch.stack((p.b, p.b), -1)[:, 1],
        torch.cat((p.t, p.t), 1)[:, : p.t.shape[1]], p.options,
    )  # fmt: skip
    check(strided, ALL, 13, 31)
    for a, b in zip(evaluate(p, ALL, 13, 31), evaluate(strided, ALL, 13, 31), strict=True):
        torch.testing.assert_close(a, b)


def test_what_memory_held_before_does_not_matter(extension: ModuleType) -> None:
    p = problem(21, 45, 8, OPTIONS["everything"], torch.bfloat16, True)
    first = evaluate(p, ALL, 10, 20)
    torch.use_deterministic_algorithms(True)  # with it, uninitialised memory is filled with NaN
    try:
        again = evaluate(p, ALL, 10, 20)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_not_hidden(extension: ModuleType) -> None:
    p = problem(20, 40, 8, OPTIONS["everything"], torch.float32, True)
    p.h[3, 2] = torch.nan
    p.y.clamp_(min=0)
    terms, grads = backend.backward(p, plan_for(p, "cuda", None, True), torch.ones(20), ALL)
    for term in (terms.ce, terms.kl, terms.lse):
        assert term.isnan().nonzero().flatten().tolist() == [3]
    assert grads.h is not None
    assert grads.h[3].isnan().all()


def test_gradients_of_tiny_weights_survive_in_float16(extension: ModuleType) -> None:
    p = problem(21, 45, 8, OPTIONS["default"], torch.float16, False)
    g = torch.where(p.y >= 0, torch.linspace(0.5, 2.0, 21), 0.0) * 1e-12
    _, got = backend.backward(p, plan_for(p, "cuda", None, True), g, Needs(True, True))
    _, want = reference.backward(p.to(torch.float64), g.double(), Needs(True, True))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


def assert_within_the_plan(p: Problem, budget: int, grad: bool) -> None:
    plan, tokens = plan_for(p, "cuda", budget, grad), len(p.y)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        g = torch.ones(tokens)
        result = backend.backward(p, plan, g, Needs(True, True)) if grad else backend.forward(p, plan)
    del result, g
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    gradients = 4 * (p.h.numel() + p.w.numel()) if grad else 0
    vectors = 600 * tokens + 32 * len(p.w)  # statistics of a token; the list of targets
    assert plan.scratch_bytes / 2 < peak - gradients <= plan.scratch_bytes + vectors, str(plan)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("budget", [1 << 18, 1 << 21, 1 << 24])
def test_peak_memory_is_within_the_plan(extension: ModuleType, budget: int, name: str, grad: bool) -> None:
    """Of float32, which the host multiplies without copies."""
    assert_within_the_plan(problem(200, 1500, 24, OPTIONS[name], torch.float32, False), budget, grad)


@pytest.mark.parametrize("name", ["default", "target_grad"])
def test_peak_memory_of_wide_rows_is_within_the_plan(extension: ModuleType, name: str) -> None:
    """Gathered rows of one block are gone before those of the next are there."""
    p = problem(300, 900, 700, OPTIONS[name], torch.float32, False)
    assert 2 * plan_for(p, "cuda", 1 << 21, False).token_block <= 300
    assert_within_the_plan(p, 1 << 21, False)


def test_the_choice(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU never by itself; and what is built for the host is no use on a GPU, nor for another torch."""
    name, skipped = backends.choose("auto", CPU, torch.float32)
    assert name != "cuda"
    assert skipped["cuda"]
    assert backends.choose("cuda", CPU, torch.float32)[0] == "cuda"
    with pytest.raises(RuntimeError, match=r"dtype torch\.float64 is not supported"):
        backends.choose("cuda", CPU, torch.float64)
    assert "for tests" in str(backend.unsupported(torch.device("cuda", 0), torch.float32))
    assert "got device meta" in str(backend.unsupported(torch.device("meta"), torch.float32))
    stale = ModuleType("tiedkl._C_cuda")
    stale.build_info = lambda: {"torch": "1.0.0", "architectures": "sm_90"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiedkl._C_cuda", stale)
    monkeypatch.setattr(tiedkl, "_C_cuda", stale)
    backend.extension.cache_clear()
    assert "was built for torch 1.0.0" in str(backend.unsupported(torch.device("cuda", 0), torch.float32))


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "sm_80 sm_90", True), ((8, 6), "sm_80 sm_90", True), ((9, 0), "sm_80", False),
        ((9, 0), "compute_80", True),
        ((9, 0), "sm_90a", True), ((10, 0), "sm_90a compute_90a", False), ((12, 0), "sm_80 sm_90 compute_90", True),
        ((7, 5), "sm_80 compute_80", False), ((10, 3), "sm_100", True), ((12, 1), "sm_120", True), ((9, 0), "", False),
    ],
)  # fmt: skip
def test_which_devices_code_runs_on(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert backend.runs_on(capability, architectures) == runs
