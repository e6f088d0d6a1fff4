"""The judge itself: it must accept eager and condemn what is subtly wrong."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import replace

import pytest
import torch

from tiedkl import backends, testing
from tiedkl.backends import reference as honest
from tiedkl.problem import Grads, Terms
from tiedkl.testing import oracle

judge = importlib.import_module("tiedkl.testing.judge")  # the package has a function of that name

COUNT = 2 * len(testing.KINDS)


def test_cases_are_distinct_and_cover_everything() -> None:
    suite = list(testing.cases(8 * len(testing.KINDS)))
    assert len({repr(replace(case, id="", seed="")) for case in suite}) == len(suite)
    assert {(case.kind, case.dtype) for case in suite} == {(k, d) for k in testing.KINDS for d in testing.ALL_DTYPES}
    assert {case.reduction for case in suite} == {"mean", "sum", "none"}
    assert any(torch.Size(case.shape).numel() == 0 for case in suite)


def test_an_id_rebuilds_its_case() -> None:
    for case in testing.cases(COUNT, seed=5):
        assert testing.find_case(case.id) == case
        assert testing.find_case(case.id).options == case.options
    a, b = testing.make_inputs(case), testing.make_inputs(testing.find_case(case.id))
    assert torch.equal(a.w, b.w)
    assert torch.equal(a.target, b.target)


@pytest.mark.parametrize("id", ["", "0-1", "x-1-float32", "0-1-int8", "0--1-float32"])
def test_a_wrong_id_is_refused(id: str) -> None:
    with pytest.raises(ValueError, match="SEED-INDEX-DTYPE"):
        testing.find_case(id)


def test_inputs_are_what_their_kind_says() -> None:
    kinds = list(testing.KINDS)

    def inputs(kind: str, i: int = 0) -> tuple[testing.Case, testing.Inputs]:
        case = testing.make_case(0, kinds.index(kind) + i * len(kinds), "float32")
        return case, testing.make_inputs(case)

    layouts = {inputs("layout", i)[1].h.is_contiguous() for i in range(8)}
    assert layouts == {False}
    assert set(inputs("all_ignored")[1].target.flatten().tolist()) == {-100}
    assert bool(torch.isinf(inputs("masked")[1].b).any())
    assert inputs("int32")[1].target.dtype == torch.int32
    case, x = inputs("large")
    assert float((x.h @ x.w.T).abs().max()) > 5e3
    case, x = inputs("confident")
    known = x.target[x.target >= 0]
    prob = torch.softmax(x.h.double() @ x.w.double().T, -1)[x.target >= 0]
    assert float(prob.gather(1, known[:, None].long()).min()) > 0.99
    case, x = inputs("near_teacher")
    kl = testing.truth(case, testing.flatten(case, x)).tokens["kl"][x.target.flatten() >= 0]
    assert float(kl.min()) < 1e-4 < 1e-3 < float(kl.max())


def test_truth_and_eager_are_the_same_loss() -> None:
    """In float64 they share nothing but the definition of the loss."""
    for case in testing.cases(2 * len(testing.KINDS), seed=9, dtypes=("float64",)):
        flat = testing.flatten(case, testing.make_inputs(case))
        right, eager = testing.truth(case, flat), testing.eager(case, flat)
        if case.kind in ("large", "huge_logit") or not all(bool(torch.isfinite(d).all()) for d in eager.grads.values()):
            continue
        for name, value in right.grads.items():
            torch.testing.assert_close(eager.grads[name], value, rtol=1e-8, atol=1e-9 * float(1 + value.abs().sum()))
        for name, value in right.reduced.items():
            torch.testing.assert_close(eager.reduced[name], value, rtol=1e-9, atol=1e-9)


def _spoil(monkeypatch: pytest.MonkeyPatch, change) -> None:
    def forward(p, plan):
        return change(honest.forward(p, plan), None)[0]

    def backward(p, plan, g, needs):
        return change(*honest.backward(p, plan, g, needs))

    functions = {
        "unsupported": honest.unsupported,
        "tuning": honest.tuning,
        "forward": forward,
        "backward": backward,
    }
    module = type("spoiled", (), {name: staticmethod(function) for name, function in functions.items()})
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: module if name == "reference" else load(name))


def _breaches(kind: str, dtype: str) -> set[str]:
    found: set[str] = set()
    for i in range(3):
        case = testing.make_case(0, list(testing.KINDS).index(kind) + i * len(testing.KINDS), dtype)
        for j in testing.judge(case, "reference"):
            found |= {m.quantity for m in j.measured.values() if m.broken}
    return found


def test_the_reference_backend_passes_where_the_spoiled_ones_fail() -> None:
    for kind in ("random", "upstream", "weighted", "token_blocks"):
        for dtype in ("float32", "bfloat16", "float64"):
            assert _breaches(kind, dtype) == set()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_slightly_wrong_gradient_is_a_breach(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    def change(terms: Terms, grads: Grads | None):
        return terms, grads if grads is None else grads._replace(h=grads.h * (1 + 1e-5))

    _spoil(monkeypatch, change)
    assert _breaches("upstream", dtype) == {"dh"}


def test_one_wrong_row_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(terms: Terms, grads: Grads | None):
        if grads is not None:
            grads.w[grads.w.shape[0] // 2] *= 1.001
        return terms, grads

    _spoil(monkeypatch, change)
    assert "dw" in _breaches("bias", "float32")


def test_gradients_rounded_to_bf16_before_they_are_added_are_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(terms: Terms, grads: Grads | None):
        return terms, grads if grads is None else Grads(
            *(None if d is None else d.bfloat16().to(d.dtype) for d in grads)
        )

    _spoil(monkeypatch, change)
    assert {"dh", "dw"} <= _breaches("upstream", "float32")


def test_a_cheap_exponential_in_the_loss_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(terms: Terms, grads: Grads | None):
        return terms._replace(kl=terms.kl * (1 + 2e-5), ce=terms.ce + 1e-4), grads

    _spoil(monkeypatch, change)
    assert {"ce", "loss"} <= _breaches("upstream", "float32")
    assert "kl" in _breaches("near_teacher", "float32")


def test_equal_rows_lose_their_luck_in_products_of_two_orders() -> None:
    """Errors of d_w that cancel in eager's one product do not where a BLAS takes two."""
    case = testing.make_case(0, 43, "float32")
    assert case.kind == "equal_rows"
    flat = oracle.flatten(case, testing.make_inputs(case))
    right = oracle.truth(case, flat).grads["dw"]
    again = oracle.eager_again(case, flat, torch.Generator().manual_seed(0))
    once, other = ((v.grads["dw"] - right).norm() for v in (oracle.eager(case, flat), again))
    assert other > 3 * once


@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "expanded"])
def test_repeats_have_the_layout_of_their_case(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    seen = []
    monkeypatch.setattr(oracle, "use", lambda case, x, impl: seen.append(x) or oracle.Values({}, {}, {}))
    case = replace(testing.make_case(0, 0, "float32"), layout=layout)
    x = testing.make_inputs(case)
    oracle.use_again(case, x, "reference", torch.Generator().manual_seed(0))
    assert not torch.equal(seen[0].w, x.w)
    for moved, original in ((seen[0].h, x.h), (seen[0].w, x.w)):
        assert moved.stride() == original.stride()


@pytest.mark.parametrize("often", [False, True])
def test_bad_luck_is_no_breach_and_a_fault_is(monkeypatch: pytest.MonkeyPatch, often: bool) -> None:
    """Two competing words: the gradient has the error of one logit. Twice the bound once in nine, and every time."""
    case = testing.make_case(0, 42, "float32")
    assert case.kind == "large"
    judged = judge._Judge(case, "cpu")
    judged.more_eager()
    errors = [v.grads["dh"] - judged.right.grads["dh"] for v in judged.eager]
    typical = max(errors, key=lambda e: float(e.norm()))
    typical = typical * (judge._mean([float(e.norm()) for e in errors]) / typical.norm())
    calls: list[float] = []

    def use(case: testing.Case, *_: object) -> oracle.Values:
        calls.append(3.0 if often or not calls else 1.0)
        return replace(judged.right, grads={**judged.right.grads, "dh": judged.right.grads["dh"] + calls[-1] * typical})

    monkeypatch.setattr(judge, "use", use)
    monkeypatch.setattr(judge, "use_again", use)
    assert [text.split(":")[0] for text in judged.run("reference").breaches] == (["dh"] if often else [])
    assert len(calls) == 1 + judge.REPEATS


def test_nan_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(terms: Terms, grads: Grads | None):
        return terms._replace(ce=terms.ce * float("nan")), grads

    _spoil(monkeypatch, change)
    assert {"ce", "loss"} <= _breaches("random", "bfloat16")


def test_suite_ratio_compares_with_eager() -> None:
    case = testing.make_case(0, 0, "float32")

    def judgements(factor: float) -> list[testing.Judgement]:
        errors = [1e-7 * (1 + i % 7) for i in range(60)]
        return [testing.Judgement(case, "x", {"dh": testing.Measured("dh", factor * e, e, 1e-9, 0.5)}) for e in errors]

    [ratio] = testing.suite_ratios(judgements(1.2)).values()
    assert ratio.value == pytest.approx(1.2)
    assert ratio.broken
    [ratio] = testing.suite_ratios(judgements(0.9)).values()
    assert ratio.value == pytest.approx(0.9)
    assert not ratio.broken


@pytest.mark.parametrize(("cases", "errors"), [(3, 4.53), (6, 2.65), (30, 2.09), (1000, 2.00)])
def test_a_suite_of_few_cases_is_less_sure(cases: int, errors: float) -> None:
    assert not testing.Ratio(1 + 0.99 * errors * 0.01, 0.01, cases).broken
    assert testing.Ratio(1 + 1.01 * errors * 0.01, 0.01, cases).broken


def test_layouts_are_the_same_on_another_device() -> None:
    """A copy between devices makes strided and expanded tensors contiguous: there would be nothing to test there."""
    seen = set()
    for case in testing.cases(4 * len(testing.KINDS), seed=1, dtypes=("float32", "float64")):
        here, there = testing.make_inputs(case), testing.make_inputs(case, "meta")
        for field in dataclasses.fields(here):
            a, b = getattr(here, field.name), getattr(there, field.name)
            assert (a is None) == (b is None), (case.id, field.name)
            if a is not None:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), (case.id, field.name)
                assert b.device.type == "meta"
        if case.kind == "layout":
            seen.add((case.layout, here.h.is_contiguous()))
    assert {contiguous for _, contiguous in seen} == {False}
    assert len(seen) > 1
