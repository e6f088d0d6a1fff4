"""The scripts of examples/ptb at toy size, on CPython's help texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "ptb"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("experiments", "ablated", "run", "tables", "subspaces"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import ablated
    import experiments
    import subspaces
    import tables

    return {"ablated": ablated, "experiments": experiments, "tables": tables, "subspaces": subspaces}


def numbers(file: Path) -> dict[str, Any]:
    figures = json.loads(file.read_text())
    return {name: (run["status"], run["valid_ppl"], run["test_ppl"]) for name, run in figures.items()}


@pytest.mark.slow
def test_an_experiment_that_is_stopped_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    common = ("small", "--smoke", "--seed", "1", "--only", "re*", "--threads", "1")
    whole = ("--runs", str(tmp_path / "a"), "--results", str(tmp_path / "a"))
    assert "all runs are done" in run("run.py", *common, *whole, "--jobs", "2")
    parts = ("--runs", str(tmp_path / "b"), "--results", str(tmp_path / "b"))
    assert "2 of 2 runs are left" in run("run.py", *common, *parts, "--minutes", "0")
    run("run.py", *common, *parts)
    right = numbers(tmp_path / "a" / "small.json")
    assert numbers(tmp_path / "b" / "small.json") == right
    assert {status for status, *_ in right.values()} == {"done"}
    assert "2 of 2 runs are done" in run("run.py", *common, *parts), "nothing is trained twice"
    page = run("tables.py", "--results", str(tmp_path / "a"))
    assert "| `real` | 1 |" in page
    assert "82.7" in page, "the paper's figure stands beside"


def test_every_run_has_a_name_of_its_own(modules: Any) -> None:
    names = [run.name for runs in modules["experiments"].experiments().values() for run in runs]
    assert len(names) == len(set(names))
    four = modules["experiments"].experiments()["small"][:4]
    assert [run.variant for run in four] == ["baseline", "al", "re", "real"]


def test_the_share_outside_a_space(modules: Any) -> None:
    outside = modules["subspaces"].outside
    basis = torch.randn(50, 4)
    assert outside(basis @ torch.randn(4, 4), basis) == pytest.approx(0, abs=1e-6)
    orthogonal = torch.randn(50, 4).double()
    q, _ = torch.linalg.qr(basis.double())
    orthogonal -= q @ (q.T @ orthogonal)
    assert outside(orthogonal, basis) == pytest.approx(1)
    assert outside(
        orthogonal / orthogonal.norm() + q[:, :1] @ torch.full((1, 4), 0.5).double(), basis
    ) == pytest.approx(0.5**0.5)


def test_an_interval_over_seeds(modules: Any) -> None:
    interval = modules["tables"].interval
    assert interval([80.0]) == "80.00"
    assert interval([80.0, 81.0, 82.0]) == "81.00 ± 2.48"  # 4.303 / sqrt(3)
