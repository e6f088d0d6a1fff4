"""A row's figures are those of what it names, and whatever goes wrong is a row too."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiedkl
from tiedkl import backends, reference
from tiedkl.bench import peers, runner, steps
from tiedkl.bench.candidates import Candidate, Loss, candidates, eager
from tiedkl.bench.measure import Measurement
from tiedkl.bench.shapes import IGNORE, Workload
from tiedkl.problem import Needs, Options, Problem

pytestmark = pytest.mark.usefixtures("no_peers")


def measured(w: Workload, more: dict[str, Candidate] | None = None, **options: Any) -> dict[str, Any]:
    table = candidates(w, ["torch"], compiled=False) | (more or {})
    one = Measurement(w, table, **{"rounds": 2, **options})
    one.run()
    json.dumps(one.result, allow_nan=False)
    return one.result


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_rows_are_checked_and_timed(small: Workload, mode: str, ignored: float) -> None:
    w = replace(small, mode=mode, ignored=ignored)
    result = measured(w)
    assert result["checked_tokens"] == w.tokens
    rows = {name: row for name, row in result["rows"].items() if row["status"] == "ok"}
    assert set(rows) == {"tiedkl torch", "eager CE+KL", "eager CE"}
    valid = steps.make_targets(w) != IGNORE
    share, rho = float(valid.double().mean()), len(steps.make_targets(w)[valid].unique()) / int(valid.sum())
    assert result["rho"] == rho
    for row in rows.values():
        assert set(row["errors"]) == ({"loss"} if mode == "fwd" else {"loss", "dh", "dw"})
        assert all(0 <= e < 1e-5 for e in row["errors"].values())
        assert row["samples"] == 2
        assert row["seconds"] > 0
        assert row["spread"] >= 0
        assert row["first_call_seconds"] >= 0
        rho_kl = rho * row["kl"]
        floor = share * {"fwd": 1 + rho_kl, "bwd": 2, "fwd+bwd": 3 + rho_kl}[mode]
        assert row["floor_fraction"] == pytest.approx(floor / row["gemm_units"])
    assert result["best_peer"] == {"ce": "eager CE", "cekl": "eager CE+KL"}
    ours = rows["tiedkl torch"]
    assert ours["vs_best_cekl"] == pytest.approx(ours["seconds"] / rows["eager CE+KL"]["seconds"])
    assert ours["vs_best_ce"] == pytest.approx(ours["seconds"] / rows["eager CE"]["seconds"])
    assert rows["eager CE"]["errors_vs_eager"]["loss"] == 1
    with torch.set_grad_enabled(mode != "fwd"):
        plan = tiedkl.explain(*steps.inputs(w), impl="torch")
    assert ours["scratch_bytes"] == plan.scratch_bytes
    assert result["rows"]["abacus CE"] == {
        "status": "absent", "kl": False, "note": "abacus is not installed", "errors": {},
    }  # fmt: skip


def test_cross_entropy_alone(small: Workload) -> None:
    result = measured(replace(small, loss="ce"))
    assert set(result["best_peer"]) == {"ce"}
    assert result["rows"]["tiedkl torch CE"]["status"] == "ok"
    assert "eager CE+KL" not in result["rows"]
    assert "rho" not in result["rows"]["tiedkl torch CE"]["plan"]


def test_half_precision_and_double(small: Workload) -> None:
    half, double = measured(replace(small, dtype="bfloat16")), measured(replace(small, dtype="float64"))
    assert 1e-4 < half["rows"]["eager CE+KL"]["errors"]["dw"] < 2e-2
    assert double["rows"]["eager CE+KL"]["errors"]["dw"] < 1e-13


def test_the_truth_does_not_depend_on_its_blocks(small: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, y = steps.inputs(replace(small, ignored=0.2))
    monkeypatch.setitem(steps.TRUTH_ENTRIES, "cpu", 7 * small.vocab)
    found = steps.truth(small, h, weight, y, kl=True)
    n = int((y >= 0).sum())
    p = Problem(h.detach().double(), weight.detach().double(), torch.where(y < 0, -1, y), None, None, Options(20, 10))
    terms, grads = reference.backward(p, torch.full((40,), 1 / n, dtype=torch.float64), Needs(h=True, w=True))
    assert torch.allclose(found["loss"], (terms.ce + 10 * terms.kl).sum() / n, rtol=1e-13)
    assert steps.relative(found["dh"], grads.h) < 1e-13
    assert steps.relative(found["dw"], grads.w) < 1e-13


def test_wrong_is_not_timed_and_failures_are_rows(small: Workload) -> None:
    right = eager(small, True)

    def scaled(loss: Loss) -> Loss:
        return lambda h, w, y: loss(h, w, y) * 1.2

    def impossible(h, w, y):
        return torch.empty(1 << 52)

    def device_full(h, w, y):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB. More words")

    def broken(h, w, y):
        raise ValueError("no such\nshape")

    result = measured(
        small,
        {
            "tiedkl torch": Candidate(scaled(right), True, "ours", impl="torch"),
            "peer scaled": Candidate(scaled(right), True, "theirs"),
            "peer large": Candidate(impossible, True, "theirs"),
            "peer larger": Candidate(device_full, True, "theirs"),
            "peer broken": Candidate(broken, False, "theirs 1.0"),
        },
    )
    rows = result["rows"]
    assert rows["tiedkl torch"]["status"] == "wrong"
    assert "seconds" not in rows["tiedkl torch"]
    assert "dw 0.2" in rows["tiedkl torch"]["note"]
    assert rows["peer scaled"]["status"] == "inaccurate"
    assert rows["peer scaled"]["seconds"] > 0
    assert rows["peer large"]["status"] == "out of memory"
    assert rows["peer large"]["note"] == f"{2**24:.1f} GiB cannot be allocated"
    assert rows["peer larger"] | {"note": "Tried to allocate 9 GiB"} == rows["peer larger"]
    assert rows["peer broken"]["status"] == "failed"
    assert rows["peer broken"]["note"] == "theirs 1.0: ValueError: no such shape"
    assert result["best_peer"]["cekl"] == "eager CE+KL", "never an inaccurate one"
    assert runner.problems({"results": [result]}) == [
        f"tiedkl torch at N=40 V=300 D=24 float32 wrong: {rows['tiedkl torch']['note']}"
    ]


def test_memory_of_a_process_is_no_limit_to_break(small: Workload) -> None:
    """Under the limit an allocation beyond the memory there is fails, in a way that becomes a row."""
    with steps.memory_limit(torch.device("cpu")), pytest.raises((RuntimeError, MemoryError)) as error:
        torch.zeros(1 << 42)
    assert steps.out_of_memory(error.value)
    assert not steps.out_of_memory(RuntimeError("shapes do not match"))
    torch.zeros(1000)


def test_a_gradient_through_the_target_is_held_to_its_own_truth(small: Workload) -> None:
    # With a small temperature and large weights the part through the target is no rounding error.
    w = replace(small, temperature=0.5)
    own = Candidate(
        lambda h, w, y: tiedkl.fused_tied_loss(h, w, y, temperature=0.5, target_grad=True, impl="reference"), True, "it"
    )
    row = measured(w, {"peer": own})["rows"]["peer"]
    assert row["status"] == "ok"
    assert row["errors"]["dw"] < 1e-6
    assert "flows through the target too" in row["note"]


def test_only_the_first_tokens_are_checked_where_all_would_take_long(
    small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiedkl.bench import measure

    monkeypatch.setattr(measure, "LEAST_CHECKED", 8)
    monkeypatch.setitem(measure.CHECK_WORK, "cpu", 1.0)
    result = measured(small)
    assert result["checked_tokens"] == 8
    assert all(row["errors"]["dw"] < 1e-5 for row in result["rows"].values() if row["status"] == "ok")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_sees_a_matrix_of_logits() -> None:
    w = Workload(600, 20_000, 8, targets="zipf")
    rows = measured(w, rounds=1)["rows"]
    logits = w.tokens * w.vocab * 4
    assert rows["eager CE+KL"]["peak_bytes"] > 4 * logits
    assert rows["eager CE"]["peak_bytes"] > 1.5 * logits


def test_the_time_there_is(small: Workload) -> None:
    late = measured(small, deadline=time.monotonic() - 1)
    states = {name: row["status"] for name, row in late["rows"].items()}
    assert states == {
        "tiedkl torch": "ok", "eager CE+KL": "not measured", "eager CE": "not measured", "abacus CE": "absent",
    }  # fmt: skip
    assert late["rows"]["tiedkl torch"]["samples"] == 1
    slow = Candidate(lambda h, w, y: (time.sleep(0.05), eager(small, False)(h, w, y))[1], False, "slow")
    rows = measured(small, {"slow": slow}, rounds=4, long_seconds=0.08)["rows"]
    assert rows["slow"]["samples"] == 2
    assert rows["eager CE"]["samples"] == 4


def test_what_compiles_needs_time_that_is_left(small: Workload) -> None:
    quick = Candidate(eager(small, False), False, "compiler", compiled=True)
    row = measured(small, {"compiled": quick}, deadline=time.monotonic() + 15)["rows"]["compiled"]
    assert row["status"] == "not measured"
    assert measured(small, {"compiled": quick}, deadline=math.inf)["rows"]["compiled"]["status"] == "ok"


def test_an_interrupt_keeps_the_rows_there_are(small: Workload, tmp_path: Path) -> None:
    def interrupted(h, w, y):
        raise KeyboardInterrupt

    class Few(runner.Settings):
        def table(self, w: Workload) -> dict[str, Candidate]:
            found = candidates(w, ["torch"], compiled=False)
            return {**found, "peer": Candidate(interrupted, True, "a peer"), "last": found["eager CE"]}

    shown: list[dict[str, Any]] = []
    settings = Few(command="test", rounds=2, json=tmp_path / "kept.json")
    report = runner.run([small, replace(small, tokens=30)], settings, show=shown.append)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert report["interrupted"]
    assert not kept["finished"]
    assert len(kept["results"]) == len(shown) == 1
    rows = kept["results"][0]["rows"]
    assert rows["eager CE"]["status"] == "ok"
    assert rows["eager CE"]["errors"]["dw"] < 1e-5
    assert rows["last"] | {"status": "not measured", "note": "interrupted before it"} == rows["last"]


def test_a_failing_backend_is_a_problem(small: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem, plan, g, needs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(backends.load("torch"), "backward", fail)
    result = measured(small)
    assert "tiedkl torch at N=40" in runner.problems({"results": [result]})[0]


def test_the_stamp_says_where(small: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIEDKL_COMMIT", "abc123")
    report = runner.run([small], runner.Settings(command="c", impls=["torch"], compiled=False, rounds=1))
    assert report["finished"]
    stamp = report["stamp"]
    assert stamp["commit"] == "abc123"
    assert {"device", "driver", "torch", "triton", "threads", "time", "command", "cpu"} <= set(stamp)


class TestPeers:
    """Those that are installed compute what they are compared for."""

    @pytest.fixture(autouse=True)
    def no_peers(self) -> None:
        """The real ones."""

    @pytest.mark.parametrize("ignored", [0.0, 0.25])
    def test_each_is_right_or_says_why_it_cannot_run(self, small: Workload, ignored: float) -> None:
        w = replace(small, ignored=ignored)
        table = {n: c for n, c in peers.peers(w).items() if not c.compiled}
        rows = measured(w, table, rounds=1)["rows"]
        for name in table:
            row = rows[name]
            assert row["note"], name
            if row["status"] in ("absent", "failed"):
                continue
            assert row["status"] == "ok", (name, row)
            assert row["seconds"] > 0
            assert any(part.isdigit() for part in row["note"].replace("+", ".").split(".")), "a version"

    def test_a_missing_package_is_named(self) -> None:
        assert peers.peer("no-such-package", "nothing", lambda m: m).note == "no-such-package is not installed"

    def test_a_package_that_cannot_be_imported_is_named(self) -> None:
        found = peers.peer("pytest", "no_such_module", lambda m: m)
        assert found.loss is None
        assert "cannot be imported: ModuleNotFoundError" in found.note
