"""tiedkl/loss.py: arguments, reductions, settings and what users may rely on."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiedkl
from tiedkl import backends
from tiedkl.ops import environment_flag

RUNNABLE = [n for n in backends.BACKENDS if backends.load(n).unsupported(torch.device("cpu"), torch.float32) is None]
N, V, D = 12, 23, 6


@pytest.fixture
def data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(N, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "target": torch.randint(V, (N,), generator=g),
    }


def eager(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(CE, KL) of every token at the default temperature."""
    z, s = F.linear(input, weight, bias), F.linear(weight[target], weight)
    log_r, q = F.log_softmax(z / 20, -1), F.softmax(s / 20, -1)
    return F.cross_entropy(z, target, reduction="none"), F.kl_div(log_r, q, reduction="none").sum(-1)


TYPE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "20"}, "temperature must be a number, got str"),
    ({"temperature": True}, "temperature must be a number, got bool"),
    ({"gamma": None}, "gamma must be a number, got NoneType"),
    ({"alpha": [1]}, "alpha must be a number, got list"),
    ({"label_smoothing": torch.tensor(0.1)}, "label_smoothing must be a number, got Tensor"),
    ({"ignore_index": 1.5}, "ignore_index must be an int, got float"),
    ({"reduction": None}, "reduction must be a str, got NoneType"),
    ({"target_grad": 1}, "target_grad must be a bool, got int"),
    ({"return_terms": "yes"}, "return_terms must be a bool, got str"),
    ({"workspace_bytes": 1e6}, "workspace_bytes must be an int or None, got float"),
    ({"impl": 3}, "impl must be a str, got int"),
    ({"input": [[1.0]]}, "input must be a torch.Tensor, got list"),
    ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
    ({"target": 3}, "target must be a torch.Tensor, got int"),
    ({"bias": 0.0}, "bias must be a torch.Tensor, got float"),
    ({"target_weight": 1}, "target_weight must be a torch.Tensor, got int"),
    ({"token_weight": [1.0] * N}, "token_weight must be a torch.Tensor, got list"),
    ({"token_weight": torch.ones(N, dtype=torch.int64)}, "token_weight.dtype=torch.int64 is not a floating dtype"),
    ({"input": torch.ones(N, D, dtype=torch.int64)}, "input.dtype=torch.int64 is not one of torch.float32"),
    ({"weight": torch.ones(V, D).double()}, "weight.dtype=torch.float64 does not match input.dtype=torch.float32"),
    ({"bias": torch.ones(V).half()}, "bias.dtype=torch.float16 does not match input.dtype=torch.float32"),
    ({"target": torch.zeros(N)}, "target.dtype=torch.float32 is not torch.int64 or torch.int32"),
    ({"shift": 1.0}, "shift must be an int, got float"),
    ({"num_items": "many"}, "num_items must be a number, got str"),
]

VALUE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature=0.0 is outside (0, inf)"),
    ({"temperature": -1}, "temperature=-1 is outside (0, inf)"),
    ({"temperature": float("nan")}, "temperature=nan is outside (0, inf)"),
    ({"temperature": float("inf")}, "temperature=inf is outside (0, inf)"),
    ({"gamma": -0.5}, "gamma=-0.5 is outside [0, inf)"),
    ({"alpha": -1.0}, "alpha=-1.0 is outside [0, inf)"),
    ({"label_smoothing": 1.1}, "label_smoothing=1.1 is outside [0, 1]"),
    ({"z_loss": -1e-4}, "z_loss=-0.0001 is outside [0, inf)"),
    ({"softcap": 0.0}, "softcap=0.0 is outside (0, inf)"),
    ({"workspace_bytes": 0}, "workspace_bytes=0 must be positive"),
    ({"reduction": "avg"}, "reduction='avg' is not one of 'mean', 'sum', 'none'"),
    ({"impl": "tpu"}, "impl='tpu' is not one of 'auto'"),
    ({"input": torch.tensor(1.0)}, "input must have at least one dimension (..., D), got a scalar"),
    ({"weight": torch.ones(V)}, f"weight must be (V, D), got shape ({V},)"),
    ({"weight": torch.ones(0, D)}, "weight.shape[0]=0: the vocabulary is empty"),
    ({"weight": torch.ones(V, D + 1)}, f"input.shape[-1]={D} does not match weight.shape[1]={D + 1}"),
    (
        {"target": torch.zeros(N - 1, dtype=torch.int64)},
        f"target.shape=({N - 1},) does not match input.shape[:-1]=({N},)",
    ),
    ({"bias": torch.ones(V + 1)}, f"bias.shape=({V + 1},) does not match weight.shape[:1]=({V},)"),
    ({"target_weight": torch.ones(V + 1, 2)}, f"target_weight.shape=({V + 1}, 2) does not match"),
    ({"token_weight": torch.ones(N + 1)}, f"token_weight.shape=({N + 1},) does not match target.shape=({N},)"),
    ({"token_weight": torch.ones(N, requires_grad=True)}, "token_weight requires a gradient"),
    ({"shift": -1}, "shift=-1 is outside [0, target.shape[-1]]"),
    ({"shift": N + 1}, f"shift={N + 1} is outside [0, target.shape[-1]]"),
    ({"num_items": 0}, "num_items=0 is outside (0, inf)"),
    ({"num_items": torch.ones(2)}, "num_items must hold one number, got shape (2,)"),
    ({"num_items": 4, "reduction": "sum"}, "num_items applies to reduction='mean', got reduction='sum'"),
    ({"weight": torch.ones(V, D, device="meta")}, "weight is on meta, input is on cpu"),
]


@pytest.mark.parametrize(("change", "message"), TYPE_ERRORS)
def test_type_errors(data: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        tiedkl.fused_tied_loss(**{**data, **change})
    with pytest.raises(TypeError, match=re.escape(message)):
        tiedkl.explain(**{**data, **change})


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS)
def test_value_errors(data: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiedkl.fused_tied_loss(**{**data, **change})
    with pytest.raises(ValueError, match=re.escape(message)):
        tiedkl.explain(**{**data, **change})


def test_the_module_checks_its_settings_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="temperature=-1 is outside"):
        tiedkl.FusedTiedLoss(temperature=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        tiedkl.FusedTiedLoss(tau=3)
    with pytest.raises(TypeError, match="positional argument"):
        tiedkl.FusedTiedLoss(20.0)


@pytest.mark.parametrize("impl", RUNNABLE)
@pytest.mark.parametrize("bad", [V, V + 1000, -1, -99, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_target_out_of_range_is_named(data: dict[str, Tensor], impl: str, bad: int, dtype: torch.dtype) -> None:
    target = data["target"].to(dtype)
    target[7] = bad
    with pytest.raises(
        ValueError, match=re.escape(f"target[7]={bad} is outside [0, {V}) and is not ignore_index=-100")
    ):
        tiedkl.fused_tied_loss(data["input"], data["weight"], target, impl=impl)
    assert torch.isfinite(tiedkl.fused_tied_loss(data["input"], data["weight"], target, impl=impl, ignore_index=bad))


def test_an_ignore_index_inside_the_vocabulary(data: dict[str, Tensor]) -> None:
    target = data["target"]
    pad = int(target[0])
    got = tiedkl.fused_tied_loss(**data, ignore_index=pad)
    ce, kl = eager(**data)
    torch.testing.assert_close(got, (ce + 10 * kl)[target != pad].mean())


@pytest.mark.parametrize("impl", RUNNABLE)
def test_reductions(data: dict[str, Tensor], impl: str) -> None:
    ce, kl = eager(**data)
    per_token = ce + 10 * kl
    for reduction, want in (("none", per_token), ("sum", per_token.sum()), ("mean", per_token.mean())):
        got = tiedkl.fused_tied_loss(**data, reduction=reduction, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    weight = torch.linspace(0, 2, N)
    got = tiedkl.fused_tied_loss(**data, token_weight=weight, impl=impl)
    torch.testing.assert_close(got, (weight * per_token).sum() / weight.sum())
    got = tiedkl.fused_tied_loss(**data, token_weight=weight, num_items=77, impl=impl)
    torch.testing.assert_close(got, (weight * per_token).sum() / 77)


def test_alpha_and_gamma(data: dict[str, Tensor]) -> None:
    ce, kl = eager(**data)
    torch.testing.assert_close(tiedkl.fused_tied_loss(**data, gamma=0.8), (ce + 16 * kl).mean())
    torch.testing.assert_close(tiedkl.fused_tied_loss(**data, gamma=0.8, alpha=3.0), (ce + 3 * kl).mean())
    torch.testing.assert_close(tiedkl.fused_tied_loss(**data, alpha=0.0), ce.mean())
    torch.testing.assert_close(tiedkl.fused_tied_loss(**data, gamma=0), ce.mean())


def test_num_items_makes_accumulation_exact() -> None:
    """Micro-batches of different lengths, each divided by the tokens of all, add up to one large batch."""
    g = torch.Generator().manual_seed(1)
    h, y = torch.randn(30, D, generator=g), torch.randint(V, (30,), generator=g)
    y[20:27] = -100
    w = torch.randn(V, D, generator=g).requires_grad_()
    whole = tiedkl.fused_tied_loss(h, w, y)
    (want,) = torch.autograd.grad(whole, w)
    items = (y != -100).sum()
    for count in (items, int(items), float(items), items.reshape(1)):
        parts = [
            tiedkl.fused_tied_loss(h[s], w, y[s], num_items=count) for s in (slice(0, 4), slice(4, 19), slice(19, 30))
        ]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(torch.autograd.grad(sum(parts), w)[0], want)


def test_num_items_is_not_rounded_to_float32() -> None:
    h, w, y = torch.randn(3, D).double(), torch.randn(V, D).double(), torch.tensor([0, 1, 2])
    count = 2**25 + 1
    total = tiedkl.fused_tied_loss(h, w, y, reduction="sum")
    torch.testing.assert_close(tiedkl.fused_tied_loss(h, w, y, num_items=count) * count, total, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("k", [1, 3])
def test_shift_equals_slicing(k: int, reduction: str) -> None:
    g = torch.Generator().manual_seed(2)
    h = torch.randn(2, 3, 9, D, generator=g).requires_grad_()
    w, y = torch.randn(V, D, generator=g).requires_grad_(), torch.randint(V, (2, 3, 9), generator=g)
    y[0, 1, 4] = -100
    weight = torch.rand(2, 3, 9, generator=g)
    got = tiedkl.fused_tied_loss(h, w, y, shift=k, reduction=reduction, token_weight=weight)
    want = tiedkl.fused_tied_loss(h[..., :-k, :], w, y[..., k:], reduction=reduction, token_weight=weight[..., k:])
    assert got.shape == want.shape == (() if reduction != "none" else (2, 3, 9 - k))
    torch.testing.assert_close(got, want)
    upstream = torch.rand(want.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad(x, (h, w), upstream) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_shift_by_the_whole_length_leaves_nothing(data: dict[str, Tensor]) -> None:
    assert float(tiedkl.fused_tied_loss(**data, shift=N)) == 0
    assert tiedkl.fused_tied_loss(**data, shift=N, reduction="none").shape == (0,)


@pytest.mark.parametrize("impl", RUNNABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["no tokens", "no batch", "all ignored", "zero weights"])
def test_nothing_to_learn_gives_zero(impl: str, reduction: str, case: str) -> None:
    shape = {"no tokens": (0,), "no batch": (0, 5)}.get(case, (4,))
    y = torch.full(shape, -100 if case == "all ignored" else 1, dtype=torch.int64)
    h, w, b = (
        torch.randn(*shape, D).requires_grad_(),
        torch.randn(V, D).requires_grad_(),
        torch.randn(V).requires_grad_(),
    )
    weight = torch.zeros(shape) if case == "zero weights" else None
    out = tiedkl.fused_tied_loss(h, w, y, b, token_weight=weight, reduction=reduction, impl=impl, return_terms=True)
    for x in out:
        assert x.shape == (() if reduction != "none" else shape)
        assert float(x.detach().abs().sum()) == 0
    out.loss.sum().backward()
    for x in (h, w, b):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert float(x.grad.abs().sum()) == 0


@pytest.mark.parametrize("impl", RUNNABLE)
@pytest.mark.parametrize("workspace", [None, 1 << 14])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_a_number_that_is_none_shows_in_the_loss(impl: str, workspace: int | None, value: float, where: str) -> None:
    if where == "bias" and value == -float("inf"):
        pytest.skip("that is a mask")
    g = torch.Generator().manual_seed(3)
    x = {
        "input": torch.randn(9, D, generator=g),
        "weight": torch.randn(300, D, generator=g),
        "bias": torch.randn(300, generator=g),
    }
    x[where].view(-1)[3] = value
    x = {k: v.requires_grad_() for k, v in x.items()}
    y = torch.randint(300, (9,), generator=g)
    loss = tiedkl.fused_tied_loss(x["input"], x["weight"], y, x["bias"], impl=impl, workspace_bytes=workspace)
    assert not torch.isfinite(loss)
    loss.backward()  # no crash
    assert not bool(torch.isfinite(x["weight"].grad).all())
    if where == "input":  # the other tokens keep their losses
        each = tiedkl.fused_tied_loss(
            x["input"], x["weight"], y, x["bias"], impl=impl, workspace_bytes=workspace, reduction="none"
        )
        assert torch.isfinite(each).tolist() == [False] + [True] * 8


@pytest.mark.parametrize("impl", RUNNABLE)
def test_terms(data: dict[str, Tensor], impl: str) -> None:
    ce, kl = eager(**data)
    z = data["input"] @ data["weight"].T
    entropy = torch.distributions.Categorical(logits=z).entropy()
    correct = (z.argmax(-1) == data["target"]).float()
    each = tiedkl.fused_tied_loss(**data, reduction="none", return_terms=True, impl=impl)
    assert isinstance(each, tiedkl.TiedLossOutput)
    wanted = (ce + 10 * kl, ce, kl, z.logsumexp(-1), entropy, correct)
    for name, got, want in zip(each._fields, each, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    weight = torch.linspace(0.1, 2, N)
    mean = tiedkl.fused_tied_loss(**data, return_terms=True, token_weight=weight, impl=impl)
    for got, want in zip(mean, wanted, strict=True):
        torch.testing.assert_close(got, (want * weight).sum() / weight.sum(), rtol=1e-4, atol=1e-5)


def test_terms_are_there_with_and_without_gradients(data: dict[str, Tensor]) -> None:
    without = tiedkl.fused_tied_loss(**data, return_terms=True)
    data["weight"].requires_grad_()
    for a, b in zip(without, tiedkl.fused_tied_loss(**data, return_terms=True), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-7)


def test_function_and_module_agree(data: dict[str, Tensor]) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "alpha": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0}
    bias = torch.randn(V)
    a = tiedkl.FusedTiedLoss(**options)(*data.values(), bias, shift=2)
    b = tiedkl.fused_tied_loss(*data.values(), bias, shift=2, **options)
    assert torch.equal(a, b)


def test_the_module_owns_nothing(data: dict[str, Tensor]) -> None:
    module = tiedkl.FusedTiedLoss(temperature=7.0, reduction="sum", return_terms=True)
    assert list(module.parameters()) == list(module.buffers()) == []
    assert dict(module.state_dict()) == {}
    want = module(**data)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half().double().eval()):
        for a, b in zip(want, twin(**data), strict=True):
            assert torch.equal(a, b)
    assert "temperature=7" in repr(module)
    assert "reduction='sum'" in repr(module)


def test_explain_tells_what_would_run(data: dict[str, Tensor]) -> None:
    data["weight"].requires_grad_()
    plan = tiedkl.explain(**data)
    assert plan.impl == RUNNABLE[0]
    assert set(plan.skipped) == set(backends.BACKENDS) - {plan.impl}
    assert plan.gemms.startswith("3")
    assert tiedkl.explain(**data, impl="torch").impl == "torch"
    assert "asked for" in tiedkl.explain(**data, impl="torch").skipped["reference"]
    strict = tiedkl.explain(**data, workspace_bytes=1)
    assert strict.workspace_bytes == 1
    assert strict.strategy == "vocab_blocks"
    with torch.no_grad():
        assert tiedkl.explain(**data).gemms.startswith("1")


def test_explain_is_not_changed_by_its_caller(data: dict[str, Tensor]) -> None:
    tiedkl.explain(**data).skipped["torch"] = "spoiled"
    assert tiedkl.explain(**data).skipped["torch"] != "spoiled"


def test_a_backend_that_cannot_run_says_so(data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load("torch"), "unsupported", lambda device, dtype: "it is a holiday")
    with pytest.raises(RuntimeError, match="impl='torch' cannot run: it is a holiday"):
        tiedkl.fused_tied_loss(**{**data, "target": data["target"].int()}, impl="torch", workspace_bytes=12345678)


def test_the_environment_chooses_where_arguments_do_not(
    data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIEDKL_IMPL", "reference")
    assert tiedkl.explain(**data).impl == "reference"
    assert tiedkl.explain(**data, impl="torch").impl == "torch"
    assert tiedkl.FusedTiedLoss().settings.impl == "reference"
    monkeypatch.setenv("TIEDKL_IMPL", "abacus")
    with pytest.raises(ValueError, match="impl='abacus' is not one of"):
        tiedkl.fused_tied_loss(**data)


@pytest.mark.parametrize(
    ("text", "want"), [("1", True), ("yes", True), ("0", False), ("", False), ("False", False), ("off", False)]
)
def test_environment_flags(monkeypatch: pytest.MonkeyPatch, text: str, want: bool) -> None:
    monkeypatch.setenv("TIEDKL_SOMETHING", text)
    assert environment_flag("TIEDKL_SOMETHING") is want
    monkeypatch.delenv("TIEDKL_SOMETHING")
    assert environment_flag("TIEDKL_SOMETHING") is False


def test_the_plan_is_logged_for_who_asks(data: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    tiedkl.fused_tied_loss(**data)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="tiedkl"):
        tiedkl.fused_tied_loss(**data)
    assert f"N={N} V={V} D={D}" in caplog.text
    assert "GEMMs" in caplog.text


def test_tiedkl_log_sets_the_level_and_nothing_is_printed() -> None:
    code = (
        "import torch, tiedkl, logging; logging.basicConfig(format='%(name)s: %(message)s')\n"
        "tiedkl.fused_tied_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]))\n"
    )

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
        )

    loud, quiet = run(TIEDKL_LOG="debug"), run()
    assert (loud.returncode, quiet.returncode) == (0, 0), loud.stderr + quiet.stderr
    assert "tiedkl: N=2 V=4 D=3" in loud.stderr
    assert "tiedkl" not in quiet.stderr
    assert loud.stdout == quiet.stdout == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_float32_or_better(data: dict[str, Tensor], dtype: torch.dtype) -> None:
    h, w = (data[k].to(dtype).requires_grad_() for k in ("input", "weight"))
    out = tiedkl.fused_tied_loss(h, w, data["target"], return_terms=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in out} == {wide}
    out.loss.backward()
    assert h.grad is not None
    assert h.grad.dtype == dtype


def test_shapes_of_a_single_token() -> None:
    h, w, y = torch.randn(D), torch.randn(V, D), torch.tensor(3)
    loss = tiedkl.fused_tied_loss(h, w, y, reduction="none")
    assert loss.shape == ()
    torch.testing.assert_close(loss, tiedkl.fused_tied_loss(h[None], w, y[None]))
