"""Every backend that can run here, in every dtype, held to the bounds of tiedkl/testing/judge.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import tiedkl
from tiedkl import backends, testing
from tiedkl.plan import TOKEN_BLOCKS, VOCAB_BLOCKS

CPU = torch.device("cpu")
RUNNABLE = [name for name in backends.BACKENDS if backends.load(name).unsupported(CPU, torch.float32) is None]
BLOCKED = [name for name in RUNNABLE if name != "reference"]
ROUNDS = {"float32": 6, "bfloat16": 3, "float16": 2, "float64": 3}  # cases of each kind
INTERPRETED_ROUNDS = 1  # of Triton, whose interpreter takes about a second for a case


def runs(impl: str, dtype: str) -> bool:
    return backends.load(impl).unsupported(CPU, getattr(torch, dtype)) is None


def suite(dtype: str) -> Iterator[tuple[testing.Case, list[str]]]:
    """Cases, and the backends to judge on each."""
    impls = [x for x in RUNNABLE if runs(x, dtype)]
    for i, case in enumerate(testing.cases(ROUNDS[dtype] * len(testing.KINDS), seed=0, dtypes=(dtype,))):
        few = i >= INTERPRETED_ROUNDS * len(testing.KINDS)
        yield case, [x for x in impls if not (few and x == "triton")]


@pytest.fixture(scope="module")
def judgements() -> dict[str, list[testing.Judgement]]:
    """dtype -> what every backend does on every case; eager and the truth are computed once for all of them."""
    return {
        dtype: [j for case, impls in suite(dtype) for j in testing.judge(case, impls)] for dtype in testing.ALL_DTYPES
    }


@pytest.mark.parametrize(("impl", "dtype"), [(x, d) for x in RUNNABLE for d in testing.ALL_DTYPES if runs(x, d)])
def test_every_case_is_within_its_bounds(judgements: dict[str, list[testing.Judgement]], impl: str, dtype: str) -> None:
    found = [f"{j.case.id} ({j.case.kind}) {text}" for j in judgements[dtype] if j.impl == impl for text in j.breaches]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", [d for d in testing.ALL_DTYPES if d != "float64"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_the_suite_is_as_accurate_as_eager(
    judgements: dict[str, list[testing.Judgement]], impl: str, dtype: str
) -> None:
    ratios = testing.suite_ratios(j for j in judgements[dtype] if j.impl == impl)
    assert {key[2] for key in ratios} == {*testing.TERMS, *testing.GRADS}
    assert not {key[2]: ratio for key, ratio in ratios.items() if ratio.broken}


@pytest.mark.parametrize("impl", BLOCKED)
def test_the_forced_strategies_are_used(impl: str) -> None:
    module = backends.load(impl)
    for kind, strategy in (("token_blocks", TOKEN_BLOCKS), ("vocab_blocks", VOCAB_BLOCKS)):
        for dtype in testing.ALL_DTYPES:
            if module.unsupported(CPU, getattr(torch, dtype)):
                continue
            case = testing.make_case(0, list(testing.KINDS).index(kind), dtype)
            x = testing.make_inputs(case)
            w = x.w.requires_grad_()
            options = testing.arguments(case, impl)
            plan = tiedkl.explain(x.h, w, x.target, x.b, target_weight=x.t, impl=impl, **options)
            assert plan.strategy == strategy, (case.id, str(plan))


def _everything(impl: str, case: testing.Case) -> list[torch.Tensor]:
    values = testing.use(case, testing.make_inputs(case), impl)
    return [*values.reduced.values(), *values.tokens.values(), *values.grads.values()]


SOME = [testing.make_case(2, i, dtype) for i in range(0, 58, 3) for dtype in ("float32", "bfloat16")]
FEWER = {"triton": 16}  # one in so many: in the interpreter they take seconds; tests/kernels has more


@pytest.mark.parametrize("impl", RUNNABLE)
def test_the_same_inputs_give_the_same_bits(impl: str) -> None:
    for case in SOME[:: FEWER.get(impl, 1)]:
        first = _everything(impl, case)
        for _ in range(2):
            again = _everything(impl, case)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), case.id


@pytest.mark.parametrize("impl", RUNNABLE)
def test_the_thread_count_changes_rounding_only(impl: str) -> None:
    before = torch.get_num_threads()
    try:
        for case in SOME[:: FEWER.get(impl, 1)]:
            if case.dtype != "float32" or case.kind in ("large", "huge_logit"):
                continue
            torch.set_num_threads(1)
            one = _everything(impl, case)
            torch.set_num_threads(2)
            two = _everything(impl, case)
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-4, atol=2e-6 * float(1 + a.abs().sum() / max(a.numel(), 1)), msg=case.id
                )
    finally:
        torch.set_num_threads(before)


def test_the_compiled_backend_agrees_with_the_one_in_python() -> None:
    if "cpp" not in RUNNABLE:
        pytest.skip("the extension is not built")
    for case in testing.cases(2 * len(testing.KINDS), seed=4, dtypes=("float64",)):
        if case.kind in ("large", "huge_logit"):
            continue
        for a, b in zip(_everything("cpp", case), _everything("torch", case), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(1 + a.abs().sum()), msg=case.id)


def test_choice_depends_on_device_and_dtype_only() -> None:
    name, skipped = backends.choose("auto", CPU, torch.float32)
    assert name == RUNNABLE[0]
    assert set(skipped) == set(backends.BACKENDS) - {name}
    assert all(skipped.values()), "every backend passed over has a reason"


def test_cuda_tensors_go_to_triton_or_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, triton = torch.device("cuda"), backends.load("triton")
    monkeypatch.setattr(triton, "MISSING", None)
    # the extension may be there, and asks a GPU, which need not be
    monkeypatch.setattr(backends.load("cuda"), "_missing_code", lambda *_: "no code for this GPU")
    assert backends.choose("auto", cuda, torch.bfloat16)[0] == "triton"
    name, skipped = backends.choose("auto", cuda, torch.float64)
    assert name == "torch"
    assert "float64 is not supported" in skipped["triton"]
    monkeypatch.setattr(triton, "MISSING", "triton cannot be imported (why)")
    name, skipped = backends.choose("auto", cuda, torch.bfloat16)
    assert name == "torch"
    assert skipped["triton"] == "triton cannot be imported (why)"


def test_an_unknown_device_leaves_the_compiled_backend_out() -> None:
    why = backends.load("cpp").unsupported(torch.device("meta"), torch.float32)
    assert why is not None
    assert "meta" in why
    with pytest.raises(RuntimeError, match="impl='cpp' cannot run: "):
        backends.choose("cpp", torch.device("meta"), torch.float32)


def test_import_works_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['tiedkl._C'] = None\n"
        "import torch, tiedkl\n"
        "plan = tiedkl.explain(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]))\n"
        "assert plan.impl == 'torch', plan\n"
        "assert 'cannot be loaded' in plan.skipped['cpp'], plan\n"
        "print(float(tiedkl.fused_tied_loss(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4]))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.6094379)
