"""Pictures and the page of a report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from tiedkl.bench import peers, runner, shapes, table
from tiedkl.bench.candidates import Candidate
from tiedkl.bench.page import render
from tiedkl.bench.plots import pictures, write_plots
from tiedkl.bench.shapes import Workload


@pytest.fixture(scope="module")
def swept() -> dict[str, Any]:
    """N varied, and one workload alone."""
    with pytest.MonkeyPatch.context() as patch:
        absent = Candidate(None, False, "<abacus> is not installed")
        patch.setattr(peers, "peers", lambda w: {"abacus CE": absent})
        base = Workload(48, 200, 16, targets="zipf", ignored=0.3)
        workloads = [*shapes.sweep(base, "N", (12.0, 24.0, 48.0)), Workload(30, 150, 8, title="Toy")]
        return runner.run(workloads, runner.Settings(command="c", impls=["torch"], compiled=False, rounds=1))


def test_curves_bars_and_errors(swept: dict[str, Any]) -> None:
    found = {p.name.partition("-")[2]: p for p in pictures(swept)}
    assert {"time-N", "memory-N", "time", "error"} <= set(found)
    curve = found["time-N"]
    for text in ("tiedkl torch", "eager CE+KL", "GEMM floor", "tokens N", "milliseconds"):
        assert text in curve.svg, text
    assert "V=200, D=16, float32" in curve.caption
    assert "N=" not in curve.caption
    assert "3 + \u03c1 matrix products" in curve.caption
    assert "abacus" not in curve.svg
    ids = [re.findall(r'id="(\w{5,})"', p.svg) for p in found.values()]
    shared = set.intersection(*(set(i) for i in ids)) - {"figure_1", "patch_1", "patch_2", "axes_1"}
    assert not [i for i in shared if not re.fullmatch(r"(matplotlib|xtick|ytick|line2d|patch|text|legend)\w*", i)]


def test_two_points_are_no_curve(swept: dict[str, Any]) -> None:
    few = swept | {"results": swept["results"][:2]}
    assert not [p for p in pictures(few) if "-N" in p.name]
    assert [p for p in pictures(few) if p.name.endswith("-time")]


def test_the_same_report_gives_the_same_pictures(swept: dict[str, Any], tmp_path: Path) -> None:
    files = write_plots(tmp_path, swept)
    assert len(files) == len(set(files)) == len(pictures(swept))
    for file in files:
        text = Path(file).read_text()
        assert text.startswith("<svg")
        assert "http://www.w3.org/2000/svg" in text
    again = write_plots(tmp_path, swept)
    assert [Path(f).read_text() for f in again] == [p.svg for p in pictures(swept)]


def test_a_page_that_needs_nothing_from_outside(swept: dict[str, Any]) -> None:
    text = render(swept)
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\((?!#)", text)
    assert not re.search(r'(src|href)="(?!#)', text)
    assert text.count("<svg") == len(pictures(swept))
    assert "&lt;abacus&gt; is not installed" in text
    assert not re.search(r"\b(nan|None|undefined)\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.S))
    for result in swept["results"]:
        for row in result["rows"].values():
            if "seconds" in row:
                for cell in table.cells(row):
                    assert f"<td>{cell}</td>" in text
    assert swept["stamp"]["time"] in text


def test_a_page_of_nothing(swept: dict[str, Any]) -> None:
    text = render(swept | {"results": [], "finished": False, "left_out": ["N=1 V=2 D=3 float32"]})
    assert "Nothing was measured" in text
    assert "incomplete" in text
    assert "N=1 V=2 D=3" in text


def test_a_row_without_figures_has_dashes(swept: dict[str, Any]) -> None:
    assert table.cells({"status": "ok", "kl": True, "errors": {}}) == ["-"] * len(table.HEADS)
    row = {"status": "ok", "kl": True, "note": "v", "errors": {}}
    result = swept["results"][0] | {"rows": {"tiedkl torch": row}, "best_peer": {}, "unit_seconds": None}
    assert "tiedkl torch" in table.render(result)


def test_the_terminal_table(swept: dict[str, Any]) -> None:
    text = table.render(swept["results"][-1])
    assert text.startswith("Toy: 30 tokens, vocabulary 150, width 8, float32; forward + backward")
    assert "* eager CE+KL" in text
    assert "Timed in 1 round, temperature 20." in text
    assert "0%" not in re.search(r"eager CE\+KL.*", text)[0], "one round has no spread"
    assert "abacus CE: <abacus> is not installed" in text
    assert "30% of the tokens ignored" in table.render(swept["results"][0])
    assert max(map(len, text.splitlines())) <= 140
    assert replace(Workload(1, 1, 1)).size == "N=1 V=1 D=1 float32"
