"""benchmarks/bench_gpu.py at toy size on a CPU: its checks can fail, and its rows say what went wrong."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiedkl import backends

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("bench_gpu", "_candidates", "_report", "_steps")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("bench_gpu")


def run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--smoke", "--out", str(folder), *arguments])
    status = bench.main()
    return status, json.loads((folder / "bench_gpu.json").read_text())


def test_every_row_is_checked_and_timed_or_says_why_not(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIEDKL_COMMIT", "abc123")
    status, report = run(bench, monkeypatch, tmp_path)
    assert status == 0
    assert report["finished"]
    assert report["stamp"]["commit"] == "abc123"
    assert {"device", "driver", "torch", "triton", "command"} <= set(report["stamp"])
    assert len(report["results"]) == 2
    for result in report["results"]:
        assert 0 < result["rho"] <= 1
        for name, row in result["rows"].items():
            if row["status"] == "absent":
                assert row["note"], name
                continue
            assert row["status"] == "ok", (name, row)
            assert set(row["errors"]) == {"loss", "dh", "dw", "dh_full"}
            assert row["seconds"] > 0
            floor = 3 + result["rho"] * row["kl"]
            assert row["floor_fraction"] == pytest.approx(floor / row["gemm_units"])
            if name.startswith("tiedkl"):
                assert row["own_floor_fraction"] >= row["floor_fraction"] * (1 - 1e-9)
                assert "GEMMs" in row["plan"]
        runs = backends.load("triton").unsupported(torch.device("cpu"), torch.float32) is None
        assert (result["rows"]["tiedkl triton"]["status"] == "ok") == runs
        assert result["rows"]["tiedkl torch"]["errors_vs_eager"]["dw"] < 2
    lines = list(csv.DictReader((tmp_path / "bench_gpu.csv").open()))
    assert len(lines) == sum(len(result["rows"]) for result in report["results"])
    assert float(next(line for line in lines if line["name"] == "eager CE")["error_vs_eager_dh"]) == 1
    out = capsys.readouterr().out
    assert "tiedkl torch" in out
    assert "rho=" in out
    if importlib.util.find_spec("matplotlib"):
        assert {"time.png", "memory.png"} <= {file.name for file in tmp_path.iterdir()}


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = bench.candidates

    def out_of_memory(h, w, y):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB. More words")

    def broken(h, w, y):
        raise ValueError("no such shape")

    def some(device, dtype, smoke):
        table = honest(device, dtype, smoke)
        right, eager = table["tiedkl torch"].loss, table["eager CE"].loss
        table["tiedkl torch"].loss = lambda h, w, y: right(h, w, y) * 1.2
        table["tiedkl torch, 4 GiB"].loss = out_of_memory
        table["orda CE+KL, tied"] = type(table["eager CE"])(broken, True, "a peer")
        table["liger CE"] = type(table["eager CE"])(lambda h, w, y: eager(h, w, y) * 1.2, False, "another")
        return table

    monkeypatch.setattr(bench, "candidates", some)
    status, report = run(bench, monkeypatch, tmp_path)
    assert status == 1
    assert report["wrong"] == ["tiedkl torch at N=48 V=500 D=32", "tiedkl torch at N=40 V=300 D=24"]
    for result in report["results"]:
        rows = result["rows"]
        assert rows["tiedkl torch"]["status"] == "wrong"
        assert "seconds" not in rows["tiedkl torch"]
        assert rows["tiedkl torch, 4 GiB"]["status"] == "out of memory"
        assert rows["tiedkl torch, 4 GiB"]["note"] == "Tried to allocate 9 GiB"
        assert rows["orda CE+KL, tied"]["status"] == "failed"
        assert rows["orda CE+KL, tied"]["note"] == "ValueError: no such shape"
        assert rows["liger CE"]["status"] == "inaccurate"
        assert rows["liger CE"]["seconds"] > 0
    assert "WRONG: tiedkl torch at N=48" in capsys.readouterr().err


def test_a_failure_of_its_own_is_a_failure(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(problem, plan, g, needs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(backends.load("torch"), "backward", fail)
    status, report = run(bench, monkeypatch, tmp_path)
    assert status == 1
    assert "tiedkl torch at N=48 V=500 D=32" in report["failed"]


def test_an_interrupt_keeps_the_shapes_that_were_done(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, done = bench.Shape.time, []

    def interrupted(self, rounds, deadline):
        if done:
            raise KeyboardInterrupt
        done.append(self)
        honest(self, rounds, deadline)

    monkeypatch.setattr(bench.Shape, "time", interrupted)
    status, report = run(bench, monkeypatch, tmp_path)
    assert status == 0
    assert not report["finished"]
    assert len(report["results"]) == 1
    assert (tmp_path / "bench_gpu.csv").exists()


def test_out_of_time_before_the_first_shape(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(bench, monkeypatch, tmp_path, "--budget-seconds", "-1")
    assert status == 1
    assert report["results"] == []
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_toy_size_runs(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err
