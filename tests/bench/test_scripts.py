"""The scripts in benchmarks/ at toy size, and the README's figures."""

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
from tiedkl.bench import measure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for module in ("_script", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *arguments: str, toy: bool = True
) -> tuple[int, dict[str, Any]]:
    script = load(monkeypatch, name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(["--smoke"] if toy else []), "--out", str(folder), *arguments])
    status = script.main()
    return status, json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["bench_cpu", "bench_gpu"])
@pytest.mark.usefixtures("no_peers")
def test_every_row_is_checked_and_timed_or_says_why_not(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIEDKL_COMMIT", "abc123")
    status, report = run(monkeypatch, tmp_path, name)
    assert status == 0
    assert report["finished"]
    assert report["stamp"]["commit"] == "abc123"
    assert f"benchmarks/{name}.py --smoke" in report["stamp"]["command"]
    assert [r["dtype"] for r in report["results"]] == ["float32", "bfloat16"]
    for result in report["results"]:
        workspace = "8 MiB" if name == "bench_cpu" else "4 GiB"
        assert result["rows"][f"tiedkl torch, {workspace}"]["status"] == "ok"
        for row_name, row in result["rows"].items():
            if row["status"] == "absent":
                assert row["note"], row_name
                continue
            assert row["status"] == "ok", (row_name, row)
            assert set(row["errors"]) == {"loss", "dh", "dw"}
            assert row["seconds"] > 0
            if row_name.startswith("tiedkl"):
                assert row["own_floor_fraction"] >= row["floor_fraction"] * (1 - 1e-9)
    lines = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(lines) == sum(len(result["rows"]) for result in report["results"])
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("jinja2"):
        assert "<svg" in (tmp_path / f"{name}.html").read_text()
    assert len(list(tmp_path.iterdir())) <= 4
    assert "tiedkl torch" in capsys.readouterr().out


@pytest.mark.usefixtures("no_peers")
def test_a_failure_of_its_own_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(problem, plan, g, needs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(backends.load("torch"), "backward", fail)
    status, report = run(monkeypatch, tmp_path, "bench_gpu")
    assert status == 1
    assert report["results"][0]["rows"]["tiedkl torch"]["status"] == "failed"


@pytest.mark.usefixtures("no_peers")
def test_an_interrupt_keeps_the_shapes_that_were_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    honest, done = measure.Measurement.time, []

    def interrupted(self: measure.Measurement) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(self)
        honest(self)

    monkeypatch.setattr(measure.Measurement, "time", interrupted)
    status, report = run(monkeypatch, tmp_path, "bench_gpu")
    assert status == 0
    assert report["interrupted"]
    assert "seconds" in report["results"][0]["rows"]["eager CE"]
    assert "seconds" not in report["results"][1]["rows"]["eager CE"]
    assert (tmp_path / "bench_gpu.csv").exists()


@pytest.mark.usefixtures("no_peers")
def test_out_of_time_before_the_first_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(monkeypatch, tmp_path, "bench_gpu", "--budget-seconds", "-1")
    assert status == 1
    assert report["results"] == []
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.usefixtures("no_peers")
def test_against_its_own_older_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, report = run(monkeypatch, tmp_path, "bench_cpu")
    assert status == 0
    for result in report["results"]:
        result["rows"]["tiedkl torch"]["gemm_units"] /= 1e9
    older = tmp_path / "bench_cpu.json"
    older.write_text(json.dumps(report))
    status, _ = run(monkeypatch, tmp_path, "bench_cpu", "--against", str(older), "--margin", "1e6")
    assert status == 1
    assert run(monkeypatch, tmp_path, "bench_cpu", "--against", str(older), "--margin", "1e12")[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_toy_size_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, "bench_gpu", toy=False)
    assert end.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_a_wrong_shape_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, "bench_cpu", "--shapes", "1,2")
    assert end.value.code == 2
    assert "expected N,V,D, got 1,2" in capsys.readouterr().err


class TestReadme:
    @pytest.fixture
    def tables(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        return load(monkeypatch, "readme_tables")

    def test_the_figures_are_those_of_the_committed_results(self, tables: ModuleType) -> None:
        assert tables.stale(tables.blocks(), tables.read_json(tables.RESULT)) == []

    def test_another_figure_is_noticed(self, tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        report = tables.read_json(tables.RESULT)
        for result in report["results"]:
            result["rows"]["tiedkl cpp"]["seconds"] *= 1.5
        monkeypatch.setattr(tables, "read_json", lambda file: report)
        assert tables.stale(tables.blocks(), report) == ["README.md", "docs/design.md"]
        report["results"][0]["rows"]["tiedkl cpp"]["gemm_units"] *= 2
        pytest.importorskip("matplotlib")
        drawn = tables.drawn_by(tables.picture(report))
        if drawn == tables.drawn_by(tables.picture_file().read_text("utf-8")):
            assert tables.stale(tables.blocks(), report)[-1] == "benchmarks/results/cpu/bench_cpu.svg"

    def test_another_error_is_noticed(
        self, tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        errors = json.loads(tables.ACCURACY.read_text())
        errors["verify"]["suite"][0]["value"] += 0.1
        other = tmp_path / "accuracy.json"
        other.write_text(json.dumps(errors))
        monkeypatch.setattr(tables, "ACCURACY", other)
        assert tables.stale(tables.blocks(), tables.read_json(tables.RESULT)) == ["README.md"]

    def test_a_missed_goal_is_bold(self, tables: ModuleType) -> None:
        report = tables.read_json(tables.RESULT)
        for result in report["results"]:
            result["rows"]["tiedkl cpp"]["seconds"] = 0.5 * result["rows"]["eager CE+KL"]["seconds"]
        assert "| **0.50 (0.18)** |" in tables.goals(report)
        for result in report["results"]:
            result["rows"]["tiedkl cpp"]["seconds"] = 0.1 * result["rows"]["eager CE+KL"]["seconds"]
        assert "| 0.10 (0.18) |" in tables.goals(report)

    def test_it_writes_what_it_checks(
        self, tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pytest.importorskip("matplotlib")
        for page in {page for page, _ in tables.blocks()}:
            (tmp_path / page).parent.mkdir(exist_ok=True)
            (tmp_path / page).write_text((tables.ROOT / page).read_text().replace("0.", "9."))
        result = tmp_path / "benchmarks" / "bench_cpu.json"
        result.parent.mkdir()
        result.write_bytes(tables.RESULT.read_bytes())
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        monkeypatch.setattr(tables, "RESULT", result)
        monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
        assert tables.main() == 1
        monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
        assert tables.main() == 0
        monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
        assert tables.main() == 0
        readme = (tmp_path / "README.md").read_text("utf-8")
        assert readme.startswith("# tiedkl")
        assert readme.endswith("Apache-2.9.\n")  # outside the marks nothing changes
        assert "| 2048, 50257, 768 | float32 |" in readme

    def test_a_page_without_marks(self, tables: ModuleType) -> None:
        with pytest.raises(SystemExit, match="lacks a mark: <!-- speed"):
            tables.replaced("no marks", "speed", "x")
        with pytest.raises(SystemExit, match="lacks a mark: <!-- end of speed"):
            tables.replaced("<!-- speed: python benchmarks/readme_tables.py -->", "speed", "x")
