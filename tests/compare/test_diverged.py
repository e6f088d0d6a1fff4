"""A training whose loss becomes no number: the others go on, the report says so, nothing is repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import compare, runner
from tiedkl.compare.markdown import markdown
from tiedkl.compare.training import Trainer

from .test_command import TOY, main
from .test_resume import numbers


def diverging(patch: pytest.MonkeyPatch, variant: str, seed: int, epoch: int) -> None:
    """Let the validation of one run give nan."""
    evaluate = Trainer.evaluate

    def nan(self: Trainer, split: Any) -> float:
        here = (self.variant.name, self.settings["seed"], self.epoch + 1)
        return math.nan if here == (variant, seed, epoch) else evaluate(self, split)

    patch.setattr(Trainer, "evaluate", nan)


def test_the_others_are_trained_and_reported(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy(seeds=3)
    expected = compare(toy(seeds=3, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        diverging(patch, "real", 1, 2)
        report = compare(settings)
    real, base = report["variants"]["real"], report["variants"]["baseline"]
    assert (report["status"], real["status"], base["status"]) == ("partial", "diverged", "done")
    assert [run["status"] for run in real["runs"]] == ["diverged", "done", "done"]
    assert real["seeds_done"] == real["evidence"]["seeds"] == [2, 3]
    assert numbers(report)["real"]["runs"][1:] == numbers(expected)["real"]["runs"][1:]
    assert {row["seeds"] for row in real["curves"]} == {2}
    said = report["verdict"][-1]
    assert "+REAL with seed 1 in epoch 2" in said
    assert "--lr or --clip" in said
    assert "not finished" not in " ".join(report["verdict"])
    assert said in markdown(report)
    assert "+REAL with seed 1 in epoch 2" in (tmp_path / "out" / "report.html").read_text()

    monkeypatch.setattr(runner, "train", None)  # nothing is trained again
    assert numbers(compare(settings)) == numbers(report)


def test_a_baseline_without_a_result(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, "baseline", 1, 1)
    report = compare(toy(variants=("baseline", "re", "real"), epochs=1))
    assert "the baseline has not been trained to the end" in report["verdict"][0]
    assert report["variants"]["baseline"]["test_ppl"] is None
    assert report["checklist"] == []


def test_everything_diverges_on_the_command_line(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY, "--lr=1e38", "--clip=1e38")
    for _ in range(2):
        assert main(*argv) == 1
        out, err = capfd.readouterr()
        *_, said, empty, last = out.splitlines()
        assert "baseline with seed 1 in epoch 1, +RE with seed 1 in epoch 1" in said
        assert empty == ""
        assert last.startswith("report: ")
        assert "baseline (diverged)" in out
    assert "training diverged" not in err  # it was, the second time, only reported
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert {v["status"] for v in report["variants"].values()} == {"diverged"}
    assert main(*argv, "--fresh", "--quiet", "--budget=30s") == 1
