"""A comparison that was stopped or killed continues with the same numbers, to the last bit."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tiedkl.compare import CompareError, Interrupted, compare, runner
from tiedkl.compare.progress import Progress
from tiedkl.compare.settings import Settings
from tiedkl.compare.store import Store

from .conftest import sentences

TIMES = {"seconds", "tokens_per_second", "tokens_per_second_range"}


def numbers(report: dict[str, Any]) -> Any:
    """The report's results without what a clock measured; floats stay exact."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in TIMES}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(report["variants"])


def weights(out: Path, variant: str) -> dict[str, Any]:
    state = Store(str(out)).load(variant, torch.device("cpu"))
    assert state is not None
    return state["model"]


class Killed(BaseException):
    """Stands for a process that vanishes: nothing catches it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, settings: Settings, steps: int) -> None:
    """Run until training step `steps` has been made, and drop everything that is not on the disk."""
    calls = 0

    def step(self: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runner.Progress, "step", step)
        with pytest.raises(Killed):
            compare(settings)


@pytest.mark.parametrize("changes", [{}, {"model": "transformer"}], ids=["lstm", "transformer"])
def test_killed_in_the_middle_of_an_epoch(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole, parts = (toy(out=str(tmp_path / name), checkpoint_every=0.0, **changes) for name in ("whole", "parts"))
    expected = compare(whole)
    killed_after(monkeypatch, parts, 8)  # first variant, first epoch
    state = Store(parts.out).load("baseline", torch.device("cpu"))
    assert state is not None
    assert (state["epoch"], state["step"]) == (0, 7)
    killed_after(monkeypatch, parts, 50)  # second variant
    state = Store(parts.out).load("real", torch.device("cpu"))
    assert state is not None
    assert state["step"] > 0
    assert numbers(compare(parts)) == numbers(expected)
    for name in ("baseline", "real"):
        for key, p in weights(tmp_path / "whole", name).items():
            assert torch.equal(p, weights(tmp_path / "parts", name)[key]), (name, key)


def test_steps_since_the_last_checkpoint_are_repeated(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compare(toy(out=str(tmp_path / "whole")))
    parts = toy(out=str(tmp_path / "parts"))  # checkpoints at the ends of epochs only
    killed_after(monkeypatch, parts, 30)
    state = Store(parts.out).load("baseline", torch.device("cpu"))
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 0)
    assert numbers(compare(parts)) == numbers(expected)


def test_killed_process(toy: Any, tmp_path: Path) -> None:
    """The real thing: SIGKILL, in the middle of whatever it was doing."""
    changes = {"variants": ("real",), "epochs": 4, "checkpoint_every": 0.0}
    expected = compare(toy(out=str(tmp_path / "whole"), **changes))
    parts = toy(out=str(tmp_path / "parts"), **changes)
    code = f"from tiedkl.compare import *; compare({parts!r})"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        deadline = time.monotonic() + 40
        while not (tmp_path / "parts" / "real.pt").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    state = Store(parts.out).load("real", torch.device("cpu"))
    assert state is not None
    assert state["test_ppl"] is None  # it was not done
    assert numbers(compare(parts)) == numbers(expected)


def test_checkpoints_after_short_epochs_take_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saves = [0.0], []

    class Training:
        def __init__(self) -> None:
            self.settings, self.epoch, self.done = {"epochs": 40}, 0, False
            numbers = ("epoch", "valid_ppl", "train_ce", "lr", "tokens_per_second")
            self.curves: list[dict[str, Any]] = [dict.fromkeys(numbers, 1) | {"train_kl": None}]

        def run(self) -> Any:
            for _ in range(40):
                for event in ("step", "epoch"):
                    clock[0] += 5.0
                    yield event
            self.done = True
            yield "done"

        def state_dict(self) -> dict[str, Any]:
            return {}

    def save(state: dict[str, Any]) -> None:
        saves.append(clock[0])
        clock[0] += cost

    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    for cost, expected in ((0.01, 41), (0.9, 9), (5.0, 8)):  # every epoch; every fifth, sixth; and the end
        clock[0], saves[:] = 0.0, []
        assert runner.train(Training(), "toy", save, Progress(1, 1, quiet=True), 60.0, lambda: False)  # type: ignore[arg-type]
        assert len(saves) == expected
        assert max(b - a for a, b in itertools.pairwise([0.0, *saves, clock[0]])) <= 60.0 + 5.0 + cost


def test_stopping_leaves_a_report_and_continues(toy: Any, tmp_path: Path) -> None:
    expected = compare(toy(out=str(tmp_path / "whole")))
    parts, asked = toy(out=str(tmp_path / "parts")), 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 30

    with pytest.raises(Interrupted) as stopped:
        compare(parts, should_stop=should_stop)
    report = stopped.value.report
    assert report["status"] == "partial"
    assert report["variants"]["baseline"]["status"] == "partial"
    assert 1 < report["variants"]["baseline"]["epochs_done"] < 2
    assert report["variants"]["baseline"]["valid_ppl"] > 1
    assert report["variants"]["baseline"]["test_ppl"] is None
    assert report["variants"]["real"] == report["variants"]["real"] | {"status": "not started"}
    assert "incomplete" in (tmp_path / "parts" / "report.html").read_text()
    assert numbers(compare(parts)) == numbers(expected)


def test_finished_comparison_is_only_reported_again(toy: Any, tmp_path: Path) -> None:
    settings = toy(epochs=1)
    first = compare(settings)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.pt")}
    assert len(before) == 2
    assert numbers(compare(settings)) == numbers(first)
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.pt")} == before


def test_variants_can_be_added(toy: Any) -> None:
    both = compare(toy(epochs=1))
    compare(toy(epochs=1, variants=("re",), fresh=True))
    assert set(compare(toy(epochs=1, variants=("re", "baseline")))["variants"]) == {"baseline", "re"}
    again = compare(toy(epochs=1))  # the baseline is there
    assert numbers(again)["real"]["runs"] == numbers(both)["real"]["runs"]


def test_changed_settings_are_refused(toy: Any, text_file: Path) -> None:
    compare(toy(epochs=1))
    with pytest.raises(CompareError, match=r"hidden=16, now 8.*--fresh.*--out"):
        compare(toy(epochs=1, hidden=8))
    text_file.write_text(text_file.read_text() + "\nba ba ba")
    with pytest.raises(CompareError, match=r"the text.*--fresh"):
        compare(toy(epochs=1))
    assert compare(toy(epochs=1, hidden=8, fresh=True))["config"]["hidden"] == 8


def test_settings_that_failed_before_training_do_not_claim_the_directory(toy: Any) -> None:
    with pytest.raises(CompareError, match="no_such_backend"):
        compare(toy(epochs=1, impl="no_such_backend"))
    assert compare(toy(epochs=1))["status"] == "complete"


def test_seed_decides_the_numbers(toy: Any, tmp_path: Path) -> None:
    a, b, c = (
        compare(toy(epochs=1, variants=("real",), seed=seed, out=str(tmp_path / name)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert numbers(a) == numbers(b)
    assert a["variants"]["real"]["test_ppl"] != c["variants"]["real"]["test_ppl"]


@pytest.mark.parametrize(
    "changes", [{"epochs": 6}, {"model": "transformer", "lr": 0.01, "epochs": 3}], ids=["lstm", "transformer"]
)
def test_every_variant_learns(toy: Any, text_file: Path, changes: dict[str, Any]) -> None:
    """The toy text offers three words at every step; an untrained model hesitates between 46."""
    text_file.write_text("\n".join(sentences(400)), encoding="utf-8")
    report = compare(toy(variants=("baseline", "al", "re", "real"), bptt=10, dropout=0.0, hidden=32, **changes))
    for name, v in report["variants"].items():
        assert v["valid_ppl"] < 30, name
        assert v["curves"][0]["valid_ppl"] > v["valid_ppl"], name
        assert (v["curves"][-1]["train_kl"] is None) == (name in ("baseline", "re"))
