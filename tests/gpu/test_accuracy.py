"""The suite of tests/test_backends.py on a GPU: the same cases, the same bounds, float64 on the device as the truth.

One test per kind and dtype, so that pytest-xdist can spread what takes the time: compiling kernels.
"""

from __future__ import annotations

import pytest
import torch

from tiedkl import testing

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
def test_every_case_is_within_its_bounds(kind: str, dtype: str) -> None:
    found = breaches(chosen(kind, dtype, ROUNDS[dtype]), "triton")
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


def test_a_slightly_wrong_gradient_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds must be able to fail here: a float32 gradient that is off by 0.1%."""
    from tiedkl.backends import triton

    honest = triton.backward

    def wrong(problem, plan, g, needs):
        terms, d = honest(problem, plan, g, needs)
        return terms, d._replace(w=None if d.w is None else d.w * 1.001)

    monkeypatch.setattr(triton, "backward", wrong)
    assert any(" dw: " in text for text in breaches(chosen("random", "float32", 3), "triton"))
