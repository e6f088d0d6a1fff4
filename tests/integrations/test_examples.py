"""Every script in examples/ for a few steps; memory is measured in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MIB = 1 << 20


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp: Path) -> str:
    """What the script prints with --smoke; in this process, as importing what it needs takes longer than running it."""
    monkeypatch.chdir(tmp)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    with contextlib.suppress(ImportError):  # settings of an earlier test's Trainer
        importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def logged(text: str, name: str) -> list[float]:
    """The values of one entry in the order in which they were printed, whether as `'name': '1.0'` or as `name 1.0`."""
    return [float(x) for x in re.findall(rf"(?<![a-z_])'?{name}'?:? +'?([0-9.e+-]+)", text)]


def check_falls(text: str, prefix: str = "") -> None:
    for name in ("loss", "ce"):
        values = logged(text, prefix + name)
        assert len(values) >= 2, text
        assert values[-1] < values[0] - 0.5, text
    kl = logged(text, prefix + "kl")
    assert len(kl) >= 2
    assert all(x > 0 for x in kl)


@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_trainers(name: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if name == "trl_sft":
        pytest.importorskip("trl")
        pytest.importorskip("datasets")
    text = run(name, monkeypatch, capsys, tmp_path)
    check_falls(text)
    if name == "trainer":
        assert logged(text, "eval_ce")[-1] < logged(text, "eval_ce")[0]


def test_accelerate_loop(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = run("accelerate_loop", monkeypatch, capsys, tmp_path)
    check_falls(text)
    found = re.search(r"largest change of a parameter (\S+), .* differs by (\S+)", text)
    assert found, text
    update, difference = map(float, found.groups())
    assert update > 1e-3
    assert difference <= 1e-12 * update


def test_lightning_module(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    if not any(map(_installed, ("lightning", "pytorch_lightning"))):
        pytest.skip("neither lightning nor pytorch_lightning is installed")
    check_falls(run("lightning_module", monkeypatch, capsys, tmp_path), "valid_")


def _installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory(tmp_path: Path) -> None:
    """The peak falls from three matrices of logits to what the plan promises."""
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "memory.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    logits, scratch = found["logits"], found["scratch"]
    assert logits > 2 * scratch
    # Scratch, the gradient of the matrix before it is added to the one that is there, and the small trunk.
    assert found["after"] <= scratch + found["matrix"] + 16 * MIB
    # The model's own loss holds the logits, their log-softmax and their gradient at once.
    predicted = 3 * logits - scratch
    assert abs(found["before"] - found["after"] - predicted) <= 16 * MIB
    assert found["before"] - found["after"] >= logits - scratch
